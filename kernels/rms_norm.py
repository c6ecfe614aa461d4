"""RMSNorm, alone and fused with the residual add before it."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.registry import kernel


@kernel
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide each row by its root mean square and scale it: x / sqrt(mean(x²) + eps) · weight.

    x [..., H]; weight [H]. Normalises in float32, rounds to x's dtype, then multiplies by weight, as Llama does.
    Returns a new tensor of x's shape and dtype.
    """
    x32 = x.float()
    scale = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (x32 * scale).to(x.dtype)


@kernel
def fused_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add x to the residual stream and normalise the sum.

    x, residual [..., H] of one dtype; weight [H]. Returns (rms_norm(x + residual), x + residual), both new tensors;
    the sum is rounded to x's dtype before it is normalised.
    """
    total = x + residual
    return rms_norm.definition(total, weight, eps), total
