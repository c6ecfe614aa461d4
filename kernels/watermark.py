"""A watermark in drawn text: half of the vocabulary, chosen anew by each token, is made likelier for the next.

Source: Kirchenbauer et al. 2023, "A Watermark for Large Language Models", algorithm 2 (soft red list), with the gamma
and delta of Text Generation Inference. Where that permutes the vocabulary by a generator seeded with the previous
token, a counter-based hash decides each token's membership alone: the list has gamma of the vocabulary on average.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.launch import dependent_launch, next_power_of_2
from kernels.philox import philox
from kernels.registry import jit, kernel, tl

GAMMA = 0.5
"""Share of the vocabulary on a green list."""
DELTA = 2.0
"""Added to the logits of a green list's tokens."""
KEY = 15485863
"""The hash's key, the paper's own."""
_BELOW = round(GAMMA * 2**32)


def is_green(previous: Tensor, token_ids: Tensor) -> Tensor:
    """Whether each token is on the green list of the token before it. previous, token_ids [n] int64; bool [n]."""
    lanes = torch.stack(philox(_key(previous), previous, token_ids // 4))
    return lanes.gather(0, (token_ids % 4)[None])[0] < _BELOW


@kernel
def add_watermark(logits: Tensor, previous: Tensor) -> Tensor:
    """Make the green list of each row's previous token likelier.

    logits [B, V], any float dtype; previous [B] int64, the token before the one to be drawn; -1 leaves a row as it is.
    Returns a new float32 [B, V].
    """
    size = logits.shape[1]
    groups = torch.arange(-(-size // 4), device=logits.device)
    lanes = philox(_key(previous)[:, None], previous[:, None], groups[None])
    green = torch.stack(lanes, dim=-1).flatten(1)[:, :size] < _BELOW
    return logits.float() + DELTA * (green & (previous >= 0)[:, None])


def _key(like: Tensor) -> Tensor:
    return torch.full_like(like, KEY)


@jit
def _watermark_kernel(
    logits, previous, out, stride_l, key, below, DELTA: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    b = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    i = first + tl.arange(0, BLOCK)
    token = tl.load(previous + b)
    x = tl.load(logits + b * stride_l + i, mask=i < V, other=0.0).to(tl.float32)
    group = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = group * 0
    r0, r1, r2, r3 = tl.philox(key, group, zero + token.to(tl.uint32), zero, zero)
    bits = tl.interleave(tl.interleave(r0, r2), tl.interleave(r1, r3))
    green = (bits.to(tl.int64) < below) & (token >= 0)
    tl.store(out + b * V + i, tl.where(green, x + DELTA, x), mask=i < V)


def _why_not(logits: Tensor, previous: Tensor) -> str | None:  # noqa: ARG001
    return None if logits.stride(-1) == 1 else "a row's elements are not contiguous"


@add_watermark.triton(supports=_why_not)
def _add_watermark_triton(logits: Tensor, previous: Tensor) -> Tensor:
    rows, size = logits.shape
    out = torch.empty((rows, size), dtype=torch.float32, device=logits.device)
    block = min(2048, max(16, next_power_of_2(size)))
    if rows:
        _watermark_kernel[(rows, -(-size // block))](
            logits, previous, out, logits.stride(0), KEY, _BELOW, DELTA=DELTA, V=size, BLOCK=block, num_warps=4,
            **dependent_launch(out),
        )  # fmt: skip
    return out
