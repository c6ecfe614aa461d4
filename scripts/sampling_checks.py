"""Sampling on a GPU for scripts.check_kernels: drawn tokens and log probabilities against the definition, and times."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels import registry, sampling
from scripts.kernel_timing import poison, time_us


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def sampling_parameters(rows: int, size: int, **kept: bool) -> sampling.SamplingTensors:
    """Every kind of row in one batch: greedy, hot, cold, with top_k, top_p, min_p or none."""
    pick = lambda values: torch.tensor([values[i % len(values)] for i in range(rows)], device="cuda")
    params = sampling.SamplingTensors(
        temperature=pick([0.8, 0.0, 1.0, 0.6, 1.4]).float(),
        seeds=torch.arange(rows, device="cuda") * 77777777777,
        positions=torch.arange(rows, device="cuda") + 5,
    )
    if kept.get("filters"):
        params.top_k = pick([0, 50, 3, 0, 1000, 1]).int()
        params.top_p = pick([0.95, 1.0, 0.5, 0.9]).float()
        params.min_p = pick([0.0, 0.05, 0.0]).float()
    if kept.get("adjusted"):
        table = lambda: torch.arange(rows, device="cuda") % 8 - 1
        params.penalties = sampling.Penalties(
            table(), torch.randint(0, 3, (7, size), device="cuda", dtype=torch.int32),
            sampling.pack_bitmask(torch.rand(7, size, device="cuda") < 0.1), pick([0.0, 0.5]).float(),
            pick([0.0, 0.3, 0.7]).float(), pick([1.0, 1.2]).float(),
        )  # fmt: skip
        params.bias = sampling.LogitBias(
            table(), torch.randint(0, size, (rows,), device="cuda"), pick([5.0, -3.0, float("-inf")]).float()
        )
        params.allowed = sampling.pack_bitmask(torch.rand(rows, size, device="cuda") < 0.7)
    return params


def check(small: bool) -> list[dict[str, Any]]:
    """Tokens equal the definition's but for near ties (at most 1 % of the rows); log probabilities to rounding."""
    results = []
    for rows, size in ((7, 300),) if small else ((1, 128256), (64, 2048), (200, 151936), (33, 5001)):
        for kept in ({}, {"filters": True}, {"filters": True, "adjusted": True}):
            logits = rand(rows, size) * 3
            params = sampling_parameters(rows, size, **kept)
            poison()
            with registry.force("torch"):
                expected = sampling.sample(logits, params)
                adjusted = sampling.adjust_logits(logits, params)
            with registry.force("triton"):
                actual = sampling.sample(logits, params)
                error = float((sampling.adjust_logits(logits, params) - adjusted).nan_to_num().abs().max())
            wrong = int((expected != actual).sum())
            name = f"sample {rows}x{size} {'+'.join(kept) or 'plain'}"
            results.append({"check": name, "error": wrong / rows, "passed": wrong <= rows // 100 and error < 1e-4})
        half = logits.bfloat16()
        with registry.force("torch"):
            expected_all = [*sampling.gather_logprobs(half, expected, 5), *sampling.local_argmax(half)]
        with registry.force("triton"):
            actual_all = [*sampling.gather_logprobs(half, expected, 5), *sampling.local_argmax(half)]
        # Equal logits may be listed in either order: compare the top values, and ids through their logits.
        ids = [pair.gather(1, other[2]) for pair, other in ((half, expected_all), (half, actual_all))]
        expected_all[2], actual_all[2] = ids
        error = max(float((a.double() - b.double()).abs().max()) for a, b in zip(expected_all, actual_all, strict=True))
        results.append({"check": f"logprobs, argmax {rows}x{size}", "error": error, "passed": error < 2e-5})
    return results


def timings() -> Iterator[tuple[str, float, int]]:
    """Sampling from Llama-3-8B's vocabulary: what, µs, and bytes of logits."""
    for m in (1, 256):
        logits = [rand(m, 128256, dtype=torch.bfloat16) for _ in range(max(2, 512 // m // 8))]
        size_bytes = m * 128256 * 2
        greedy = sampling_parameters(m, 128256)
        greedy.all_greedy = True
        drawn = sampling_parameters(m, 128256)
        drawn.temperature.fill_(0.8)
        drawn.any_filter = False
        nucleus = sampling_parameters(m, 128256)
        nucleus.temperature.fill_(0.8)
        nucleus.top_p = torch.full((m,), 0.95, device="cuda")
        both = sampling_parameters(m, 128256)
        both.temperature.fill_(0.8)
        both.top_p, both.top_k = nucleus.top_p, torch.full((m,), 50, device="cuda", dtype=torch.int32)
        for name, params in (("greedy", greedy), ("temperature", drawn), ("top_p", nucleus), ("top_k+top_p", both)):
            yield f"sample {name} M={m}", time_us([partial(sampling.sample, x, params) for x in logits]), size_bytes
        tokens = torch.zeros(m, device="cuda", dtype=torch.int64)
        us = time_us([partial(sampling.gather_logprobs, x, tokens, 5) for x in logits])
        yield f"gather_logprobs 5 M={m}", us, size_bytes
