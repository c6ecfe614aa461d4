"""A field that nobody knows is ignored, and named in the answer's header, on every route that takes a body."""

from __future__ import annotations

from typing import Any

import pytest

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Hi", "max_tokens": 1},
    "/v1/chat/completions": {**CHAT, "max_tokens": 1},
    "/v1/embeddings": {"input": "Hi"},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 1},
    "/v1/messages": {**CHAT, "model": "tiny", "max_tokens": 1},
    "/v1/messages/count_tokens": {**CHAT, "model": "tiny"},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [5]},
    "/generate": {"inputs": "Hi", "parameters": {"max_new_tokens": 1}},
    "/": {"inputs": "Hi", "parameters": {"max_new_tokens": 1}},
}


@pytest.mark.parametrize("route", BODIES)
def test_an_unknown_field_is_named(server: Any, route: str) -> None:
    answer = server.http.post(route, json=BODIES[route]).raise_for_status()
    assert "x-manta-ignored-fields" not in answer.headers
    answer = server.http.post(route, json={**BODIES[route], "temprature": 1}).raise_for_status()
    assert answer.headers["x-manta-ignored-fields"] == "temprature"


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/messages", "/v1/responses", "/generate_stream"])
def test_streams_name_it_too(server: Any, route: str) -> None:
    body = BODIES.get(route) or BODIES["/generate"]
    more = {} if route == "/generate_stream" else {"stream": True}
    with server.http.stream("POST", route, json={**body, **more, "sead": 1}) as answer:
        assert answer.headers["x-manta-ignored-fields"] == "sead"
        answer.read()


@pytest.mark.parametrize(
    "route, changes, named",
    [
        ("/generate", {"parameters": {"max_new_tokens": 1, "top_q": 1}}, "parameters.top_q"),
        ("/v1/completions", {"stream_options": {"usage": True}}, "stream_options.usage"),
        (
            "/v1/messages",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": {}}] * 2}]},
            "messages[].content[].cache_control",
        ),
    ],
)
def test_the_path_of_an_inner_field_is_told(server: Any, route: str, changes: dict[str, Any], named: str) -> None:
    answer = server.http.post(route, json={**BODIES[route], **changes}).raise_for_status()
    assert answer.headers["x-manta-ignored-fields"] == named
