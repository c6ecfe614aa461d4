"""RMSNorm, alone and fused with the residual add before it."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.launch import dependent_launch, next_power_of_2
from kernels.registry import jit, kernel, tl


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


@jit
def _rms_norm_kernel(
    x, residual, weight, out, total_out, stride_x, stride_r, eps, H: tl.constexpr, BLOCK: tl.constexpr,
    ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < H
    w = tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    value = tl.load(x + row * stride_x + i, mask=inside, other=0.0)
    dtype = value.dtype
    if ADD:
        other = tl.load(residual + row * stride_r + i, mask=inside, other=0.0)
        value = (value.to(tl.float32) + other.to(tl.float32)).to(dtype)
        tl.store(total_out + row * H + i, value, mask=inside)
    value = value.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(value * value, 0) / H + eps)
    normed = (value * scale).to(dtype).to(tl.float32)
    tl.store(out + row * H + i, (normed * w).to(out.dtype.element_ty), mask=inside)


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Run the kernel over x's rows; returns (normed, sum), the sum being x where there is no residual."""
    size = x.shape[-1]
    rows = x.reshape(-1, size)
    added = rows if residual is None else residual.reshape(-1, size)
    out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    total = x if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = next_power_of_2(size)
    if rows.shape[0]:
        _rms_norm_kernel[(rows.shape[0],)](
            rows, added, weight, out, total, rows.stride(0), added.stride(0), eps, H=size, BLOCK=block,
            ADD=residual is not None, num_warps=max(1, min(16, block // 512)), **dependent_launch(x),
        )  # fmt: skip
    return out, total


def _why_not(x: Tensor, *tensors: object, **_: object) -> str | None:
    if x.shape[-1] > 32768:
        return f"rows of {x.shape[-1]} elements are over 32768"
    for tensor in (x, *tensors):
        if isinstance(tensor, Tensor) and tensor.stride(-1) != 1:
            return "a row's elements are not contiguous"
    return None


@rms_norm.triton(supports=_why_not)
def _rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _launch(x, None, weight, eps)[0]


@fused_add_rms_norm.triton(supports=_why_not)
def _fused_add_rms_norm_triton(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _launch(x, residual, weight, eps)
