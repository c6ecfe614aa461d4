"""OpenAI's routes with OpenAI's client, against the embedded model."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest

QUESTION = [{"role": "user", "content": "What is 17 + 25?"}]
ANSWER = "17 + 25 = 42"


@pytest.fixture
def client(server: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_models(server: Any, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "tiny-alias"]
    assert client.models.retrieve("tiny").max_model_len == 256  # type: ignore[attr-defined]
    assert client.models.retrieve("tiny-alias").root == "tiny"  # type: ignore[attr-defined]
    assert server.http.get("/health").json()["state"] == "ready"
    assert server.http.get("/ready").status_code == 200


def test_request_id_is_echoed(server: Any) -> None:
    answer = server.http.get("/v1/models", headers={"x-request-id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    body = {"prompt": "a", "max_tokens": 1}
    answer = server.http.post("/v1/completions", json=body, headers={"x-request-id": "mine-2"})
    assert answer.json()["id"] == "cmpl-mine-2"
    answer = server.http.post("/v1/completions", json={**body, "request_id": "mine-3"})
    assert answer.json()["id"] == "cmpl-mine-3"


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=QUESTION)  # type: ignore[arg-type]
    choice = answer.choices[0]
    assert (choice.message.content, choice.message.role, choice.finish_reason) == (ANSWER, "assistant", "stop")
    assert answer.object == "chat.completion"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    # Content in parts and max_completion_tokens.
    parts = [{"role": "user", "content": [{"type": "text", "text": "What is 17 + 25?"}]}]
    answer = client.chat.completions.create(model="tiny", messages=parts, max_completion_tokens=3)  # type: ignore
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3


def test_chat_streamed_equals_not_streamed(client: openai.OpenAI) -> None:
    with client.chat.completions.create(
        model="tiny",
        messages=QUESTION,  # type: ignore[arg-type]
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == ANSWER
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 11
    assert all(c.usage is None for c in chunks[:-1])
    assert len({c.id for c in chunks}) == 1


def test_continuous_usage(server: Any) -> None:
    body = {"messages": QUESTION, "stream": True, "stream_options": {"continuous_usage_stats": True}}
    events = stream_events(server, "/v1/chat/completions", body)
    counts = [e["usage"]["completion_tokens"] for e in events]
    assert counts == sorted(counts)
    assert counts[-1] == 11


def test_chat_async(server: Any) -> None:
    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:

            async def one(a: int) -> str:
                messages: Any = [{"role": "user", "content": f"What is {a} + 30?"}]
                stream = await client.chat.completions.create(model="tiny", messages=messages, stream=True)
                return "".join([c.choices[0].delta.content or "" async for c in stream])

            return await asyncio.gather(*[one(a) for a in range(11, 43)])

    assert asyncio.run(main()) == [f"{a} + 30 = {a + 30}" for a in range(11, 43)]


def test_chat_samples(client: openai.OpenAI) -> None:
    arguments: dict[str, Any] = {"model": "tiny", "messages": QUESTION, "n": 3, "temperature": 2.0, "seed": 7}
    answer = client.chat.completions.create(**arguments, max_tokens=12)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len(set(texts)) > 1
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**arguments, max_tokens=12, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_samples_where_the_model_is_greedy_by_default(client: openai.OpenAI) -> None:
    """Its generation_config.json says so, and the request says nothing: n answers, all of them the likeliest."""
    answer = client.chat.completions.create(model="tiny", messages=QUESTION, n=3)
    assert [choice.message.content for choice in answer.choices] == [ANSWER] * 3
    texts = {choice.text for choice in client.completions.create(model="tiny", prompt="Count:", n=4).choices}
    assert len(texts) == 1
    drawn = client.completions.create(model="tiny", prompt="Count:", n=4, temperature=1.5, seed=3).choices
    assert len({choice.text for choice in drawn}) > 1


def test_chat_logprobs(client: openai.OpenAI) -> None:
    arguments: dict[str, Any] = {"model": "tiny", "messages": QUESTION, "logprobs": True, "top_logprobs": 2}
    choice = client.chat.completions.create(**arguments).choices[0]
    assert choice.logprobs is not None
    content = choice.logprobs.content or []
    assert "".join(t.token for t in content).startswith(ANSWER)
    assert all(len(t.top_logprobs) == 2 and t.top_logprobs[0].logprob == t.logprob for t in content)
    assert bytes(content[0].bytes or []).decode() == content[0].token
    streamed = [
        token
        for chunk in client.chat.completions.create(**arguments, stream=True)
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content or []
    ]
    assert [t.token for t in streamed] == [t.token for t in content]
    assert [t.logprob for t in streamed] == pytest.approx([t.logprob for t in content], abs=1e-4)


def test_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="Hello", max_tokens=8)
    assert answer.object == "text_completion"
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 8
    text = "".join(
        chunk.choices[0].text
        for chunk in client.completions.create(model="tiny", prompt="Hello", max_tokens=8, stream=True)
    )
    assert text == answer.choices[0].text


def test_completion_of_many_prompts(server: Any, client: openai.OpenAI) -> None:
    """Prompts as texts and as token ids; choices by prompt, then by sample; streamed or not."""
    tokenizer = server.service.tokenizer
    texts = ["One two", "Three four", "What is"]
    ids = [tokenizer.encode(text) for text in texts]
    alone = [client.completions.create(model="tiny", prompt=t, max_tokens=6).choices[0].text for t in texts]
    for prompts in (texts, ids):
        answer = client.completions.create(model="tiny", prompt=prompts, max_tokens=6)  # type: ignore[call-overload]
        assert [choice.text for choice in answer.choices] == alone
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert answer.usage.prompt_tokens == sum(map(len, ids))
        streamed = ["", "", ""]
        for chunk in client.completions.create(model="tiny", prompt=prompts, max_tokens=6, stream=True):  # type: ignore
            streamed[chunk.choices[0].index] += chunk.choices[0].text
        assert streamed == alone
    one = client.completions.create(model="tiny", prompt=ids[0], max_tokens=6)  # one prompt of ids
    assert [choice.text for choice in one.choices] == alone[:1]
    both = client.completions.create(model="tiny", prompt=texts[:2], n=2, temperature=1.0, max_tokens=3, seed=1)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]


def test_completion_echo_and_logprobs(server: Any, client: openai.OpenAI) -> None:
    """What a log-likelihood needs: the prompt's own log-probabilities, and nothing drawn."""
    ids = server.service.tokenizer.encode("What is 2 + 3?")
    answer = client.completions.create(model="tiny", prompt=ids, max_tokens=0, echo=True, logprobs=1)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert answer.usage is not None
    assert (len(logprobs.token_logprobs), answer.usage.completion_tokens) == (len(ids), 0)
    assert answer.choices[0].finish_reason == "length"
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    text = answer.choices[0].text
    assert logprobs.text_offset is not None
    assert logprobs.tokens is not None
    for token, offset in zip(logprobs.tokens, logprobs.text_offset):
        assert text[offset : offset + len(token)] == token
    more: dict[str, Any] = {"max_tokens": 4, "echo": True, "extra_body": {"ignore_eos": True}}
    longer = client.completions.create(model="tiny", prompt=ids, logprobs=0, **more)
    assert longer.choices[0].text.startswith(text)
    assert longer.choices[0].logprobs is not None
    assert len(longer.choices[0].logprobs.tokens or []) == len(ids) + 4
    streamed = client.completions.create(model="tiny", prompt=ids, stream=True, **more)
    assert "".join(chunk.choices[0].text for chunk in streamed) == longer.choices[0].text


def test_stop_strings_never_leak(client: openai.OpenAI) -> None:
    arguments: dict[str, Any] = {"model": "tiny", "messages": QUESTION, "stop": [" = 4", "nothing"]}
    answer = client.chat.completions.create(**arguments).choices[0]
    assert (answer.message.content, answer.finish_reason) == ("17 + 25", "stop")
    assert answer.stop_reason == " = 4"  # type: ignore[attr-defined]
    pieces = [c.choices[0].delta.content or "" for c in client.chat.completions.create(**arguments, stream=True)]
    assert "".join(pieces) == "17 + 25"
    kept = client.chat.completions.create(**arguments, extra_body={"include_stop_str_in_output": True})
    assert kept.choices[0].message.content == "17 + 25 = 4"


def test_token_ids_are_returned(server: Any) -> None:
    body = {"messages": QUESTION, "return_token_ids": True}
    answer = server.http.post("/v1/chat/completions", json=body).json()
    assert server.service.tokenizer.decode(answer["choices"][0]["token_ids"]) == ANSWER
    events = stream_events(server, "/v1/chat/completions", {**body, "stream": True})
    assert events[0]["prompt_token_ids"] == answer["prompt_token_ids"]
    assert [i for e in events for i in e["choices"][0].get("token_ids", [])] == answer["choices"][0]["token_ids"]


def test_cached_tokens_are_told(client: openai.OpenAI) -> None:
    arguments: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "count " * 20}],
        "max_tokens": 2,
        "extra_body": {"cache_salt": "a salt"},
    }
    cached = []
    for _ in range(2):
        usage = client.chat.completions.create(**arguments).usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        cached.append(usage.prompt_tokens_details.cached_tokens)
    assert cached[0] == 0
    assert cached[1] is not None
    assert cached[1] >= 16


def stream_events(server: Any, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a stream, parsed, without [DONE]."""
    with httpx.stream("POST", f"{server.url}{path}", json=body, timeout=200) as answer:
        assert answer.status_code == 200
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]
