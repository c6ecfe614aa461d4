"""/v1/embeddings with OpenAI's client, against the embedded model."""

from __future__ import annotations

import base64
from typing import Any

import httpx
import numpy as np
import openai
import pytest

TEXTS = ["Hello there", "What is 17 + 25?", "The capital of France"]


@pytest.fixture
def client(server: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def post(server: Any, **body: Any) -> httpx.Response:
    answer: httpx.Response = server.http.post("/v1/embeddings", json={"model": "tiny", **body})
    return answer


def vectors_of(answer: httpx.Response) -> Any:
    return np.array([item["embedding"] for item in answer.raise_for_status().json()["data"]], np.float32)


def test_the_client_gets_unit_vectors_in_order(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model="tiny", input=TEXTS)  # asks for base64
    assert [item.index for item in answer.data] == [0, 1, 2]
    assert (answer.object, answer.model, answer.data[0].object) == ("list", "tiny", "embedding")
    vectors = np.array([item.embedding for item in answer.data])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    for text, vector in zip(TEXTS, vectors):
        (alone,) = client.embeddings.create(model="tiny", input=text, encoding_format="float").data
        np.testing.assert_allclose(alone.embedding, vector, atol=1e-5)


def test_every_form_of_input_gives_the_same(server: Any) -> None:
    ids = [server.http.post("/tokenize", json={"prompt": text}).json()["tokens"] for text in TEXTS]
    whole = vectors_of(post(server, input=TEXTS))
    np.testing.assert_allclose(vectors_of(post(server, input=ids)), whole, atol=1e-5)
    np.testing.assert_allclose(vectors_of(post(server, input=ids[1])), whole[1:2], atol=1e-5)
    answer = post(server, input=ids).json()
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] == sum(map(len, ids))


def test_base64_is_little_endian_float32(server: Any) -> None:
    (item,) = post(server, input=TEXTS[0], encoding_format="base64").json()["data"]
    spelled = np.frombuffer(base64.b64decode(item["embedding"]), "<f4")
    np.testing.assert_allclose(spelled, vectors_of(post(server, input=TEXTS[0]))[0], atol=1e-6)


def test_dimensions_cut_and_renormalise(server: Any) -> None:
    whole, cut = vectors_of(post(server, input=TEXTS)), vectors_of(post(server, input=TEXTS, dimensions=16))
    assert cut.shape == (3, 16)
    np.testing.assert_allclose(cut, whole[:, :16] / np.linalg.norm(whole[:, :16], axis=1, keepdims=True), atol=1e-5)


def test_a_request_may_choose_its_pooling(server: Any) -> None:
    default, last, mean = (
        vectors_of(post(server, input=TEXTS, **more)) for more in ({}, {"pooling": "last"}, {"pooling": "mean"})
    )
    np.testing.assert_allclose(default, last, atol=1e-6)
    assert np.abs(mean - last).max() > 0.01
    (token,) = server.http.post("/tokenize", json={"prompt": "a", "add_special_tokens": False}).json()["tokens"]
    one = [vectors_of(post(server, input=[token], pooling=pooling)) for pooling in ("mean", "last")]
    np.testing.assert_allclose(*one, atol=1e-6)


def test_a_long_list_runs_in_turns_and_leaves_nothing(server: Any) -> None:
    inputs = [[5 + number % 50, 9] for number in range(600)]
    vectors = vectors_of(post(server, input=inputs))
    np.testing.assert_allclose(vectors[50:], vectors[:-50], atol=1e-5)
    assert server.wait_idle()["unfinished"] == 0


def test_a_text_may_fill_the_context(server: Any) -> None:
    assert vectors_of(post(server, input=[7] * 256, pooling="mean")).shape[0] == 1
    answer = post(server, input=[7] * 257)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "input"
    assert post(server, input=[7] * 300, truncate_prompt_tokens=20).json()["usage"]["prompt_tokens"] == 20
    assert post(server, input=[7] * 300, truncate_prompt_tokens=-1).json()["usage"]["prompt_tokens"] == 256


@pytest.mark.parametrize(
    "body, param",
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": {"text": "a"}}, "input"),
        ({"input": [[5], [99999999]]}, "input"),
        ({"input": [[5]] * 2049}, "input"),
        ({}, "input"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "dimensions": 100000}, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "pooling": "max"}, "pooling"),
        ({"input": "a", "model": "other"}, "model"),
    ],
)
def test_what_is_wrong_is_named(server: Any, body: dict[str, Any], param: str) -> None:
    answer = post(server, **body)
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == param
