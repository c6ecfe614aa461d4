"""/tokenize and /detokenize, in vLLM's shape and in TGI's."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


def post(server, path, **body):
    return server.http.post(path, json=body)


def test_text_and_back(server):
    ids = post(server, "/tokenize", prompt="Grüße, 12 🐱!").json()
    assert ids["count"] == len(ids["tokens"])
    assert ids["max_model_len"] == 256
    bare = post(server, "/tokenize", prompt="Grüße, 12 🐱!", add_special_tokens=False).json()["tokens"]
    assert ids["tokens"][-len(bare) :] == bare
    assert post(server, "/detokenize", tokens=bare).json()["prompt"] == "Grüße, 12 🐱!"


def test_long_text_and_back(server):
    """On another thread than short ones."""
    text = "Grüße, 12 🐱! " * 900
    ids = post(server, "/tokenize", prompt=text, add_special_tokens=False, return_token_strs=True).json()
    assert ids["count"] == len(ids["tokens"]) == len(ids["token_strs"]) > 8192
    assert post(server, "/detokenize", tokens=ids["tokens"]).json()["prompt"] == text
    assert [token["id"] for token in post(server, "/tokenize", inputs=text).json()][-100:] == ids["tokens"][-100:]


def test_chat_has_the_tokens_that_are_counted(server):
    messages = [{"role": "user", "content": "Hi"}]
    ids = post(server, "/tokenize", messages=messages, return_token_strs=True).json()
    answer = post(server, "/v1/chat/completions", messages=messages, max_tokens=1).json()
    assert ids["count"] == answer["usage"]["prompt_tokens"] == len(ids["token_strs"])


@settings(max_examples=25, deadline=None)
@given(text=st.text(max_size=40))
def test_tgi_shape_covers_the_text(server, text):
    tokens = post(server, "/tokenize", inputs=text).json()
    covered = [False] * len(text)
    for token in tokens:
        assert set(token) == {"id", "text", "start", "stop"}
        covered[token["start"] : token["stop"]] = [True] * (token["stop"] - token["start"])
    assert all(covered)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/tokenize", {}, 400),
        ("/tokenize", {"prompt": "a", "messages": []}, 400),
        ("/tokenize", {"prompt": 3}, 400),
        ("/tokenize", {"prompt": "a", "model": "none"}, 404),
        ("/detokenize", {"tokens": [99999]}, 400),
        ("/detokenize", {"tokens": "a"}, 400),
    ],
)
def test_errors(server, path, body, status):
    assert post(server, path, **body).status_code == status
