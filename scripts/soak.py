"""Many concurrent streams against a running server: `python -m scripts.soak [--url URL] [--streams 64] [--minutes 1]`.

Each stream sends one request after another: chats that end by themselves, chats ended by a stop string, completions of
a fixed length with two seeded samples, and now and then one that it abandons. What a request must give is learnt first,
one request at a time. At the end nothing may run and no block may be held. Exits with 1 when anything was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import httpx
from tqdm import tqdm

STOP = " = "
SAMPLED_TOKENS = 24
ABANDON_EVERY = 16
DRAIN_S = 60.0


@dataclass(frozen=True)
class Job:
    """One request and what its stream must end as."""

    path: str
    body: dict[str, Any]
    reason: str
    forbidden: str | None = None


@dataclass
class Answer:
    """What a stream gave: texts by sample, how each ended, and when events came."""

    texts: dict[int, str] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    times_s: list[float] = field(default_factory=list)
    completion_tokens: int = 0
    done: bool = False
    error: str | None = None


@dataclass
class Totals:
    """What the whole run came to."""

    answers: int = 0
    abandoned: int = 0
    tokens: int = 0
    different: int = 0
    errors: list[str] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)


def jobs(count: int, seed: int = 0) -> list[Job]:
    """A fixed mixture of requests."""
    rng = random.Random(seed)
    out = []
    for number in range(count):
        question = f"What is {rng.randint(10, 99)} + {rng.randint(10, 99)}?"
        chat: dict[str, Any] = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 64}
        if number % 3 == 0:
            out.append(Job("/v1/chat/completions", chat, "stop"))
        elif number % 3 == 1:
            out.append(Job("/v1/chat/completions", {**chat, "stop": [STOP]}, "stop", forbidden=STOP))
        else:
            sampled = {"n": 2, "temperature": 0.8, "seed": number, "max_tokens": SAMPLED_TOKENS, "ignore_eos": True}
            out.append(Job("/v1/completions", {"prompt": question, **sampled}, "length"))
    return out


async def ask(client: httpx.AsyncClient, job: Job, *, leave_after: int | None = None) -> Answer:
    """Stream one request; `leave_after` events the connection is dropped."""
    answer = Answer()
    body = {**job.body, "stream": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", job.path, json=body) as response:
        if response.status_code != 200:
            answer.error = f"{response.status_code}: {(await response.aread()).decode()[:300]}"
            return answer
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                answer.done = True
                break
            answer.times_s.append(time.perf_counter())
            _take(answer, json.loads(line[6:]))
            if leave_after is not None and len(answer.times_s) >= leave_after:
                break
    return answer


def _take(answer: Answer, event: dict[str, Any]) -> None:
    if "error" in event:
        answer.error = str(event["error"])
        return
    for choice in event["choices"]:
        text = choice.get("text") or choice.get("delta", {}).get("content") or ""
        index = choice["index"]
        answer.texts[index] = answer.texts.get(index, "") + text
        if choice["finish_reason"]:
            answer.reasons[index] = choice["finish_reason"]
    if event.get("usage"):
        answer.completion_tokens = event["usage"]["completion_tokens"]


def fault(job: Job, answer: Answer) -> str | None:
    """What is wrong with an answer, if anything."""
    if answer.error:
        return answer.error
    if not answer.done:
        return "the stream ended without [DONE]"
    samples = job.body.get("n", 1)
    if set(answer.reasons.values()) != {job.reason} or len(answer.reasons) != samples:
        return f"ended as {answer.reasons}, not {job.reason}"
    if job.forbidden and any(job.forbidden in text for text in answer.texts.values()):
        return f"the stop string {job.forbidden!r} leaked: {answer.texts}"
    if job.reason == "length" and answer.completion_tokens != samples * SAMPLED_TOKENS:
        return f"{answer.completion_tokens} tokens, not {samples * SAMPLED_TOKENS}"
    return None


async def soak(url: str, streams: int, seconds: float) -> tuple[Totals, dict[str, Any]]:
    """Run the load; what it came to, and the server's stats once it has drained."""
    totals = Totals()
    todo = jobs(3 * 8)
    limits = httpx.Limits(max_connections=streams + 2, max_keepalive_connections=streams + 2)
    async with httpx.AsyncClient(base_url=url, timeout=200, limits=limits) as client:
        expected = []
        for job in tqdm(todo, desc="one at a time", leave=False):
            answer = await ask(client, job)
            if wrong := fault(job, answer):
                totals.errors.append(f"alone: {wrong}")
            expected.append(answer.texts)
        end_s = time.perf_counter() + seconds
        bar = tqdm(total=round(seconds), desc=f"{streams} streams", unit="s")

        async def tick() -> None:
            while time.perf_counter() < end_s:
                await asyncio.sleep(1)
                bar.update(1)

        async def stream(number: int) -> None:
            rng = random.Random(number)
            while time.perf_counter() < end_s:
                which = rng.randrange(len(todo))
                leave = rng.randint(1, 6) if rng.randrange(ABANDON_EVERY) == 0 else None
                began_s = time.perf_counter()
                try:
                    answer = await ask(client, todo[which], leave_after=leave)
                except httpx.HTTPError as error:
                    totals.errors.append(f"{type(error).__name__}: {error}")
                    continue
                if leave is not None:
                    totals.abandoned += 1
                    continue
                _count(totals, todo[which], answer, expected[which], began_s)

        await asyncio.gather(tick(), *[stream(number) for number in range(streams)])
        bar.close()
        return totals, await _drained(client)


def _count(totals: Totals, job: Job, answer: Answer, expected: dict[int, str], began_s: float) -> None:
    totals.answers += 1
    totals.tokens += answer.completion_tokens
    totals.different += answer.texts != expected
    if wrong := fault(job, answer):
        totals.errors.append(wrong)
    if answer.times_s:
        totals.first_s.append(answer.times_s[0] - began_s)
        totals.gaps_s += [b - a for a, b in zip(answer.times_s, answer.times_s[1:])]


async def _drained(client: httpx.AsyncClient) -> dict[str, Any]:
    """The server's stats when it is idle, or after DRAIN_S."""
    end_s = time.perf_counter() + DRAIN_S
    while True:
        stats: dict[str, Any] = (await client.get("/stats")).json()
        idle = not (stats["running"] or stats["waiting"] or stats["used_blocks"])
        if idle or time.perf_counter() > end_s:
            return stats
        await asyncio.sleep(0.1)


def report(totals: Totals, stats: dict[str, Any], streams: int, seconds: float) -> bool:
    """Print the table; whether all was well."""

    def spread(values: list[float]) -> str:
        ordered = sorted(values) or [float("nan")]
        return f"{ordered[len(ordered) // 2] * 1e3:.1f} / {ordered[int(len(ordered) * 0.99)] * 1e3:.1f} ms"

    rows = [
        ("streams at once", f"{streams} for {seconds:.0f} s"),
        ("requests answered", f"{totals.answers}, and {totals.abandoned} abandoned"),
        ("tokens", f"{totals.tokens} ({totals.tokens / seconds:.0f} a second)"),
        ("first event p50 / p99", spread(totals.first_s)),
        ("gap between events p50 / p99", spread(totals.gaps_s)),
        ("texts other than alone", str(totals.different)),
        ("errors", str(len(totals.errors))),
        ("still running, waiting", f"{stats['running']}, {stats['waiting']}"),
        ("blocks leaked", str(stats["used_blocks"])),
        ("preemptions, recoveries", f"{stats['preemptions']}, {stats['recoveries']}"),
    ]
    print()
    for name, value in rows:
        print(f"{name:30} {value}")
    for error in list(dict.fromkeys(totals.errors))[:10]:
        print(f"error: {error}", file=sys.stderr)
    clean = not (stats["running"] or stats["waiting"] or stats["used_blocks"])
    return clean and not totals.errors and totals.answers > 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of a running server (default: %(default)s)")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=1.0)
    arguments = parser.parse_args()
    seconds = arguments.minutes * 60
    try:
        totals, stats = asyncio.run(soak(arguments.url, arguments.streams, seconds))
    except httpx.ConnectError:
        print(f"error: no server at {arguments.url}; start one with scripts/run.sh", file=sys.stderr)
        return 1
    return 0 if report(totals, stats, arguments.streams, seconds) else 1


if __name__ == "__main__":
    sys.exit(main())
