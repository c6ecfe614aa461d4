"""Gated activations: the gate's half of a row through a function, times the other half."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kernels.registry import kernel


@kernel
def silu_and_mul(x: Tensor) -> Tensor:
    """x [..., 2I], gate first -> silu(x[..., :I]) * x[..., I:], a new tensor [..., I] of x's dtype."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


@kernel
def gelu_and_mul(x: Tensor) -> Tensor:
    """x [..., 2I], gate first -> gelu(x[..., :I]) * x[..., I:] with the exact (erf) GELU."""
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate) * up


@kernel
def gelu_tanh_and_mul(x: Tensor) -> Tensor:
    """x [..., 2I], gate first -> gelu(x[..., :I]) * x[..., I:] with the tanh approximation (Gemma)."""
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up
