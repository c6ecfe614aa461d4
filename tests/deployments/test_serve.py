"""The embedded model as a person serves it: run.sh's launcher, Ray Serve behind HAProxy, clients of every kind."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import yaml

from deployments.config import REPOSITORY
from tests.served import PATIENCE_S, STOP_S, Served, serve_tiny

pytestmark = pytest.mark.serve

QUESTION: Any = [{"role": "user", "content": "What is 17 + 25?"}]
ANSWER = "17 + 25 = 42"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serve_tiny() as served:
        yield served


@pytest.fixture
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def readme(language: str, word: str) -> str:
    """README's code block of a language that holds a word."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    (block,) = [b for b in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL) if word in b]
    return block


def test_readme_curl(served: Served) -> None:
    command = readme("bash", "curl").replace("http://127.0.0.1:8000", served.url)
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr, served.output)
    assert yaml.safe_load(done.stdout)["choices"][0]["message"]["content"] == ANSWER


def test_readme_openai(served: Served) -> None:
    done = served.python(readme("python", "import OpenAI").replace("http://127.0.0.1:8000", served.url))
    assert done.returncode == 0, done.stderr
    assert done.stdout == ANSWER + "\n"


def test_readme_handle(served: Served) -> None:
    """From another Ray job: text, pieces of text, a prompt that is no chat."""
    done = served.python(readme("python", "get_app_handle"))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == [ANSWER, ANSWER]
    assert len(lines) >= 3


def test_printed_lines(served: Served) -> None:
    """What the launcher says to try does work."""
    printed = [line.strip() for line in served.output]
    for line in [line for line in printed if line.startswith("curl ") or " -c " in line]:
        done = subprocess.run(
            ["bash", "-c", line], env=served.environment, cwd=REPOSITORY, capture_output=True, text=True, check=False
        )
        assert ANSWER in done.stdout, (line, done.stdout, done.stderr)


HANDLES = """
import asyncio, os, signal
from ray import serve
from engine.errors import PromptTooLong, RequestError

handle = serve.get_app_handle("tiny")
chat = [{"role": "user", "content": "What is 17 + 25?"}]

# Sampling parameters are keyword arguments; n samples are a list.
texts = handle.remote(chat, n=3, temperature=1.5, seed=3, max_tokens=8).result()
assert len(texts) == 3 and texts == handle.remote(chat, n=3, temperature=1.5, seed=3, max_tokens=8).result()
assert handle.remote(chat, stop=[" ="]).result() == "17 + 25"
assert handle.remote([1, 20, 30], max_tokens=2, ignore_eos=True).result() is not None
beams = handle.remote(chat, use_beam_search=True, n=3, max_tokens=16).result()
assert beams[0] == "17 + 25 = 42" and len(set(beams)) == 3, beams
assert list(handle.options(stream=True).remote(chat, use_beam_search=True, best_of=3, max_tokens=16)) == beams[:1]

# Pieces, by either name.
pieces = list(handle.options(stream=True).remote(chat))
assert "".join(pieces) == "17 + 25 = 42" and len(pieces) > 1, pieces
assert list(handle.options(stream=True, method_name="stream").remote(chat))
one, many = handle.embed.remote("Hello").result(), handle.embed.remote(["Hello", "Bye"], dimensions=8).result()
assert len(one) > 8 and [len(vector) for vector in many] == [8, 8]
assert abs(sum(x * x for x in one) - 1) < 1e-4

# Errors are ours.
for prompt, params, kind in [
    ("", {}, RequestError),
    ("x " * 9000, {}, PromptTooLong),
    (chat, {"temperature": -1}, RequestError),
    (chat, {"temprature": 1}, RequestError),
    (5, {}, RequestError),
    ([{"role": "wizard", "content": ""}], {}, RequestError),
]:
    try:
        handle.remote(prompt, **params).result()
    except kind as error:
        print(type(error).__name__, error)
    else:
        raise AssertionError((prompt, params))

# A cancelled response aborts its request, streamed or not; the driver waits until it is cancelled.
long = {"n": 8, "temperature": 1.0, "ignore_eos": True, "max_tokens": 1900}
response = handle.remote("Count:", **long)
stream = handle.options(stream=True).remote("Count:", **{**long, "n": 1})
next(iter(stream))
os.kill(int(os.environ["DRIVER_PID"]), signal.SIGSTOP)
response.cancel()
stream.cancel()
os.kill(int(os.environ["DRIVER_PID"]), signal.SIGCONT)

async def main():
    assert await handle.remote(chat) == "17 + 25 = 42"
    return "".join([piece async for piece in handle.options(stream=True).remote(chat)])

assert asyncio.run(main()) == "17 + 25 = 42"
print("fine")
"""


def test_handles(served: Served) -> None:
    before = served.wait_idle()["generated_tokens"]
    done = served.python(HANDLES, DRIVER_PID=str(served.driver().pid))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "fine"
    assert served.wait_idle()["generated_tokens"] - before < 8 * 1900


def test_openai_client(served: Served, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    arguments: dict[str, Any] = {"model": "tiny", "messages": QUESTION}
    assert client.chat.completions.create(**arguments).choices[0].message.content == ANSWER
    pieces = [c.choices[0].delta.content or "" for c in client.chat.completions.create(**arguments, stream=True)]
    assert "".join(pieces) == ANSWER
    assert len(pieces) > 3

    async def main() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
            answers = await asyncio.gather(*[client.chat.completions.create(**arguments) for _ in range(32)])
        return [answer.choices[0].message.content for answer in answers]

    assert asyncio.run(main()) == [ANSWER] * 32
    served.wait_idle()


def test_one_request_id(served: Served) -> None:
    """Serve has one of its own: the client's wins, and is sent once."""
    answer = served.get("/v1/models", headers={"x-request-id": "mine"})
    assert answer.headers.get_list("x-request-id") == ["mine"]
    answer = served.post("/v1/completions", {"prompt": "a", "max_tokens": 1})
    assert answer.json()["id"] == f"cmpl-{answer.headers['x-request-id']}"


BAD: list[tuple[str, str, Any, int]] = [
    ("POST", "/v1/chat/completions", b"{", 400),
    ("POST", "/v1/chat/completions", {"messages": "x"}, 400),
    ("POST", "/v1/completions", {"prompt": ""}, 400),
    ("POST", "/v1/completions", {"prompt": "x " * 9000}, 400),
    ("POST", "/v1/completions", {"prompt": "x", "model": "other"}, 404),
    ("POST", "/v1/completions", {"prompt": "x", "n": 0}, 400),
    ("POST", "/v1/completions", {"prompt": "x", "temperature": -1}, 400),
    ("POST", "/v1/completions", {"prompt": "x", "top_p": 2}, 400),
    ("POST", "/v1/completions", {"prompt": "x", "max_tokens": 0}, 400),
    ("POST", "/v1/completions", {"prompt": [999_999]}, 400),
    ("POST", "/v1/completions", {"prompt": "x", "stop": "y" * 1_000_000}, 400),
    ("POST", "/v1/chat/completions", {"messages": QUESTION, "chat_template": "{% if %}"}, 400),
    ("POST", "/v1/completions", b"x" * (17 << 20), 413),
    ("GET", "/nothing", None, 404),
    ("GET", "/v1/completions", None, 405),
]


@pytest.mark.parametrize("method, path, body, status", BAD, ids=lambda v: repr(v)[:32])
def test_bad_requests(served: Served, method: str, path: str, body: Any, status: int) -> None:
    content: dict[str, Any] = {"content": body} if isinstance(body, bytes) else {"json": body} if body else {}
    answer = httpx.request(method, f"{served.url}{path}", timeout=PATIENCE_S, **content)
    assert answer.status_code == status, answer.text[:300]
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    answer = served.post("/v1/chat/completions", {"messages": QUESTION})
    assert answer.json()["choices"][0]["message"]["content"] == ANSWER


def test_leaving_frees_blocks(served: Served) -> None:
    """Through HAProxy: in the middle of a stream, and before an answer."""
    body = {"prompt": "Count:", "n": 4, "temperature": 1.0, "ignore_eos": True, "max_tokens": 1900}
    before = served.wait_idle()["generated_tokens"]
    with served.stream("/v1/completions", body) as answer:
        lines = answer.iter_lines()
        for _ in range(10):
            next(lines)
    served.wait_idle()

    async def leave() -> None:
        async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
            whole = asyncio.ensure_future(client.post(f"{served.url}/v1/completions", json=body))
            while (await client.get(f"{served.url}/stats")).json()["running"] < 4:
                assert not whole.done()
            whole.cancel()

    asyncio.run(leave())
    stats = served.wait_idle()
    assert stats["generated_tokens"] - before < 4 * 1900
    assert stats["free_blocks"] == stats["num_blocks"]


def test_a_killed_driver(served: Served) -> None:
    """In the middle of a stream: another driver goes on, and the text is what it would have been."""
    body = {"prompt": "Count:", "temperature": 1.0, "seed": 5, "ignore_eos": True, "max_tokens": 800}
    before = served.driver()

    def text(kill_after: int | None) -> str:
        pieces = []
        with served.stream("/v1/completions", body) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    pieces.append(yaml.safe_load(line[6:])["choices"][0]["text"])
                if len(pieces) == kill_after:
                    kill_after = None
                    before.kill()
                if line == "data: [DONE]":
                    return "".join(pieces)
        raise AssertionError(f"the stream ended after {len(pieces)} events")

    undisturbed = text(None)
    assert text(40) == undisturbed
    assert served.driver() != before
    assert served.wait_idle()["generated_tokens"] > 0, "the other driver drew some of them"


def test_64_streams(served: Served) -> None:
    """A short form of `python -m scripts.soak --minutes 1`."""
    command = [sys.executable, "-m", "scripts.soak", "--url", served.url, "--streams", "64", "--minutes", "0.15"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^errors +0$", done.stdout, re.MULTILINE)
    assert re.search(r"^blocks leaked +0$", done.stdout, re.MULTILINE)


def test_an_engine_that_cannot_come_back(served: Served) -> None:
    """Its weights are gone: red, requests are told when to come back, the log says it once; and when they are back…"""
    folder = Path(served.environment["RAY_TMPDIR"])
    weights, body = folder / "model/model.safetensors", {"prompt": "Count:", "ignore_eos": True, "max_tokens": 1500}

    def await_health(status: int, reason: str = "") -> dict[str, Any]:
        deadline_s = time.monotonic() + PATIENCE_S
        while (answer := served.get("/health")).status_code != status or reason not in answer.text:
            assert time.monotonic() < deadline_s, answer.text
            time.sleep(0.1)
        report: dict[str, Any] = answer.json()
        return report

    victims = served.processes("manta:", "Manta")  # ranks, too: they would keep the weights
    with served.stream("/v1/completions", body) as stream:
        lines = stream.iter_lines()
        next(lines)
        for process in victims:
            process.suspend()
        weights.rename(folder / "aside")
        try:
            for process in served.processes("manta:", "Manta"):
                process.kill()
            # At first it says no more than that the driver is gone.
            assert await_health(503, "no safetensors files")["state"] == "failed"
            last = [line for line in lines if line][-1]
            error = json.loads(last.removeprefix("data: "))["error"]
            assert error["type"] == "service_unavailable_error" and "no safetensors files" in error["message"]
            for _ in range(20):  # long enough for Serve to have replaced it, were there others
                answer = served.post("/v1/completions", body)
                assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1, answer.text
                assert "no safetensors files" in answer.json()["error"]["message"]
                assert served.get("/ready").status_code == 503
                time.sleep(0.25)
        finally:
            (folder / "aside").rename(weights)
    (log,) = (folder / "ray/session_latest/logs/serve").glob("replica_tiny_LLMServer_*.log")
    told = [line for line in log.read_text().splitlines() if "no safetensors files" in line]
    assert sum("has no engine" in line for line in told) == 1 and len(told) <= 3, told
    await_health(200)
    answer = served.post("/v1/completions", {"prompt": "Count:", "max_tokens": 4, "ignore_eos": True})
    assert answer.status_code == 200, answer.text
    served.wait_idle()


def test_the_end(served: Served) -> None:
    """Last: SIGTERM takes down all that was started, HAProxy too, when what streams is done. `served` stops no more."""
    family = psutil.Process(served.process.pid).children(recursive=True)
    folder = served.environment["RAY_TMPDIR"]
    body = {"prompt": "Count:", "n": 2, "temperature": 1.0, "seed": 5, "ignore_eos": True, "max_tokens": 500}
    whole = served.post("/v1/completions", body).json()
    with ExitStack() as stack:
        streams = [stack.enter_context(served.stream("/v1/completions", body)).iter_lines() for _ in range(4)]
        texts: list[list[str]] = [["", ""] for _ in streams]
        assert [next(lines)[:5] for lines in streams] == ["data:"] * 4
        served.process.send_signal(signal.SIGTERM)
        for got, lines in zip(texts, streams):
            rest = [line for line in lines if line]
            assert rest[-1] == "data: [DONE]"
            for line in rest[:-1]:
                (choice,) = json.loads(line[6:])["choices"]
                got[choice["index"]] += choice["text"]
    want = [choice["text"] for choice in whole["choices"]]
    assert all(w.endswith(text) and len(text) > len(w) // 2 for got in texts for text, w in zip(got, want))
    assert served.process.wait(STOP_S) == 0, "".join(served.output[-20:])
    family += [p for p in psutil.process_iter(["cmdline"]) if folder in " ".join(p.info["cmdline"] or ())]
    _, alive = psutil.wait_procs(family, timeout=60)
    assert alive == []
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{served.url}/health")
