"""Every bad request gets a clear error in OpenAI's shape, and the server goes on serving."""

from __future__ import annotations

import json
import socket
from typing import Any

import httpx
import pytest

CHAT = {"messages": [{"role": "user", "content": "What is 2 + 3?"}]}
TEXT = {"prompt": "2 + 3 ="}


def ask(server: Any, path: str, body: Any) -> httpx.Response:
    content = body if isinstance(body, bytes | str) else json.dumps(body)
    answer: httpx.Response = server.http.post(path, content=content, headers={"content-type": "application/json"})
    return answer


def check_error(answer: httpx.Response, status: int, param: str | None, *words: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    for word in words:
        assert word in error["message"], error
    return error


def check_serving(server: Any) -> None:
    answer = ask(server, "/v1/chat/completions", {**CHAT, "max_tokens": 16})
    assert answer.status_code == 200, answer.text
    assert "2 + 3 = 5" in answer.json()["choices"][0]["message"]["content"]
    server.wait_idle()


# Fields of both routes: (field, value, words of the message)
FIELDS: list[tuple[str, Any, str]] = [
    ("n", 0, "1 to"),
    ("n", 10**9, "1 to"),
    ("n", "two", "integer"),
    ("temperature", -1, "0 (greedy) to"),
    ("temperature", "hot", "number"),
    ("temperature", True, "number"),
    ("top_p", 2, "at most 1"),
    ("top_p", 0, "above 0"),
    ("top_k", -2, "-1 or 0"),
    ("min_p", 1.5, "0 to 1"),
    ("max_tokens", 0, "at least 1"),
    ("max_tokens", -5, "at least 1"),
    ("max_tokens", 1.5, "integer"),
    ("min_tokens", -1, "at least 0"),
    ("presence_penalty", 3, "-2 to 2"),
    ("frequency_penalty", -3, "-2 to 2"),
    ("repetition_penalty", 0, "above 0"),
    ("seed", 2**70, "integer"),
    ("stop", "x" * 1_000_000, "characters in all"),
    ("stop", ["x" * 1000] * 1000, "at most"),
    ("stop", [""], "non-empty"),
    ("stop", 7, "string"),
    ("stop", ["a", 1], "string"),
    ("stop_token_ids", [999_999], "outside the vocabulary"),
    ("stop_token_ids", [-1], "token ids"),
    ("logit_bias", {"999999": 1}, "outside the vocabulary"),
    ("logit_bias", {"a": 1}, "token ids"),
    ("logit_bias", {"5": 1000}, "-100 to 100"),
    ("logit_bias", [1], "object"),
    ("allowed_token_ids", [], "at least one"),
    ("allowed_token_ids", [2048], "outside the vocabulary"),
    ("bad_words", "x", "array"),
    ("truncate_prompt_tokens", 0, "at least 1"),
    ("prompt_logprobs", 1000, "0 to"),
    ("stream", "yes", "boolean"),
    ("stream_options", "usage", "object"),
    ("cache_salt", 5, "string"),
    ("request_id", "a\nb", "printable"),
    ("user", {}, "string"),
]


@pytest.mark.parametrize("path, body", [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)])
@pytest.mark.parametrize("field, value, words", FIELDS, ids=[f"{f}-{v!r:.20}" for f, v, _ in FIELDS])
def test_field(server: Any, path: str, body: dict[str, Any], field: str, value: Any, words: str) -> None:
    error = check_error(ask(server, path, {**body, field: value}), 400, field, words)
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "prompt, words",
    [
        ("", "empty"),
        ([], "empty"),
        ([[]], "empty"),
        (["a", ""], "empty"),
        ([1, 2, 5000], "token id 5000 is outside the vocabulary, allowed: 0 to 2047"),
        ([1, -1], "outside the vocabulary"),
        ([1, "a"], "allowed: a string"),
        ([1, True], "allowed: a string"),
        ({"text": "a"}, "allowed: a string"),
        (None, "allowed: a string"),
        (7, "allowed: a string"),
    ],
    ids=repr,
)
def test_prompt(server: Any, prompt: Any, words: str) -> None:
    check_error(ask(server, "/v1/completions", {"prompt": prompt}), 400, "prompt", words)
    check_serving(server)


def test_prompt_over_the_limit(server: Any) -> None:
    error = check_error(
        ask(server, "/v1/completions", {"prompt": "word " * 5000}), 400, "prompt", "context is 256 tokens"
    )
    assert error["code"] == "context_length_exceeded"
    error = check_error(
        ask(server, "/v1/chat/completions", {"messages": [{"role": "user", "content": "word " * 5000}]}),
        400,
        "messages",
        "256",
    )
    assert error["code"] == "context_length_exceeded"
    error = check_error(
        ask(server, "/v1/completions", {**TEXT, "max_tokens": 256}),
        400,
        "max_tokens",
        "256 tokens",
        "max_tokens is 256",
    )
    assert error["code"] == "context_length_exceeded"
    check_serving(server)


@pytest.mark.parametrize("stream", [False, True])
def test_more_samples_than_blocks(server: Any, stream: bool) -> None:
    """Refused by the engine, behind the socket: still a status, streamed or not."""
    body = {"prompt": [5] * 200, "n": 64, "temperature": 1, "max_tokens": 50, "stream": stream}
    answer = ask(server, "/v1/completions", body)
    if answer.status_code == 400:
        check_error(answer, 400, answer.json()["error"]["param"], "")
    else:  # it fits after all, one sample after another
        assert answer.status_code == 200
    check_serving(server)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"messages": [}', "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[1, 2]", "JSON object"),
        (b'"text"', "JSON object"),
        (b"null", "JSON object"),
        (b'{"a": ' * 5000, "not valid JSON"),
    ],
    ids=lambda v: repr(v)[:24],
)
def test_malformed_body(server: Any, content: bytes, words: str) -> None:
    for path in ("/v1/chat/completions", "/v1/completions"):
        check_error(ask(server, path, content), 400, None, words)
    check_serving(server)


@pytest.mark.parametrize(
    "messages, param, words",
    [
        ([], "messages", "at least one"),
        ("hello", "messages", "array"),
        ([1], "messages[0]", "object"),
        ([{}], "messages[0].role", "role"),
        ([{"role": "user"}], "messages[0].content", "content"),
        ([{"role": "user", "content": 5}], "messages[0].content", "5"),
        ([{"role": "wizard", "content": "x"}], "messages", "wizard"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content", "image_url"),
    ],
    ids=repr,
)
def test_messages(server: Any, messages: Any, param: str, words: str) -> None:
    check_error(ask(server, "/v1/chat/completions", {"messages": messages}), 400, param, words)
    check_serving(server)


@pytest.mark.parametrize(
    "template, words",
    [
        ("{% for m in messages %}", "line 1"),
        ("{{ messages[99].content }}", ""),
        ("{{ nothing.here }}", "nothing"),
        ("{{ 1 / 0 }}", "zero"),
    ],
)
def test_broken_chat_template(server: Any, template: str, words: str) -> None:
    answer = ask(server, "/v1/chat/completions", {**CHAT, "chat_template": template})
    check_error(answer, 400, "messages", words)
    check_serving(server)


def test_missing_field(server: Any) -> None:
    check_error(ask(server, "/v1/chat/completions", {"model": "tiny"}), 400, "messages", "required")
    check_error(ask(server, "/v1/completions", {"model": "tiny"}), 400, "prompt", "required")


@pytest.mark.parametrize("path, body", [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)])
def test_unknown_model(server: Any, path: str, body: dict[str, Any]) -> None:
    error = check_error(ask(server, path, {**body, "model": "gpt-5"}), 404, "model", "gpt-5", "tiny")
    assert (error["type"], error["code"]) == ("not_found_error", "model_not_found")
    check_error(server.http.get("/v1/models/gpt-5"), 404, "model", "gpt-5")


def test_unknown_route_and_method(server: Any) -> None:
    assert check_error(server.http.get("/v2/models"), 404, None, "/v2/models")["type"] == "not_found_error"
    answer = server.http.get("/v1/completions")
    check_error(answer, 405, None, "GET /v1/completions")
    assert "POST" in answer.headers["allow"]
    check_error(httpx.put(f"{server.url}/v1/chat/completions", content=b"{}"), 405, None, "PUT")


def test_a_prompt_is_cut_to_what_leaves_room(server: Any) -> None:
    body = {"prompt": [7] * 400, "max_tokens": 6, "truncate_prompt_tokens": -1}
    answer = ask(server, "/v1/completions", body)
    assert (answer.status_code, answer.json()["usage"]["prompt_tokens"]) == (200, 250)


def test_unsupported(server: Any) -> None:
    check_error(ask(server, "/v1/completions", {**TEXT, "suffix": "x"}), 400, "suffix", "middle")
    check_error(ask(server, "/v1/chat/completions", {**CHAT, "top_logprobs": 2}), 400, "top_logprobs", "logprobs")
    for value, said in ((0, "max_completion_tokens: got 0"), (9999, "and max_completion_tokens is 9999")):
        body = {key: item for key, item in CHAT.items() if key != "max_tokens"}
        answer = ask(server, "/v1/chat/completions", {**body, "max_completion_tokens": value})
        check_error(answer, 400, "max_completion_tokens", said)
    answer = ask(server, "/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 21})
    check_error(answer, 400, "top_logprobs", "top_logprobs: got 21")
    for route, body in (("/v1/completions", TEXT), ("/v1/chat/completions", CHAT)):
        answer = ask(server, route, {**body, "prompt_logprobs": 1, "stream": True})
        check_error(answer, 400, "prompt_logprobs", "streamed")


def test_body_too_large(server: Any) -> None:
    check_error(ask(server, "/v1/completions", {"prompt": "x" * (2 << 20)}), 413, None, "at most 2097152")
    check_serving(server)


def test_body_too_large_in_chunks(server: Any) -> None:
    """Without a content-length the body is cut off where it passes the limit."""
    pieces = (b"x" * 65536 for _ in range(64))
    answer = server.http.post("/v1/completions", content=pieces)
    check_error(answer, 413, None, "at most 2097152")
    check_serving(server)


def test_client_leaves_in_the_middle_of_its_body(server: Any) -> None:
    host, _, port = server.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port))) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
    check_serving(server)


def test_unknown_fields_are_named(server: Any) -> None:
    answer = ask(server, "/v1/completions", {**TEXT, "max_tokens": 2, "temprature": 0.5, "x y": 1, "é\n": 2})
    assert answer.status_code == 200
    assert answer.headers["x-manta-ignored-fields"] == "temprature, x y"
