"""Gated activations: the gate's half of a row through a function, times the other half."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.launch import dependent_launch, next_power_of_2
from kernels.registry import jit, kernel, tl


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


@jit
def _act_and_mul_kernel(
    x, out, size, stride_x, ACT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x + row * stride_x + i, mask=i < size, other=0.0)
    up = tl.load(x + row * stride_x + size + i, mask=i < size, other=0.0)
    value = activate(gate.to(tl.float32), ACT).to(gate.dtype).to(tl.float32) * up.to(tl.float32)
    tl.store(out + row * size + i, value.to(out.dtype.element_ty), mask=i < size)


@jit
def activate(x, ACT: tl.constexpr):
    """The activation ACT ("silu", "gelu", "gelu_tanh") of float32 x."""
    if ACT == "silu":
        return x / (1.0 + tl.exp(-x))
    elif ACT == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        t = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x * (1.0 - 1.0 / (tl.exp(2.0 * t) + 1.0))


def _launch(x: Tensor, act: str) -> Tensor:
    size = x.shape[-1] // 2
    rows = x.reshape(-1, 2 * size)
    out = torch.empty((*x.shape[:-1], size), dtype=x.dtype, device=x.device)
    block = min(1024, next_power_of_2(size))
    if rows.shape[0]:
        _act_and_mul_kernel[(rows.shape[0], -(-size // block))](
            rows, out, size, rows.stride(0), ACT=act, BLOCK=block, num_warps=max(1, block // 256), **dependent_launch(x)
        )  # fmt: skip
    return out


def _why_not(x: Tensor) -> str | None:
    return None if x.stride(-1) == 1 else "a row's elements are not contiguous"


@silu_and_mul.triton(supports=_why_not)
def _silu_and_mul_triton(x: Tensor) -> Tensor:
    return _launch(x, "silu")


@gelu_and_mul.triton(supports=_why_not)
def _gelu_and_mul_triton(x: Tensor) -> Tensor:
    return _launch(x, "gelu")


@gelu_tanh_and_mul.triton(supports=_why_not)
def _gelu_tanh_and_mul_triton(x: Tensor) -> Tensor:
    return _launch(x, "gelu_tanh")
