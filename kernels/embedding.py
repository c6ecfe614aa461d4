"""Token embedding over a rank's slice of the vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.launch import dependent_launch, next_power_of_2
from kernels.registry import jit, kernel, tl


@kernel
def embedding(token_ids: Tensor, weight: Tensor, vocab_start: int = 0) -> Tensor:
    """Look up each token's row in this rank's slice of the embedding matrix.

    token_ids [T] int64; weight [rows, H], the rows of tokens [vocab_start, vocab_start + rows). Returns [T, H]; a token
    outside the slice gives zeros, so that the sum over ranks is the embedding.
    """
    rows = weight.shape[0]
    local = token_ids - vocab_start
    outside = (local < 0) | (local >= rows)
    return F.embedding(local.clamp(0, rows - 1), weight).masked_fill(outside[:, None], 0)


@jit
def _embedding_kernel(
    token_ids, weight, out, rows, vocab_start, stride_w, H: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    t = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    local = tl.load(token_ids + t) - vocab_start
    if (local >= 0) & (local < rows):
        tl.store(out + t * H + i, tl.load(weight + local * stride_w + i, mask=i < H), mask=i < H)
    else:
        tl.store(out + t * H + i, tl.zeros([BLOCK], out.dtype.element_ty), mask=i < H)


def _why_not(token_ids: Tensor, weight: Tensor, vocab_start: int = 0) -> str | None:  # noqa: ARG001
    return None if weight.stride(-1) == 1 else "a row's elements are not contiguous"


@embedding.triton(supports=_why_not)
def _embedding_triton(token_ids: Tensor, weight: Tensor, vocab_start: int = 0) -> Tensor:
    rows, size = weight.shape
    out = torch.empty((len(token_ids), size), dtype=weight.dtype, device=weight.device)
    block = min(2048, next_power_of_2(size))
    if len(token_ids):
        _embedding_kernel[(len(token_ids), -(-size // block))](
            token_ids, weight, out, rows, vocab_start, weight.stride(0), H=size, BLOCK=block, num_warps=4,
            **dependent_launch(out),
        )  # fmt: skip
    return out
