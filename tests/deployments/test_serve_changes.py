"""Two replicas that die, are rolled by `serve deploy`, scaled down and shut down, under streams that go on."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import httpx
import pytest
import yaml

from deployments.config import REPOSITORY
from scripts.chaos_site import Site
from scripts.soak import Answer, Job, ask

pytestmark = pytest.mark.serve

WAIT_S = 150.0
TOKENS = 100
HOW: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.8, "seed": 4, "n": 2},
]
JOBS = [
    Job("/v1/completions", {"prompt": f"Count to {n}:", "ignore_eos": True, "max_tokens": TOKENS, **how}, "length")
    for n, how in enumerate(HOW)
]


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Site(num_replicas=2, drain_timeout_s=40, warm_spares=0) as site:
        yield site


@pytest.fixture(scope="module")
def expected(site: Site) -> list[dict[int, str]]:
    """What each job gives with nothing else going on."""

    async def main() -> list[dict[int, str]]:
        async with httpx.AsyncClient(base_url=site.url, timeout=WAIT_S) as http:
            return [(await ask(http, job)).texts for job in JOBS]

    return asyncio.run(main())


@dataclass
class Streams:
    """Streams and whole answers over HTTP, one after another on every worker, until the `with` block ends."""

    site: Site
    expected: list[dict[int, str]]
    streams: int = 6
    whole: int = 2
    good: int = 0
    bad: list[str] = field(default_factory=list)
    """Ended by an error event, or refused."""
    wrong: list[str] = field(default_factory=list)
    """Cut, or other text."""

    def __enter__(self) -> Self:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()
        self.wait_more(self.streams)
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()

    def wait_more(self, count: int) -> None:
        """Until so many more are done."""
        goal = self.good + count
        until(lambda: self.good >= goal or self.wrong or self.bad)

    async def _run(self) -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.site.url, timeout=WAIT_S, limits=limits) as http:
            workers = [self._worker(http, number, number < self.whole) for number in range(self.streams + self.whole)]
            await asyncio.gather(*workers)

    async def _worker(self, http: httpx.AsyncClient, number: int, whole: bool) -> None:
        while not self._stop.is_set():
            number += 1
            which = number % len(JOBS)
            try:
                texts = await (self._ask_whole(http, JOBS[which]) if whole else self._ask(http, JOBS[which]))
            except httpx.HTTPError as error:
                self.wrong.append(f"{'whole' if whole else 'stream'}: {error!r}")
                continue
            if texts is not None:
                self.good += 1
                if texts != self.expected[which]:
                    self.wrong.append(f"{texts!r:.300}")

    async def _ask(self, http: httpx.AsyncClient, job: Job) -> dict[int, str] | None:
        answer: Answer = await ask(http, job)
        if answer.error is not None:
            self.bad.append(answer.error)
            return None
        if not answer.done:
            self.wrong.append("a stream ended without a word")
        return answer.texts

    async def _ask_whole(self, http: httpx.AsyncClient, job: Job) -> dict[int, str] | None:
        answer = await http.post(job.path, json=job.body)
        if answer.status_code != 200:
            self.bad.append(f"{answer.status_code} {answer.text:.200}")
            return None
        return {choice["index"]: choice["text"] for choice in answer.json()["choices"]}


def until(what: Callable[[], Any], timeout_s: float = WAIT_S) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline_s, "not in time"
        time.sleep(0.05)


def replicas(site: Site) -> set[int]:
    return {process.pid for process in site.processes("replica")}


def run(site: Site, *arguments: str) -> int:
    """Run Python with these arguments, and with what it needs to find the site's Ray; its exit status."""
    environment = {**site.environment, "RAY_AUTH_MODE": "token"}
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=WAIT_S, check=False
    )
    return done.returncode


def deploy(site: Site, replicas: int = 2, **changes: Any) -> None:
    """`serve deploy` the site's file with some keys changed, and Serve's own number of replicas."""
    content = yaml.safe_load(site.path.read_text(encoding="utf-8"))
    (application,) = content["applications"]
    application["args"] |= changes
    application["deployments"] = [{"name": "LLMServer", "num_replicas": replicas}]
    changed = site.path.with_name("changed.yaml")
    changed.write_text(yaml.safe_dump(content), encoding="utf-8")
    (dashboard,) = re.findall(r"dashboard at (http://\S+)\)", "".join(site.output))
    assert run(site, "-m", "ray.serve.scripts", "deploy", str(changed), "--address", dashboard) == 0


HANDLES = f"""
import asyncio
import numpy as np
from ray import serve
from ray.exceptions import RayActorError
from deployments.handle import ModelHandle

params = dict(temperature=1.0, seed=3, ignore_eos=True, max_tokens={TOKENS * 3})
texts = ["Count to 4:", "Count to 5:"]
plain, model = serve.get_app_handle("tiny").options(stream=True), ModelHandle("tiny")

async def one(stream):
    return "".join([piece async for piece in stream])

async def embed_until(ended, vectors):
    count = 0
    while not ended.done() or not count:
        np.testing.assert_allclose(await model.embed(texts), vectors, atol=1e-5)
        count += 1
    return count

async def main():
    want = await one(plain.remote("Count:", **params))
    vectors = np.array(await model.embed(texts))
    tasks = [asyncio.ensure_future(one(plain.remote("Count:", **params))) for _ in range(4)]
    tasks += [asyncio.ensure_future(one(model.stream("Count:", **params))) for _ in range(4)]
    wholes = [asyncio.ensure_future(model.generate("Count:", **params)) for _ in range(4)]
    streams = asyncio.gather(*tasks, *wholes, return_exceptions=True)
    embedding = [asyncio.ensure_future(embed_until(streams, vectors)) for _ in range(2)]
    await asyncio.sleep(0.3)
    print("running", flush=True)
    ended = await streams
    for result in ended[:4]:
        assert result == want or isinstance(result, RayActorError), result
    print("lost", sum(isinstance(result, RayActorError) for result in ended[:4]))
    assert ended[4:] == [want] * 8, ended[4:]
    print("embedded", await asyncio.gather(*embedding))
    assert len(await model.embed("Count:", dimensions=8)) == 8
    print("fine")

asyncio.run(main())
"""


def test_a_killed_replica(site: Site, expected: list[dict[int, str]]) -> None:
    """The others serve on; its streams end with an error event, answers come from elsewhere, plain handles are told."""
    before = replicas(site)
    assert len(before) == 2

    def strike() -> None:
        there = replicas(site)
        site.processes("replica")[0].send_signal(signal.SIGKILL)
        load.wait_more(8)
        until(lambda: len(now := replicas(site)) == 2 and now != there)

    with Streams(site, expected, streams=10) as load:  # so many that some are at either
        program = subprocess.Popen(
            [sys.executable, "-c", HANDLES], env=site.environment, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
        )
        assert program.stdout is not None
        assert program.stdout.readline() == "running\n"
        strike()
        said, _ = program.communicate(timeout=WAIT_S)
        assert program.returncode == 0 and said.endswith("fine\n"), said
        for _ in range(2):
            if not load.bad:  # HAProxy had sent all to the other one
                strike()
    assert not load.wrong
    assert 0 < len(load.bad) <= load.streams, load.bad
    assert all("the process that ran this request died" in error for error in load.bad), load.bad


def test_a_configuration_is_rolled_by_serve_deploy(site: Site, expected: list[dict[int, str]]) -> None:
    before = replicas(site)
    with Streams(site, expected) as load:
        deploy(site, max_waiting_requests=1025)
        until(lambda: len(now := replicas(site)) == 2 and not now & before)
        load.wait_more(8)
    assert not load.wrong and not load.bad


def test_scaled_down(site: Site, expected: list[dict[int, str]]) -> None:
    """By Serve's own key, not by one of `args`: the replica that stays is one of the two."""
    before = replicas(site)
    with Streams(site, expected) as load:
        deploy(site, replicas=1, max_waiting_requests=1025)
        until(lambda: len(replicas(site)) == 1)
        load.wait_more(8)
        assert replicas(site) < before
    assert not load.wrong and not load.bad


def test_taken_down_after_the_last_stream(site: Site) -> None:
    """Last: `python -m scripts.stop` beside a launcher that knows nothing of it."""
    job = Job("/v1/completions", {**JOBS[1].body, "max_tokens": 800}, "length")

    async def is_served(http: httpx.AsyncClient) -> bool:
        try:
            return (await http.get("/version")).status_code == 200
        except httpx.HTTPError:
            return False

    async def main() -> tuple[list[Answer], list[Answer]]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=site.url, timeout=WAIT_S, limits=limits) as http:
            alone = await ask(http, job)
            streams = [asyncio.ensure_future(ask(http, job)) for _ in range(4)]
            while (await http.get("/stats")).json()["running"] < 4:
                assert not any(stream.done() for stream in streams)
            (driver,) = site.processes("driver")
            driver.suspend()  # no stream ends before no more are taken
            try:
                stopping = asyncio.ensure_future(asyncio.to_thread(run, site, "-m", "scripts.stop"))
                while await is_served(http):
                    assert not stopping.done()
                    await asyncio.sleep(0.05)
            finally:
                driver.resume()
            await stopping  # the launcher may end Ray under it
            return [alone] * 4, await asyncio.gather(*streams)

    alone, ended = asyncio.run(main())
    assert [(a.texts, a.done, a.error) for a in ended] == [(a.texts, True, None) for a in alone]
    until(lambda: not replicas(site))
