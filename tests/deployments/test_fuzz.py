"""Whatever a client sends, it gets an answer or an error that is its own fault, and the server goes on."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from deployments.http.openai_types import ChatCompletionRequest, CompletionRequest

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
TEXT = {"prompt": "Hi", "max_tokens": 2}

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, 2, -1, 16, 2**31, 2**63, -(2**63), 1e308, 0.5]),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)
part = st.fixed_dictionaries({}, optional={"type": st.sampled_from(["text", "image_url"]), "text": values})
message = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "system", "tool"]) | values,
        "content": st.text(max_size=20) | st.lists(part, max_size=3) | values,
        "name": values,
        "tool_calls": values,
    },
)


def fields(kind: Any) -> st.SearchStrategy[dict[str, Any]]:
    names = sorted(set(kind.model_fields) - {"messages", "prompt", "stream"})
    return st.dictionaries(st.sampled_from(names), values, max_size=3)


def check(server: Any, path: str, body: bytes, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    answer = server.http.post(path, content=body, headers=headers, timeout=60)
    assert answer.status_code in (200, 400, 404, 413), (answer.status_code, answer.text, body)
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


fuzz = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))


@fuzz
@given(extra=fields(ChatCompletionRequest), messages=st.lists(message, max_size=3) | values, stream=st.booleans())
@example(extra={"chat_template_kwargs": {"messages": 1}}, messages=CHAT["messages"], stream=False)
@example(extra={"chat_template_kwargs": {"tools": 5}}, messages=CHAT["messages"], stream=False)
@example(extra={"chat_template_kwargs": {"self": 5, "params": 1}}, messages=CHAT["messages"], stream=False)
@example(extra={}, messages=[{"role": "assistant", "content": "x", "tool_calls": 5}], stream=False)
def test_chat(server: Any, extra: dict[str, Any], messages: Any, stream: bool) -> None:
    body = {**CHAT, **extra, "messages": messages, "stream": stream}
    check(server, "/v1/chat/completions", json.dumps(body).encode())


@fuzz
@given(extra=fields(CompletionRequest), prompt=st.just("Hi") | values, stream=st.booleans())
def test_completion(server: Any, extra: dict[str, Any], prompt: Any, stream: bool) -> None:
    body = {**TEXT, **extra, "prompt": prompt, "stream": stream}
    check(server, "/v1/completions", json.dumps(body).encode())


@fuzz
@given(body=st.binary(max_size=200))
def test_bytes(server: Any, body: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/completions"):
        check(server, path, body)


@fuzz
@given(
    name=st.text("abcdefghijklmnopqrstuvwxyz-", min_size=1, max_size=20),
    value=st.text(st.characters(codec="latin-1", min_codepoint=33, exclude_categories=["Cc"]), max_size=300),
)
def test_headers(server: Any, name: str, value: str) -> None:
    if name in ("content-length", "transfer-encoding", "connection", "expect", "host", "upgrade"):
        return
    sent = [(name.encode(), value.encode("latin-1")), (b"x-request-id", value.encode("latin-1"))]
    check(server, "/v1/completions", json.dumps(TEXT).encode(), sent)


def test_nothing_is_left(server: Any) -> None:
    stats = server.wait_idle(30)
    assert stats["free_blocks"] == stats["num_blocks"]
