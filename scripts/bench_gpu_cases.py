"""Cases: what engines are measured with on GPUs, the figure taken of each, and what others reach."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from engine.request import Request, SequenceOutput
from engine.sampling_params import SamplingParams
from scripts import workload


@dataclass
class Timeline:
    """What came back, a step at a time."""

    started_s: float
    steps: list[tuple[float, int, int]] = field(default_factory=list)
    """(when, tokens, requests whose first token was among them)."""
    _seen: set[str] = field(default_factory=set)
    finished: int = 0

    def note(self, outputs: list[SequenceOutput]) -> None:
        """Add a step."""
        tokens = first = 0
        for output in outputs:
            tokens += len(output.token_ids)
            if output.request_id not in self._seen:
                self._seen.add(output.request_id)
                first += 1
            self.finished += output.finish_reason is not None
            assert output.finish_reason in (None, "length"), output
        self.steps.append((time.perf_counter(), tokens, first))

    @property
    def num_tokens(self) -> int:
        return sum(tokens for _, tokens, _ in self.steps)

    @property
    def wall_s(self) -> float:
        return self.steps[-1][0] - self.started_s

    def step_ms(self, num_seqs: int) -> float:
        """Mean time between steps in which each of `num_seqs` sequences drew a token and none its first."""
        times = [when for when, tokens, first in self.steps if tokens == num_seqs and not first]
        return (times[-1] - times[0]) / (len(times) - 1) * 1e3


@dataclass(frozen=True)
class Case:
    """One workload and the figure taken from it."""

    unit: str
    requests: Callable[[int], workload.Trace]
    measure: Callable[[workload.Trace, Timeline], float]
    params: dict[str, Any] = field(default_factory=dict)


def _output_rate(_: workload.Trace, timeline: Timeline) -> float:
    return timeline.num_tokens / timeline.wall_s


def _prompt_rate(requests: workload.Trace, timeline: Timeline) -> float:
    return sum(len(prompt) for prompt, _ in requests) / timeline.wall_s


SAMPLED = {"temperature": 0.8, "top_p": 0.95}
CASES: dict[str, Case] = {
    "decode-1": Case("ms/token", lambda v: workload.fixed(1, v, 128, 257), lambda _, t: t.step_ms(1)),
    "decode-256": Case("ms/step", lambda v: workload.fixed(256, v, 512, 257), lambda _, t: t.step_ms(256)),
    "chat-greedy": Case("tokens/s", lambda v: workload.chat(1000, v), _output_rate),
    "chat-sampled": Case("tokens/s", lambda v: workload.chat(1000, v), _output_rate, SAMPLED),
    "chat500-greedy": Case("tokens/s", lambda v: workload.chat(500, v), _output_rate),
    "prefill-32x4096": Case("prompt tokens/s", lambda v: workload.fixed(32, v, 4096, 1), _prompt_rate),
    # Small ones, for dry runs and traces.
    "decode-256-short": Case("ms/step", lambda v: workload.fixed(256, v, 64, 90), lambda _, t: t.step_ms(256)),
    "decode-8": Case("ms/step", lambda v: workload.fixed(8, v, 32, 33), lambda _, t: t.step_ms(8)),
    "chat20-greedy": Case("tokens/s", lambda v: workload.chat(20, v, hi=64), _output_rate),
    "chat20-sampled": Case("tokens/s", lambda v: workload.chat(20, v, hi=64), _output_rate, SAMPLED),
}
START = "start"

# vLLM 0.24 on one H200 (TP=2: two), max_num_seqs 256, no prefix cache, 2026-11-21; and the physical limits.
ANCHORS: dict[tuple[str, int, str], tuple[float, float | None]] = {
    ("llama3-8b", 1, "decode-1"): (4.90, 3.5),
    ("llama3-8b", 1, "decode-256"): (14.36, 11.0),
    ("llama3-8b", 1, "chat-greedy"): (10569, None),
    ("llama3-8b", 1, "chat-sampled"): (10459, None),
    ("llama3-8b", 1, "prefill-32x4096"): (41372, 49000),
    ("llama3-8b", 1, START): (80.3, None),
    ("llama3-70b", 2, "decode-1"): (20.93, 16.2),
    ("llama3-70b", 2, "decode-256"): (45.6, None),
    ("llama3-70b", 2, "chat500-greedy"): (2154, None),
    ("llama3-70b", 2, "prefill-32x4096"): (8226, None),
    ("llama3-70b", 2, START): (139, None),
}

PROFILES: dict[str, tuple[Callable[[int], workload.Trace], int]] = {
    "decode-1": (lambda v: workload.fixed(1, v, 128, 80), 20),
    "decode-16": (lambda v: workload.fixed(16, v, 128, 80), 20),
    "decode-64": (lambda v: workload.fixed(64, v, 512, 80), 30),
    "decode-256": (lambda v: workload.fixed(256, v, 512, 80), 40),
    "chat": (lambda v: workload.chat(400, v), 120),
    "prefill": (lambda v: workload.fixed(40, v, 4096, 1), 4),
}
"""Traces to profile, each with the step at which to begin."""


def make_requests(case: str, requests: workload.Trace, params: dict[str, Any]) -> Iterator[Request]:
    """A trace as requests, their output lengths forced; greedy unless `params` says otherwise."""
    for number, (prompt, length) in enumerate(requests):
        sampling = SamplingParams(**{"temperature": 0.0, "seed": number, **params}, max_tokens=length, ignore_eos=True)
        yield Request.create(f"{case}-{number}-{time.monotonic_ns()}", prompt, sampling, arrival_s=time.time())
