"""Whatever a client sends, it gets an answer or an error that is its own fault, and the server goes on."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from deployments.http.anthropic_types import CountRequest, MessagesRequest
from deployments.http.openai_types import ChatCompletionRequest, CompletionRequest
from deployments.http.responses_types import ResponsesRequest
from deployments.http.tgi_types import Parameters
from deployments.http.tokenization import DetokenizeRequest, TokenizeRequest

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
    answer = server.http.post(path, content=body, headers=headers)
    late = {504} if b'"timeout"' in body else set()
    assert answer.status_code in {200, 400, 404, 413} | late, (answer.status_code, answer.text, body)
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


OTHERS: list[tuple[str, Any, dict[str, Any]]] = [
    ("/v1/messages", MessagesRequest, {**CHAT, "model": "tiny"}),
    ("/v1/messages/count_tokens", CountRequest, {**CHAT, "model": "tiny"}),
    ("/v1/responses", ResponsesRequest, {"input": "Hi", "max_output_tokens": 2}),
    ("/tokenize", TokenizeRequest, {"prompt": "Hi"}),
    ("/detokenize", DetokenizeRequest, {"tokens": [5]}),
]
"""Routes of other dialects: path, type of the body, a body that works."""
TGI = ("/", "/generate", "/generate_stream")
CLIENT_ERRORS = (400, 404, 405, 413, 422)

fuzz = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))


@fuzz
@given(extra=fields(ChatCompletionRequest), messages=st.lists(message, max_size=3) | values, stream=st.booleans())
@example(extra={"chat_template_kwargs": {"messages": 1}}, messages=CHAT["messages"], stream=False)
@example(extra={"chat_template_kwargs": {"tools": 5}}, messages=CHAT["messages"], stream=False)
@example(extra={"chat_template_kwargs": {"self": 5, "params": 1}}, messages=CHAT["messages"], stream=False)
@example(extra={}, messages=[{"role": "assistant", "content": "x", "tool_calls": 5}], stream=False)
@example(extra={"use_beam_search": True, "best_of": 128}, messages=CHAT["messages"], stream=True)
@example(extra={"use_beam_search": True, "length_penalty": -10}, messages=CHAT["messages"], stream=False)
def test_chat(server: Any, extra: dict[str, Any], messages: Any, stream: bool) -> None:
    body = {**CHAT, **extra, "messages": messages, "stream": stream}
    check(server, "/v1/chat/completions", json.dumps(body).encode())


@fuzz
@given(extra=fields(CompletionRequest), prompt=st.just("Hi") | values, stream=st.booleans())
def test_completion(server: Any, extra: dict[str, Any], prompt: Any, stream: bool) -> None:
    body = {**TEXT, **extra, "prompt": prompt, "stream": stream}
    check(server, "/v1/completions", json.dumps(body).encode())


def check_other(server: Any, path: str, body: bytes) -> None:
    answer = server.http.post(path, content=body)
    assert answer.status_code == 200 or answer.status_code in CLIENT_ERRORS, (path, answer.status_code, answer.text)
    if answer.status_code != 200:
        assert answer.json()["error"]


@fuzz
@given(data=st.data(), which=st.sampled_from(OTHERS), stream=st.booleans())
def test_other_dialects(server: Any, data: st.DataObject, which: Any, stream: bool) -> None:
    path, kind, base = which
    names = st.sampled_from(sorted(set(kind.model_fields) - {"stream", "max_tokens", "max_output_tokens"}))
    extra = data.draw(st.dictionaries(names, values | st.lists(message, max_size=2), max_size=3))
    streamed = {"stream": stream} if "stream" in kind.model_fields else {}
    check_other(server, path, json.dumps({**base, **streamed, **extra}).encode())


@fuzz
@given(data=st.data(), path=st.sampled_from(TGI), inputs=st.just("Hi") | values)
def test_tgi(server: Any, data: st.DataObject, path: str, inputs: Any) -> None:
    names = sorted(set(Parameters.model_fields) - {"max_new_tokens"})
    parameters = data.draw(st.dictionaries(st.sampled_from(names), values, max_size=3))
    body = {"inputs": inputs, "parameters": {"max_new_tokens": 2, **parameters}, "stream": data.draw(st.booleans())}
    check_other(server, path, json.dumps(body).encode())


@fuzz
@given(body=st.binary(max_size=200))
def test_bytes_to_other_dialects(server: Any, body: bytes) -> None:
    for path in (*TGI, *(path for path, _, _ in OTHERS)):
        check_other(server, path, body)


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
    stats = server.wait_idle()
    assert stats["free_blocks"] == stats["num_blocks"]
