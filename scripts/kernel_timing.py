"""Timing GPU kernels: replays of a captured graph over rotating inputs, and the device's two ceilings."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def capture(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """Record the calls, in order, into a graph. Each has run once before, so that nothing compiles while recording."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        stream.synchronize()
        graph.capture_begin()
        for call in calls:
            call()
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph


def time_us(calls: Sequence[Callable[[], object]], budget_ms: float = 12.0) -> float:
    """Median microseconds of one call: the calls (over different inputs) recorded once, replayed again and again."""
    graph = capture(calls)
    graph.replay()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    repeats = max(5, min(40, int(budget_ms / max(start.elapsed_time(end), 1e-3))))
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in times) * 1e3 / len(calls)


def sustained_us(calls: Sequence[Callable[[], object]], seconds: float = 0.5) -> float:
    """Mean microseconds of one call in the second half of a stretch of load, when the power limit sets the clock."""
    graph = capture(list(calls) * max(1, 60 // len(calls)))
    num_calls, began_s = len(calls) * max(1, 60 // len(calls)), time.perf_counter()
    counted_from_s, count = 0.0, 0
    while (now_s := time.perf_counter()) - began_s < seconds:
        if not counted_from_s and now_s - began_s > seconds / 2:
            counted_from_s, count = now_s, 0
        graph.replay()
        torch.cuda.synchronize()
        count += 1
    return (now_s - counted_from_s) / count / num_calls * 1e6


def copy_bandwidth() -> float:
    """Bytes a second, read plus written, of a large device-to-device copy."""
    source = torch.randn(1 << 30, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    times = []
    for _ in range(5):  # not in a graph, where a copy is not a kernel
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return 2 * source.nbytes / (statistics.median(times) * 1e-3)


def matmul_rate() -> float:
    """Floating-point operations a second of an 8192³ bf16 product."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / (time_us([lambda: torch.mm(a, b)], 60) * 1e-6)


def poison() -> None:
    """Fill the allocator's free memory with NaN, so that an element no kernel wrote shows."""
    blocks = [torch.full((size,), float("nan"), device="cuda") for size in (1 << 8, 1 << 14, 1 << 18, 1 << 22, 1 << 24)]
    del blocks


def relative_error(out: Tensor, reference: Tensor) -> float:
    """‖out - reference‖ / ‖reference‖ in float64; NaN when either has one."""
    difference = (out.double() - reference.double()).norm()
    return float(difference / reference.double().norm().clamp(min=1e-30))


def paged_cache(
    context_lens: list[int], block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, spare: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Random K and V caches [N, block_size, Hkv, D] and shuffled block tables [B, M] that hold these contexts."""
    counts = [-(-length // block_size) for length in context_lens]
    width = max(counts) + spare
    total = len(counts) * width
    tables = torch.randperm(total, device="cuda", dtype=torch.int32).view(len(counts), width)
    shape = (total, block_size, num_kv_heads, head_dim)
    k, v = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(2))
    return k, v, tables
