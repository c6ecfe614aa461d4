"""Break a served model while it streams: `python -m scripts.chaos [--minutes 3] [--seed 0] [--replicas 1] [--short]
[--faults NAME,...]`.

`--roll` does no harm: it deploys a changed configuration again and again, and no stream may fail.

Streams over HTTP and through handles and whole answers over HTTP, greedy and sampled, one sample and two, run all the
time; what each must give is learnt first, undisturbed. Then a seeded schedule of faults: ranks killed, stopped, hung,
raising, two at once and again during the recovery, the driver killed, a flood, a replica killed when there are others.
At the end a table. Exits with 1 when an accepted request ended with other text, cut or without a word, a block was
leaked, or an engine recovered from nothing. Only a replica's death may cost its HTTP streams an error event.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
import ray
from tqdm import tqdm

from deployments.handle import ModelHandle
from engine.errors import EngineOverloaded, EngineUnavailable
from scripts.chaos_faults import FAULTS, NO_FAULT, OF_SEVERAL, Faults, Flood, ranks
from scripts.chaos_site import Site
from scripts.soak import Answer, Job, ask

LOST_AFTER_S = 120.0
READY_WITHIN_S = 90.0
REFUSED = ("429:", "503:")
RANKS = 2
STREAM, WHOLE, HANDLE = "HTTP", "HTTP whole", "handle"
"""How a worker asks: streams, answers in one piece, handles."""
LONG_BODY_BYTES = 193 << 10
"""Of every second request for a whole answer: a replica takes such a body in pieces, and may die between them."""
MAX_WAITING = 100
"""Requests that may wait at one replica: fewer than a flood has."""


@dataclass
class Tally:
    """What became of everything."""

    accepted: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    """Accepted, by how and what was asked."""
    identical: int = 0
    failed: list[str] = field(default_factory=list)
    """Told by an error."""
    lost: list[str] = field(default_factory=list)
    """Ended without a word, with other text, or not at all."""
    refused: int = 0
    """Not accepted: 429 or 503 with Retry-After, or no connection; asked again."""
    longest_pause_s: float = 0.0
    longest_pause_in: str = "no fault"
    """The last fault that had begun when the longest pause ended."""
    begun: list[tuple[float, str]] = field(default_factory=list)
    """When each fault began."""
    recovery_s: list[float] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    false_alarms: int = 0
    leaked: int = 0
    flood: Flood = field(default_factory=Flood)


def jobs(count: int, seed: int, max_tokens: int) -> list[Job]:
    """Completions of a fixed length: greedy and sampled in turn, every fourth of two samples."""
    rng = random.Random(seed)
    made = []
    for number in range(count):
        body: dict[str, Any] = {"prompt": f"Tell me about {rng.randint(10, 99)}.", "ignore_eos": True, "seed": number}
        body |= {"max_tokens": rng.randint(max_tokens // 2, max_tokens), "temperature": 0.9 * (number % 2)}
        if number % 4 == 3:
            body["n"] = 2
        made.append(Job("/v1/completions", body, "length"))
    return made


class Load:
    """Steady streams, each compared with what it must give."""

    def __init__(self, site: Site, todo: list[Job], tally: Tally) -> None:
        self.site, self.jobs, self.tally = site, todo, tally
        self.expected: list[dict[int, str]] = []
        self.stopping = asyncio.Event()
        limits = httpx.Limits(max_connections=None)
        self.http = httpx.AsyncClient(base_url=site.url, timeout=LOST_AFTER_S, limits=limits)
        self._handle = ModelHandle(site.application)
        self._posted = 0

    async def learn(self) -> None:
        """Ask each request once, with nothing else going on."""
        for job in tqdm(self.jobs, desc="undisturbed", leave=False):
            answer = await ask(self.http, job)
            assert answer.done and answer.error is None, answer
            self.expected.append(answer.texts)

    async def run(self, worker: int, way: str) -> None:
        """Ask one request after another until told to stop."""
        number = worker
        ask_by = {STREAM: self._by_stream, WHOLE: self._by_post, HANDLE: self._by_handle}[way]
        while not self.stopping.is_set():
            number = (number + 7) % len(self.jobs)
            job, want = self.jobs[number], self.expected[number]
            how = f"{way}, {kind_of(job)}"
            what = f"{how}, request {number}"
            try:
                async with asyncio.timeout(LOST_AFTER_S):
                    answer = await ask_by(job)
            except TimeoutError:
                self.tally.accepted += 1
                self.tally.lost.append(f"{what}: nothing for {LOST_AFTER_S:g} s")
                continue
            if answer is None:
                self.tally.refused += 1
                await asyncio.sleep(0.5)
                continue
            self.tally.kinds[how] += 1
            self._judge(what, answer, want)

    def _judge(self, what: str, answer: Answer, want: dict[int, str]) -> None:
        tally = self.tally
        tally.accepted += 1
        if answer.error is not None:
            tally.failed.append(f"{what}: {answer.error}")
        elif not answer.done:
            tally.lost.append(f"{what}: the stream ended without a word")
        elif answer.texts != want:
            tally.lost.append(f"{what}: other text: {answer.texts!r:.200}, expected {want!r:.200}")
        else:
            tally.identical += 1
        for early, late in itertools.pairwise(answer.times_s):
            if late - early > tally.longest_pause_s:
                tally.longest_pause_s = late - early
                tally.longest_pause_in = next((name for at, name in reversed(tally.begun) if at < late), "no fault")

    async def _by_stream(self, job: Job) -> Answer | None:
        return await self._by_http(ask(self.http, job))

    async def _by_post(self, job: Job) -> Answer | None:
        return await self._by_http(self._post(job))

    async def _post(self, job: Job) -> Answer:
        self._posted += 1
        body = json.dumps(job.body).ljust(LONG_BODY_BYTES * (self._posted % 2)).encode()
        response = await self.http.post(job.path, content=body, headers={"content-type": "application/json"})
        if response.status_code != 200:
            return Answer(error=f"{response.status_code}: {response.text[:300]}")
        return Answer({choice["index"]: choice["text"] for choice in response.json()["choices"]}, done=True)

    async def _by_http(self, asked: Awaitable[Answer]) -> Answer | None:
        try:
            answer = await asked
        except httpx.ConnectError:
            return None
        except httpx.HTTPError as error:
            self.tally.lost.append(f"cut: {error!r}")
            return None
        return None if answer.error is not None and answer.error.startswith(REFUSED) else answer

    async def _by_handle(self, job: Job) -> Answer | None:
        params = {name: value for name, value in job.body.items() if name != "prompt"}
        answer = Answer()
        try:
            if "n" in params:
                texts = await self._handle.generate(job.body["prompt"], **params)
                answer.texts = dict(enumerate(texts))
            else:
                pieces = []
                async for piece in self._handle.stream(job.body["prompt"], **params):
                    answer.times_s.append(time.perf_counter())
                    pieces.append(piece)
                answer.texts = {0: "".join(pieces)}
            answer.done = True
        except Exception as error:  # whatever Ray raises is what a caller is told
            if isinstance(error, EngineUnavailable | EngineOverloaded) and not answer.times_s:
                return None
            answer.error = f"{type(error).__name__}: {error}"[:300]
        return answer


def kind_of(job: Job) -> str:
    """greedy or sampled, and how many samples."""
    return ("greedy" if job.body["temperature"] == 0 else "sampled") + (", n = 2" if "n" in job.body else "")


async def engines(http: httpx.AsyncClient, replicas: int) -> dict[str, dict[str, Any]]:
    """The stats of every replica's engine, by the driver's name; asked until all have answered."""
    found: dict[str, dict[str, Any]] = {}
    for _ in range(20 * replicas):
        try:
            answer = await http.get("/stats")
        except httpx.HTTPError:
            continue
        if answer.status_code == 200:
            stats = answer.json()
            found[stats["name"]] = stats
        if len(found) >= replicas:
            break
        await asyncio.sleep(0.05)
    return found


def new_recoveries(before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]) -> int:
    """Recoveries of engines since they were last looked at."""
    return sum(max(0, stats["recoveries"] - before.get(name, stats)["recoveries"]) for name, stats in after.items())


async def settled(load: Load, replicas: int, number_of: dict[str, int]) -> float | None:
    """Wait until every process is there and a request is answered; the seconds it took, None when it never is."""
    began_s = time.perf_counter()
    probe = Job("/v1/completions", {"prompt": "a", "max_tokens": 1}, "length")
    while time.perf_counter() - began_s < READY_WITHIN_S:
        await asyncio.sleep(0.1)
        if any(len(load.site.processes(kind)) < count for kind, count in number_of.items()):
            continue
        if sum(runs(rank) for rank in await ranks()) < RANKS * replicas:
            continue
        try:
            answers = [await ask(load.http, probe) for _ in range(replicas)]
        except httpx.HTTPError:
            continue
        if all(answer.done and answer.error is None for answer in answers):
            return time.perf_counter() - began_s
    return None


def runs(process: psutil.Process) -> bool:
    """Whether a process lives and is not stopped."""
    try:
        return bool(process.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE, psutil.STATUS_TRACING_STOP))
    except psutil.Error:
        return False


async def chaos(site: Site, options: argparse.Namespace) -> Tally:
    """Load, faults, and the reckoning at the end."""
    tally = Tally()
    load = Load(site, jobs(options.jobs, options.seed, options.max_tokens), tally)
    await load.learn()
    faults = Faults(site, options.seed, options.faults)
    number_of = {"driver": options.replicas, "replica": options.replicas}
    quarter = options.streams // 4
    ways = [HANDLE] * quarter + [WHOLE] * quarter + [STREAM] * (options.streams - 2 * quarter)
    workers = [asyncio.ensure_future(load.run(worker, way)) for worker, way in enumerate(ways)]
    known = await engines(load.http, options.replicas)
    began_s = time.perf_counter()
    todo = faults.names()
    with tqdm(total=round(options.minutes * 60), desc="faults", unit="s") as bar:
        while todo or time.perf_counter() - began_s < options.minutes * 60:
            await asyncio.sleep(faults.rng.uniform(0.5, 1) if options.short else faults.rng.uniform(2, 5))
            now = await engines(load.http, options.replicas)
            tally.false_alarms += new_recoveries(known, now)
            todo = todo or faults.names()
            fault = todo.pop(0)
            bar.set_postfix_str(fault)
            tally.faults[fault] += 1
            tally.begun.append((time.perf_counter(), fault))
            await faults.inject(fault)
            await asyncio.sleep(0.3)
            ready_s = await settled(load, options.replicas, number_of)
            if ready_s is None:
                alive = {kind: len(site.processes(kind)) for kind in number_of} | {"rank": len(await ranks())}
                tally.lost.append(f"not ready {READY_WITHIN_S:g} s after {fault}; processes that live: {alive}")
                break
            tally.recovery_s.append(0.3 + ready_s)
            known = await engines(load.http, options.replicas)
            bar.update(min(round(time.perf_counter() - began_s), bar.total) - bar.n)
    load.stopping.set()
    await asyncio.gather(*workers)
    for _ in range(100):
        last = await engines(load.http, options.replicas)
        tally.false_alarms += new_recoveries(known, last)
        known = last
        tally.leaked = sum(stats["used_blocks"] for stats in last.values())
        if not tally.leaked and not any(stats["running"] or stats["waiting"] for stats in last.values()):
            break
        await asyncio.sleep(0.1)
    await load.http.aclose()
    tally.flood = faults.flood_total
    return tally


def report(tally: Tally) -> bool:
    """Print the table; whether all is well."""
    told = ", ".join(f"{count} × {name}" for name, count in sorted(tally.faults.items()))
    kinds = ", ".join(f"{count} × {name}" for name, count in sorted(tally.kinds.items()))
    flood = tally.flood
    rows: list[tuple[str, object]] = [
        ("faults injected", f"{sum(tally.faults.values())}: {told}"),
        ("requests accepted", f"{tally.accepted}: {kinds}"),
        ("finished identical", tally.identical),
        ("failed with an error", len(tally.failed)),
        ("lost", len(tally.lost)),
        ("blocks leaked", tally.leaked),
        ("longest pause", f"{tally.longest_pause_s:.1f} s ({tally.longest_pause_in})"),
        ("ready again after", f"{statistics.median(tally.recovery_s or [0.0]):.1f} s (median)"),
        ("false alarms", tally.false_alarms),
        ("refused, asked again", tally.refused),
        (
            "a flood's requests",
            f"{flood.accepted} answered, {flood.refused} × 429 with Retry-After, {flood.wrong} else",
        ),
    ]
    for name, value in rows:
        print(f"| {name} | {value} |")
    for line in [*tally.lost, *tally.failed][:20]:
        print(line, file=sys.stderr)
    may_fail = f"{STREAM}, " if tally.faults[OF_SEVERAL] else "nothing"
    told_only = all(line.startswith(may_fail) for line in tally.failed)
    return not tally.lost and not tally.leaked and not tally.false_alarms and not flood.wrong and told_only


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=3.0, help="at least; every fault comes at least once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--streams", type=int, default=32, help="a quarter by handle, a quarter for whole answers")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=12, help="different requests")
    parser.add_argument("--max-tokens", type=int, default=80)
    parser.add_argument("--roll", action="store_true", help="only roll the configuration, instead of faults")
    parser.add_argument(
        "--faults",
        type=lambda text: text.split(","),
        metavar="NAME,...",
        help=f"only these (default: all that the number of replicas allows): {', '.join(FAULTS)}",
    )
    parser.add_argument("--short", action="store_true", help="every fault once, fewer and shorter streams")
    options = parser.parse_args(arguments)
    if options.roll:
        options.faults = [NO_FAULT]
    elif options.faults is None:
        skipped = {NO_FAULT} if options.replicas > 1 else {NO_FAULT, OF_SEVERAL}
        options.faults = [name for name in FAULTS if name not in skipped]
    elif unknown := set(options.faults) - FAULTS.keys():
        parser.error(f"--faults: got {', '.join(sorted(unknown))}, allowed: {', '.join(FAULTS)}")
    if options.short:
        options.minutes, options.streams, options.jobs, options.max_tokens = 0.0, 12, 8, 60
    return options


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    changes: dict[str, Any] = {"tensor_parallel_size": RANKS, "num_replicas": options.replicas, "max_num_seqs": 64}
    changes["max_waiting_requests"] = MAX_WAITING
    with Site(**changes) as site:
        os.environ.update(site.environment)
        ray.init(address="auto", log_to_driver=False)
        try:
            tally = asyncio.run(chaos(site, options))
        finally:
            ray.shutdown()
    return 0 if report(tally) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
