"""Text Generation Inference's surface through its own clients, unchanged, and its errors."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from huggingface_hub import InferenceClient
from text_generation import Client
from text_generation.errors import ValidationError as TgiValidationError

from kernels.watermark import is_green


@pytest.fixture(scope="module")
def client(server):
    return Client(server.url)


def test_the_example_of_its_readme(client):
    answer = client.generate("Funniest joke ever:", max_new_tokens=17, temperature=0.95)
    assert answer.details.generated_tokens <= 17
    assert answer.details.finish_reason.value in ("length", "eos_token")
    assert "".join(t.text for t in answer.details.tokens if not t.special) == answer.generated_text
    assert answer.details.seed is not None


def test_greedy_is_the_default_and_repeats(client):
    first = client.generate("Count from 1 to 9.", max_new_tokens=12)
    again = client.generate("Count from 1 to 9.", max_new_tokens=12)
    assert first.generated_text == again.generated_text
    assert first.details.seed is None


def test_stream_adds_up(client):
    whole = client.generate("Count from 1 to 9.", max_new_tokens=12, top_n_tokens=3)
    events = list(client.generate_stream("Count from 1 to 9.", max_new_tokens=12, top_n_tokens=3))
    assert "".join(e.token.text for e in events if not e.token.special) == whole.generated_text
    assert events[-1].generated_text == whole.generated_text
    assert events[-1].details.generated_tokens == whole.details.generated_tokens == len(events)
    assert [e.token.id for e in events] == [t.id for t in whole.details.tokens]
    assert all(len(e.top_tokens) == 3 and e.top_tokens[0].id == e.token.id for e in events)
    assert all(e.generated_text is None for e in events[:-1])


def test_parameters(client):
    answer = client.generate(
        "Say hello", max_new_tokens=20, do_sample=True, seed=7, top_k=20, top_p=0.9, typical_p=0.9, temperature=0.7,
        repetition_penalty=1.1, frequency_penalty=0.2, truncate=2, return_full_text=True, decoder_input_details=True,
        stop_sequences=["e"],
    )  # fmt: skip
    assert answer.generated_text.startswith("Say hello")
    assert len(answer.details.prefill) == 2
    assert answer.details.prefill[0].logprob is None
    if answer.details.finish_reason.value == "stop_sequence":
        assert answer.generated_text.endswith("e")
    assert answer.details.seed == 7


def test_best_of(client):
    answer = client.generate("Tell me something", max_new_tokens=8, do_sample=True, best_of=3)
    others = answer.details.best_of_sequences
    assert len(others) == 2
    means = [
        sum(t.logprob for t in s.tokens) / s.generated_tokens for s in [answer.details, *others]
    ]  # fmt: skip
    assert means[0] == max(means)


def test_watermark(client):
    def ids_of(seed, watermark):
        answer = client.generate(
            "Tell me", max_new_tokens=60, do_sample=True, temperature=2.0, seed=seed, watermark=watermark
        )
        return torch.tensor([token.id for token in answer.details.tokens])

    with ThreadPoolExecutor(16) as pool:
        marked = list(pool.map(ids_of, range(16), [True] * 16))
        plain = list(pool.map(ids_of, range(16), [False] * 16))
    shares = [torch.cat([is_green(ids[:-1], ids[1:]) for ids in each]).float().mean() for each in (marked, plain)]
    assert shares[0] > shares[1] + 0.08


def test_grammar(server):
    schema = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 99}}, "required": ["a"]}
    schema["additionalProperties"] = False
    body = {"inputs": "JSON:", "parameters": {"max_new_tokens": 40, "grammar": {"type": "json", "value": schema}}}
    text = server.http.post("/generate", json=body).json()["generated_text"]
    assert set(json.loads(text)) == {"a"}
    body["parameters"]["grammar"] = {"type": "regex", "value": "[a-c]{4}"}
    assert len(server.http.post("/generate", json=body).json()["generated_text"]) == 4


def test_huggingface_hub_client(server, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # the server is on this machine
    hub = InferenceClient(server.url)
    text = hub.text_generation("Count from 1 to 9.", max_new_tokens=12)
    assert text == Client(server.url).generate("Count from 1 to 9.", max_new_tokens=12).generated_text
    detailed = hub.text_generation("Count from 1 to 9.", max_new_tokens=12, details=True)
    assert detailed.details.generated_tokens == len(detailed.details.tokens)
    assert "".join(hub.text_generation("Count from 1 to 9.", max_new_tokens=12, stream=True)).startswith(text[:10])
    chat = hub.chat_completion([{"role": "user", "content": "What is 47 + 38?"}], max_tokens=20, temperature=0)
    assert "85" in chat.choices[0].message.content
    pieces = hub.chat_completion(
        [{"role": "user", "content": "What is 47 + 38?"}], max_tokens=20, temperature=0, stream=True
    )
    assert "85" in "".join(p.choices[0].delta.content or "" for p in pieces if p.choices)


def test_headers_and_info(server):
    answer = server.http.post("/generate", json={"inputs": "Hi", "parameters": {"max_new_tokens": 3}})
    assert int(answer.headers["x-generated-tokens"]) <= 3
    assert int(answer.headers["x-prompt-tokens"]) >= 1
    assert {"x-total-time", "x-queue-time", "x-inference-time", "x-time-per-token", "x-compute-type"} <= set(
        answer.headers
    )
    info = server.http.get("/info").json()
    assert info["model_id"] == "tiny"
    assert info["max_total_tokens"] == 256


def test_root_answers_a_list_or_a_stream(server):
    body = {"inputs": "Hi", "parameters": {"max_new_tokens": 3}}
    assert isinstance(server.http.post("/", json=body).json(), list)
    streamed = server.http.post("/", json={**body, "stream": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"temperature": 0}, "`temperature` must be strictly positive"),
        ({"top_p": 1.5}, "`top_p`"),
        ({"typical_p": 0}, "`typical_p`"),
        ({"top_k": -1}, "`top_k`"),
        ({"max_new_tokens": 0}, "`max_new_tokens`"),
        ({"max_new_tokens": 100000}, "must be <= 256"),
        ({"best_of": 3}, "`best_of`"),
        ({"stop": list("abcde")}, "stop sequences"),
        ({"adapter_id": "other"}, "`adapter_id`"),
        ({"grammar": {"type": "regex", "value": "(["}}, "unclosed"),
        ({"top_n_tokens": 9}, "`top_n_tokens`"),
        ({"max_new_tokens": "many"}, "max_new_tokens"),
    ],
)
def test_validation_errors(server, parameters, said):
    answer = server.http.post("/generate", json={"inputs": "Hi", "parameters": parameters})
    assert answer.status_code == 422
    assert answer.json()["error_type"] == "validation"
    assert said in answer.json()["error"]


def test_the_client_raises_its_own_error(client):
    with pytest.raises(TgiValidationError):
        client.generate("", max_new_tokens=3)


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"parameters": {}}'])
def test_malformed_bodies(server, body):
    answer = server.http.post("/generate", content=body)
    assert answer.status_code == 422
    assert answer.json()["error_type"] == "validation"


def test_the_shape_of_a_stream(server):
    body = {"inputs": "Count", "parameters": {"max_new_tokens": 2, "details": True}}
    answer = server.http.post("/generate_stream", json=body)
    lines = [line for line in answer.text.split("\n\n") if line]
    assert len(lines) == 2 and all(line.startswith('data:{"index":') for line in lines)
    assert json.loads(lines[-1][5:])["details"] == {
        "finish_reason": "length", "generated_tokens": 2, "seed": None, "input_length": 2
    }  # fmt: skip
    assert answer.headers["x-compute-characters"] == "5"
    assert "x-queue-time" not in answer.headers  # not known when a stream starts
    body["parameters"].pop("details")
    last = server.http.post("/generate_stream", json=body).text.split("\n\n")[-2]
    assert json.loads(last[5:])["details"] is None


def test_nulls_are_defaults(server):
    names = ("do_sample", "details", "watermark", "stop", "decoder_input_details", "seed", "grammar", "typical_p")
    parameters = {"max_new_tokens": 2, **dict.fromkeys(names)}
    answer = server.http.post("/generate", json={"inputs": "Count", "parameters": parameters}).raise_for_status()
    assert set(answer.json()) == {"generated_text"}


def test_a_seed_of_64_bits_is_told_as_it_was_given(client):
    seed = 2**63 + 5
    assert client.generate("Count", max_new_tokens=2, do_sample=True, seed=seed).details.seed == seed


@pytest.mark.parametrize(
    ("inputs", "max_new_tokens", "said"),
    [
        ("x " * 400, 5, "`inputs` must have less than 256 tokens. Given: "),
        ("Count", 400, "`inputs` tokens + `max_new_tokens` must be <= 256. Given: 2 `inputs` tokens and 400"),
    ],
)
def test_too_long_in_its_words(server, inputs, max_new_tokens, said):
    body = {"inputs": inputs, "parameters": {"max_new_tokens": max_new_tokens}}
    answer = server.http.post("/generate", json=body)
    assert (answer.status_code, answer.json()["error_type"]) == (422, "validation")
    assert said in answer.json()["error"]


@pytest.mark.parametrize("route", ["/generate", "/generate_stream"])
def test_what_could_not_be_finished_is_a_generation_error(server, route):
    body = {"inputs": "Count", "parameters": {"max_new_tokens": 200}}
    answer = server.http.post(route, json=body, headers={"x-request-timeout": "0.000001"})
    assert (answer.status_code, answer.json()["error_type"]) == (424, "generation")
