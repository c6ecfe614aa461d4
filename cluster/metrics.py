"""Engine counters as Ray metrics: Ray's agents hand them to Prometheus, next to Ray's own."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import msgspec
from ray.util.metrics import Counter, Gauge

from engine.llm_engine import LLMEngine
from engine.metrics import EngineMetrics, Histogram

Stats = dict[str, Any]

GAUGES = {
    "running": "Sequences that run",
    "waiting": "Sequences that wait for a place",
    "num_blocks": "KV blocks in all",
    "free_blocks": "KV blocks that can be allocated, cached ones among them",
    "used_blocks": "KV blocks that running sequences hold",
    "cached_blocks": "KV blocks kept for their prefix only",
    "shared_blocks": "KV blocks that more than one sequence holds",
    "saved_blocks": "KV blocks that there would be more of without sharing",
    "kv_utilization": "Slots filled of those in used blocks",
}
COUNTERS = {
    "num_requests": "Requests accepted",
    "num_aborted": "Requests of which a sample was aborted",
    "finished_stop": "Samples that ended with a stop token",
    "finished_length": "Samples that ended at their length",
    "finished_error": "Samples that failed",
    "prompt_tokens": "Prompt tokens accepted",
    "generated_tokens": "Tokens handed out",
    "computed_tokens": "Tokens computed, prompts and decodes",
    "prefix_query_tokens": "Prompt tokens looked up in the prefix cache",
    "prefix_hit_tokens": "Prompt tokens found in the prefix cache",
    "preemptions": "Sequences preempted for want of blocks",
    "steps": "Steps submitted",
    "recoveries": "Restarts of the ranks",
}
TIMES = {
    "queue_s": ("queue_seconds", "Acceptance to first step"),
    "first_token_s": ("first_token_seconds", "Acceptance to first token"),
    "token_gap_s": ("token_gap_seconds", "Between two tokens of a sample"),
    "step_s": ("step_seconds", "Time of the ranks for a step"),
    "mask_s": ("mask_seconds", "Computing the grammar masks of a step that has any, while the ranks run it"),
}
"""A histogram of EngineMetrics: its exported name, and what it measures."""
QUANTILES = (0.5, 0.9, 0.99)


def snapshot(engine: LLMEngine) -> Stats:
    """All counters, gauges and times of an engine as plain values; call it on the thread that drives the engine.

    Times come as NAME_mean and NAME_p50, _p90, _p99 (upper bounds), in seconds since the engine began, when there are
    any.
    """
    stats: Stats = msgspec.to_builtins(engine.stats())
    metrics = engine.metrics
    for name in ("num_requests", "num_aborted", "prompt_tokens", "computed_tokens", "surplus_tokens"):
        stats[name] = getattr(metrics, name)
    stats |= {f"finished_{reason}": count for reason, count in metrics.finished.items()}
    return stats | _times(metrics)


def _times(metrics: EngineMetrics) -> Stats:
    times: Stats = {}
    for name in TIMES:
        histogram: Histogram = getattr(metrics, name)
        if not histogram.count:
            continue
        times[f"{name}_mean"] = histogram.mean
        for share in QUANTILES:
            value = histogram.quantile(share)
            times[f"{name}_p{share * 100:g}"] = value if math.isfinite(value) else histogram.bounds[-1]
    return times


class Buckets(NamedTuple):
    """A histogram as Prometheus counts: values up to each bound ("+Inf" the last), and the sum of all values."""

    counts: dict[str, int]
    sum: float


def buckets(metrics: EngineMetrics) -> dict[str, Buckets]:
    """The histograms of TIMES; call it where snapshot is called."""
    found = {}
    for name in TIMES:
        histogram: Histogram = getattr(metrics, name)
        edges = [*(f"{bound:g}" for bound in histogram.bounds), "+Inf"]
        found[name] = Buckets(dict(zip(edges, histogram.counts.cumsum().tolist(), strict=True)), histogram.sum)
    return found


class RayMetrics:
    """Exports snapshots of one engine, tagged with its driver's name. Not for two threads.

    Histograms go out as counters with a tag `le`, which histogram_quantile reads: Ray's own Histogram would want every
    value by itself, thousands a second.
    """

    def __init__(self, driver: str) -> None:
        self._tags = {"driver": driver}
        self._told: dict[tuple[str, str], float] = {}
        keys = ("driver",)
        self._gauges = {name: Gauge(f"manta_{name}", text, keys) for name, text in GAUGES.items()}
        self._counters = {name: Counter(f"manta_{name}", text, keys) for name, text in COUNTERS.items()}
        for name, (exported, text) in TIMES.items():
            self._counters[f"{name}_sum"] = Counter(f"manta_{exported}_sum", f"{text}, summed", keys)
            self._counters[f"{name}_bucket"] = Counter(f"manta_{exported}_bucket", f"{text}, up to le", (*keys, "le"))

    def export(self, stats: Stats, times: dict[str, Buckets]) -> None:
        """Hand one snapshot to Ray."""
        for name, gauge in self._gauges.items():
            gauge.set(stats[name], self._tags)
        for name in COUNTERS:
            self._grow(name, stats[name], self._tags)
        for name, histogram in times.items():
            self._grow(f"{name}_sum", histogram.sum, self._tags)
            for edge, count in histogram.counts.items():
                self._grow(f"{name}_bucket", count, {**self._tags, "le": edge})

    def _grow(self, name: str, value: float, tags: dict[str, str]) -> None:
        key = (name, tags.get("le", ""))
        grown = value - self._told.get(key, 0)
        if grown > 0:
            self._counters[name].inc(grown, tags)
            self._told[key] = value
