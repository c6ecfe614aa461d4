"""The pages' files, the engine's picture and the metrics, over real HTTP."""

from __future__ import annotations

import base64
import concurrent.futures

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html"),
        ("/engine", "text/html"),
        ("/docs", "text/html"),
        ("/web/docs.js", "javascript"),
        ("/web/style.css", "text/css"),
        ("/web/chat.js", "javascript"),
        ("/web/markdown.js", "javascript"),
        ("/web/engine.js", "javascript"),
    ],
)
def test_files(server, path, kind):
    answer = server.http.get(path)
    assert answer.status_code == 200
    assert kind in answer.headers["content-type"]
    assert "default-src 'self'" in answer.headers["content-security-policy"]


@pytest.mark.parametrize("path", ["/web/nothing.js", "/web/..%2fapp.py", "/web/%2e%2e/app.py", "/web/"])
def test_no_other_files(server, path):
    assert server.http.get(path).status_code == 404


def test_picture_while_busy_and_idle(server):
    body = {"prompt": "Count from 1 to 90. " * 6, "max_tokens": 150, "ignore_eos": True, "n": 3, "temperature": 1}
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        with server.steps(0):
            answers = [pool.submit(httpx.post, f"{server.url}/v1/completions", json=body, timeout=200) for _ in "1234"]
            server.wait(lambda stats: stats["running"] + stats["waiting"] >= 4)
            server.executor.allow(40)
            server.wait(lambda stats: stats["running"] >= 12 and stats["saved_blocks"])
            busy = server.http.get("/engine/state").json()
        assert all(a.result().status_code == 200 for a in answers)
    assert busy["running"] >= 3
    states = np.frombuffer(base64.b64decode(busy["blocks"]["state"]), np.uint8)
    owners = np.frombuffer(base64.b64decode(busy["blocks"]["owner"]), "<i2")
    assert len(states) == len(owners) == busy["blocks"]["total"]
    assert (states >= 2).sum() == busy["blocks"]["used"]
    assert (states == 3).sum() == busy["blocks"]["shared"] > 0
    assert (states == 1).sum() == busy["blocks"]["cached"]
    assert owners.max() == len(busy["requests"]) - 1
    assert busy["requests"][0]["sequences"] == 3
    server.wait_idle()
    picture = server.http.get("/engine/state").json()
    assert picture["requests"] == []
    assert picture["blocks"]["used"] == 0
    assert picture["counters"]["generated_tokens"] >= 4 * 3 * 150


def test_metrics_parse(server):
    body = {"prompt": "Hi", "max_tokens": 4, "guided_regex": "[0-9]{2}"}
    server.http.post("/v1/completions", json=body).raise_for_status()
    families = {f.name: f for f in text_string_to_metric_families(server.http.get("/metrics").text)}
    assert families["manta_generated_tokens"].type == "counter"
    assert families["manta_time_to_first_token_seconds"].type == "histogram"
    for name in ("manta_time_to_first_token_seconds", "manta_mask_seconds"):
        counts = {s.name: s.value for s in families[name].samples if "bucket" not in s.name}
        assert counts[f"{name}_count"] >= 1
    assert families["manta_blocks_total"].samples[0].labels == {"model": "tiny"}


def test_version(server):
    assert server.http.get("/version").json()["version"]


def test_openapi_names_every_route_and_field(server):
    api = server.http.get("/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/messages", "/v1/responses", "/generate", "/tokenize", "/health"} <= set(
        api["paths"]
    )
    for path, methods in api["paths"].items():
        for method, operation in methods.items():
            assert operation["summary"], f"{method} {path} has no docstring"
    chat = api["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    assert {"messages", "tools", "response_format", "top_k", "guided_json", "use_beam_search"} <= set(chat)


def test_openapi_tells_the_ranges_that_hold(server):
    api = server.http.get("/openapi.json").json()["components"]["schemas"]
    text, chat = api["CompletionRequest"]["properties"], api["ChatCompletionRequest"]["properties"]
    told = {}
    for name, field in text.items():
        for kind in field.get("anyOf", []):
            if bounds := {key: kind[key] for key in kind if "inimum" in key or "aximum" in key}:
                told[name] = bounds
    assert set(told) >= {"n", "best_of", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "logprobs"}
    assert told["temperature"] == {"minimum": 0, "maximum": 100}
    for name, bounds in told.items():
        wrong = [bounds[key] + step for key, step in (("minimum", -1), ("maximum", 1)) if key in bounds]
        wrong += [bounds["exclusiveMinimum"]] if "exclusiveMinimum" in bounds else []
        right = [bounds[key] for key in ("minimum", "maximum") if key in bounds and abs(bounds[key]) <= 20]
        for value in wrong + right:
            body = {"prompt": "Hi", "max_tokens": 1, "echo": name == "max_tokens", name: value}
            answer = server.http.post("/v1/completions", json=body)
            assert answer.status_code == (400 if value in wrong else 200), (name, value, answer.text)
            assert value in right or answer.json()["error"]["param"] == name
    assert chat["max_completion_tokens"]["anyOf"][0]["minimum"] == 1
    assert chat["top_logprobs"]["anyOf"][0] == {"type": "integer", "minimum": 0, "maximum": 20}
    assert "minimum" not in str(chat["logprobs"]), "true or false"
