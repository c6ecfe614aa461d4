"""A picture of an engine: what every block and every request is doing, for somebody who looks. Costs milliseconds."""

from __future__ import annotations

import time
from base64 import b64encode
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.llm_engine import LLMEngine
from engine.metrics import Histogram
from engine.sequence import SEATED, Group

FREE, CACHED, OWNED, SHARED = range(4)
MAX_REQUESTS = 1000
Bytes = npt.NDArray[np.uint8]
Int16Array = npt.NDArray[np.int16]


def picture(engine: LLMEngine) -> dict[str, Any]:
    """Blocks, requests, counters and histograms now, as plain values; call it on the thread that drives the engine.

    `blocks.state` is base64 of one byte a block: free, cached, owned or shared (0 to 3); `blocks.owner` of one
    little-endian int16 a block: the index in `requests` of a request that holds it, or -1. The oldest requests come
    first; at most MAX_REQUESTS of them are told of.
    """
    stats = engine.stats()
    states, owners, requests = _holders(engine)
    metrics = engine.metrics
    return {
        "time": time.time(),
        "tensor_parallel_size": engine.config.tensor_parallel_size,
        "max_num_seqs": engine.config.max_num_seqs,
        "running": stats.running,
        "waiting": stats.waiting,
        "step_s": metrics.step_s.quantile(0.5) if metrics.step_s.count else 0.0,
        "blocks": {
            "total": stats.num_blocks,
            "block_size": engine.blocks.block_size,
            "free": stats.free_blocks - stats.cached_blocks,
            "cached": stats.cached_blocks,
            "used": stats.used_blocks,
            "shared": stats.shared_blocks,
            "saved": stats.saved_blocks,
            "state": b64encode(states.tobytes()).decode(),
            "owner": b64encode(owners.tobytes()).decode(),
        },
        "requests": requests,
        "counters": {
            "generated_tokens": stats.generated_tokens,
            "prompt_tokens": metrics.prompt_tokens,
            "requests": metrics.num_requests,
            "steps": stats.steps,
            "preemptions": stats.preemptions,
            "recoveries": stats.recoveries,
            "prefix_hit_tokens": stats.prefix_hit_tokens,
            "prefix_query_tokens": stats.prefix_query_tokens,
        },
        "ttft": _histogram(metrics.first_token_s),
        "gap": _histogram(metrics.token_gap_s),
        "queue": _histogram(metrics.queue_s),
        "step": _histogram(metrics.step_s),
        "mask": _histogram(metrics.mask_s),
    }


def _holders(engine: LLMEngine) -> tuple[Bytes, Int16Array, list[dict[str, Any]]]:
    """What each block is, which request holds it, and the requests themselves."""
    num_blocks, now = engine.blocks.num_blocks, time.perf_counter()
    states, owners, requests = np.zeros(num_blocks, np.uint8), np.full(num_blocks, -1, "<i2"), []
    states[list(engine.blocks.cached_blocks())] = CACHED
    for number, group in enumerate(engine.groups()):
        held = list({block for sequence in group.sequences.values() for block in sequence.block_table})
        states[held] = OWNED
        if number < MAX_REQUESTS:
            owners[held] = number
            requests.append(_request(group, len(held), now - group.accepted_s))
    states[list(engine.blocks.shared_blocks())] = SHARED
    return states, owners, requests


def _request(group: Group, num_blocks: int, age_s: float) -> dict[str, Any]:
    live = list(group.sequences.values())
    return {
        "id": group.request.request_id,
        "state": "running" if any(s.status in SEATED for s in live) else "waiting",
        "sequences": len(live),
        "prompt_tokens": group.request.num_prompt_tokens,
        "cached_tokens": live[0].num_cached,
        "output_tokens": sum(s.num_output_tokens for s in live),
        "blocks": num_blocks,
        "age_s": age_s,
    }


def _histogram(histogram: Histogram) -> dict[str, Any]:
    return {"bounds": list(histogram.bounds), "counts": histogram.counts.tolist(), "sum": histogram.sum}
