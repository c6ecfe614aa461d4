"""Beam search over HTTP: Transformers' outputs for the embedded model, in OpenAI's shapes."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import openai
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoModelForCausalLM

from deployments.service import ModelService

EOS = 2
CHAT = {"messages": [{"role": "user", "content": "What is 2 + 3?"}]}
BEAMS = {"use_beam_search": True, "n": 3, "best_of": 5, "max_tokens": 16}


@pytest.fixture(scope="module")
def client(server: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")


def ask(server: Any, path: str, **body: Any) -> dict[str, Any]:
    answer = server.http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def of_transformers(prompt: list[int], **arguments: Any) -> list[list[int]]:
    """Output tokens, best first, each with the end that it met."""
    model = AutoModelForCausalLM.from_pretrained("configs/tiny", dtype=torch.float32)
    rows = model.generate(torch.tensor([prompt]), do_sample=False, **arguments)[:, len(prompt) :].tolist()
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]


@pytest.mark.parametrize("early_stopping, penalty", [(True, 1.0), (False, 1.0), ("never", 1.0), (False, 1.3)])
def test_completions_are_those_of_transformers(server: Any, early_stopping: bool | str, penalty: float) -> None:
    """Several prompts at once, beside ordinary requests."""
    prompts = [server.service.tokenizer.encode(text) for text in ("2 + 3 =", "The capital of France")]
    arguments: dict[str, Any] = {"length_penalty": 0.5, "early_stopping": early_stopping, "repetition_penalty": penalty}
    told = ask(server, "/v1/completions", prompt=prompts, return_token_ids=True, logprobs=2, **BEAMS, **arguments)
    wanted = [
        tokens
        for prompt in prompts
        for tokens in of_transformers(prompt, num_beams=5, num_return_sequences=3, max_new_tokens=16, **arguments)
    ]
    assert [choice["token_ids"] for choice in told["choices"]] == wanted
    assert [choice["index"] for choice in told["choices"]] == list(range(6))
    assert told["usage"]["completion_tokens"] == sum(map(len, wanted))
    assert told["usage"]["prompt_tokens"] == sum(map(len, prompts))
    for choice, tokens in zip(told["choices"], wanted):
        ended = tokens[-1] == EOS
        assert choice["finish_reason"] == ("stop" if ended else "length") and choice["stop_reason"] is None
        assert choice["text"] == server.service.tokenizer.decode(tokens[:-1] if ended else tokens)
        assert len(choice["logprobs"]["token_logprobs"]) == len(tokens)
        assert all(len(top) == 2 for top in choice["logprobs"]["top_logprobs"])


def test_one_beam_is_greedy(server: Any) -> None:
    body = {"prompt": "2 + 3 =", "max_tokens": 8}
    beam = ask(server, "/v1/completions", use_beam_search=True, **body)
    assert beam["choices"][0]["text"] == ask(server, "/v1/completions", temperature=0, **body)["choices"][0]["text"]


def test_chats_whole_and_streamed(client: openai.OpenAI) -> None:
    """A stream brings every beam at the end, in one piece, and ends as others do."""
    arguments: Any = {"model": "tiny", "n": 4, "max_tokens": 24, **CHAT, "extra_body": {"use_beam_search": True}}
    whole = client.chat.completions.create(**arguments, logprobs=True)
    texts = [choice.message.content for choice in whole.choices]
    assert "2 + 3 = 5" in str(texts[0]) and len(set(texts)) == 4
    sums = [sum(e.logprob for e in c.logprobs.content) / len(c.logprobs.content) for c in whole.choices if c.logprobs]
    assert len(sums) == 4 and sums == sorted(sums, reverse=True), "the best first"
    pieces: dict[int, list[str]] = {}
    reasons, usage = {}, None
    for chunk in client.chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            if choice.delta.content:
                pieces.setdefault(choice.index, []).append(choice.delta.content)
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
    assert [pieces[index] for index in range(4)] == [[text] for text in texts]
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usage and whole.usage and usage.completion_tokens == whole.usage.completion_tokens


def test_stop_tokens_end_beams_and_stop_strings_cut_them(server: Any) -> None:
    body = {"prompt": "Count: 1, 2,", "return_token_ids": True, "length_penalty": 0, **BEAMS}
    plain = ask(server, "/v1/completions", **body, ignore_eos=True)["choices"]
    token = plain[0]["token_ids"][3]
    ended = ask(server, "/v1/completions", **body, ignore_eos=True, stop_token_ids=[token])["choices"]
    assert any(choice["stop_reason"] == token for choice in ended)
    for choice in ended:
        assert token not in choice["token_ids"][:-1]
        assert (choice["token_ids"][-1] == token) == (choice["stop_reason"] == token)
    word = plain[0]["text"][3:5]
    cut = ask(server, "/v1/completions", **body, ignore_eos=True, stop=word)["choices"]
    for before, after in zip(plain, cut):
        head, found, _ = before["text"].partition(word)
        assert after["text"] == head
        assert (after["finish_reason"], after["stop_reason"]) == (
            ("stop", word) if found else (before["finish_reason"], before["stop_reason"])
        )


@pytest.mark.parametrize(
    "given, param",
    [
        ({"response_format": {"type": "json_object"}}, "use_beam_search"),
        ({"guided_regex": "[0-9]+"}, "use_beam_search"),
        ({"logit_bias": {"5": 1}}, "use_beam_search"),
        ({"bad_words": ["x"]}, "use_beam_search"),
        ({"allowed_token_ids": [5]}, "use_beam_search"),
        ({"prompt_logprobs": 1}, "use_beam_search"),
        ({"n": 6}, "best_of"),
        ({"best_of": 129}, "best_of"),
        ({"use_beam_search": "yes"}, "use_beam_search"),
        ({"length_penalty": 11}, "length_penalty"),
        ({"length_penalty": "long"}, "length_penalty"),
        ({"early_stopping": "always"}, "early_stopping"),
    ],
)
@pytest.mark.parametrize("path, body", [("/v1/chat/completions", CHAT), ("/v1/completions", {"prompt": "2 +"})])
def test_what_does_not_go_together(
    server: Any, path: str, body: dict[str, Any], given: dict[str, Any], param: str
) -> None:
    answer = server.http.post(path, json={**body, **BEAMS, **given})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_the_models_own_penalties_are_for_samples(server: Any) -> None:
    """They are nothing that the caller asked for."""
    service: ModelService = server.service
    model = ModelService(
        service.config,
        service.tokenizer,
        vocab_size=service.vocab_size,
        sampling_defaults={"repetition_penalty": 1.1, "temperature": 0.6, "top_k": 20},
    )
    assert model.sampling_params({}).repetition_penalty == 1.1
    assert model.sampling_params({"use_beam_search": True, "n": 4}).beam_width == 4


def test_leaving_ends_the_search(server: Any) -> None:
    before = server.stats()["generated_tokens"]

    async def main() -> None:
        async with httpx.AsyncClient(timeout=200) as client:
            body = {**BEAMS, "best_of": 16, "prompt": "Count:", "ignore_eos": True, "max_tokens": 240}
            request = asyncio.create_task(client.post(f"{server.url}/v1/completions", json=body, timeout=100))
            while server.stats()["generated_tokens"] < before + 32:
                await asyncio.sleep(0)
            request.cancel()
            with pytest.raises(asyncio.CancelledError):
                await request

    with server.steps(20):
        asyncio.run(main())
        server.wait(lambda stats: not stats["unfinished"])
    stats = server.wait_idle()
    assert stats["generated_tokens"] - before <= 16 * 23 and stats["free_blocks"] == stats["num_blocks"]


@pytest.mark.parametrize("asked", [{"use_beam_search": True}, {"temperature": 1.0}], ids=["beams", "samples"])
def test_blocks_saved_by_sharing_are_counted(server: Any, asked: dict[str, Any]) -> None:
    """The whole blocks of the prompt are held once, while the request runs."""
    prompt = [7 + i % 50 for i in range(80)]
    body = {"prompt": prompt, "n": 8, "ignore_eos": True, "max_tokens": 100, **asked}

    async def main() -> float:
        async with httpx.AsyncClient(base_url=server.url, timeout=200) as client:
            with server.steps(30):
                request = asyncio.create_task(client.post("/v1/completions", json=body))
                while (await client.get("/stats")).json()["running"] < 8:
                    assert not request.done()
                metrics = (await client.get("/metrics")).text
            await request
        families = {family.name: family for family in text_string_to_metric_families(metrics)}
        return float(families["manta_blocks_saved"].samples[0].value)

    assert asyncio.run(main()) >= 7 * (80 // 16)
    assert server.wait_idle()["saved_blocks"] == 0
