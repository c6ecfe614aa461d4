"""Rotary position embedding, NeoX style: a head's first and second half are the two coordinates."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.registry import kernel


def rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate x [T, H, D] by cos_sin [T, R] (cosines in the first R/2 columns, sines in the rest); R <= D.

    Computed in float32 and rounded once; columns from R on pass through. Returns a new tensor.
    """
    half = cos_sin.shape[-1] // 2
    cos = cos_sin[:, None, :half]
    sin = cos_sin[:, None, half:]
    x1 = x[..., :half].float()
    x2 = x[..., half : 2 * half].float()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out[..., :half] = x1 * cos - x2 * sin
    out[..., half : 2 * half] = x2 * cos + x1 * sin
    if 2 * half < x.shape[-1]:
        out[..., 2 * half :] = x[..., 2 * half :]
    return out


@kernel
def apply_rotary(q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the queries and keys of each token to its position.

    q [T, Hq, D]; k [T, Hk, D]; cos_sin [max_position, R] float32 with R/2 cosines, then R/2 sines, R <= D (the columns
    from R on are not rotated); positions [T] int64. Returns new (q, k).
    Source: RoFormer, Su et al. 2021, in GPT-NeoX's layout.
    """
    rows = cos_sin[positions]
    return rotate(q, rows), rotate(k, rows)
