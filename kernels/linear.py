"""Linear layers: the product, and the norm, activation or residual sum next to it in one kernel.

With few rows a product is a read of its weights: kernels.linear_gemv, and linear_few (on Hopper GPUs) or linear_stream,
read them at the memory's speed. With more rows it is kernels.linear_hopper on Hopper GPUs, where that is faster
(kernels.linear_configs chooses); else the definitions run: cuBLAS for the product, the operations around it each as a
kernel of its own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import linear_few
from kernels.activation import silu_and_mul
from kernels.hopper import uses, why_not
from kernels.launch import num_multiprocessors
from kernels.linear_configs import Config, linear_config
from kernels.linear_few import FewConfig
from kernels.linear_hopper import HopperConfig
from kernels.registry import kernel, on_gpu
from kernels.rms_norm import rms_norm


@kernel
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [M, K] times weight [N, K] transposed, plus bias [N] -> [M, N] in x's dtype."""
    return F.linear(x, weight, bias)


@kernel
def linear_add(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """x [M, K] times weight [N, K] transposed, plus residual [M, N] -> [M, N], the new residual stream."""
    return F.linear(x, weight) + residual


@kernel
def norm_linear(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """RMS-normalise the rows of x [M, K], then multiply: rms_norm(x) times weight [N, K] transposed, plus bias [N].

    The fused kernel applies a row's scale to the sums of its products, in float32; rounding differs by that order.
    """
    return F.linear(rms_norm(x, norm_weight, eps), weight, bias)


@kernel
def norm_linear_silu_and_mul(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor) -> Tensor:
    """The first half of a gated MLP: x [M, K], weight [2I, K] with the gate's rows first -> [M, I].

    silu(n @ gate) * (n @ up) with n = rms_norm(x).
    """
    return silu_and_mul(F.linear(rms_norm(x, norm_weight, eps), weight))


@kernel
def linear_silu_and_mul(x: Tensor, weight: Tensor) -> Tensor:
    """silu(x @ gate) * (x @ up) of x [M, K] and weight [2I, K], the gate's rows first -> [M, I]."""
    return silu_and_mul(F.linear(x, weight))


@kernel
def linear_add_for_norm(
    x: Tensor, weight: Tensor, residual: Tensor, norm_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """linear_add, and what is left of an RMSNorm of it when its scale is applied later.

    Returns (the new residual stream [M, N], it times norm_weight, its square sums [parts, M] float32).
    """
    total = F.linear(x, weight) + residual
    return total, total * norm_weight, total.float().pow(2).sum(-1)[None]


@kernel
def scaled_linear(
    x: Tensor, square_sums: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None
) -> Tensor:  # fmt: skip
    """norm_linear of a stream of which x and square_sums are linear_add_for_norm's; rounding differs by the order."""
    return F.linear(_scaled(x, square_sums, eps), weight, bias)


@kernel
def scaled_linear_silu_and_mul(x: Tensor, square_sums: Tensor, eps: float, weight: Tensor) -> Tensor:
    """norm_linear_silu_and_mul of a stream of which x and square_sums are linear_add_for_norm's."""
    return silu_and_mul(F.linear(_scaled(x, square_sums, eps), weight))


def _scaled(x: Tensor, square_sums: Tensor, eps: float) -> Tensor:
    scale = torch.rsqrt(square_sums.sum(0) / x.shape[1] + eps)
    return (x.float() * scale[:, None]).to(x.dtype)


def _why_not_product(operation: str, x: Tensor, weight: Tensor, *others: Tensor | None) -> str | None:
    """Others: bias, residual or the norm's weight."""
    if x.dim() != 2:
        return f"x has {x.dim()} dimensions"
    if x.dtype not in (torch.float16, torch.bfloat16) and on_gpu(x):
        return f"{x.dtype} has no fast matrix unit here"
    if weight.dtype != x.dtype or weight.stride(-1) != 1 or x.stride(-1) != 1:
        return "x and weight differ in dtype, or are not contiguous along K"
    config = _find(operation, x, weight)
    if config is None:
        return "the library's product is faster with this many rows"
    if isinstance(config, HopperConfig):
        if any(tensor.stride(0) % 8 or tensor.storage_offset() % 8 for tensor in (x, weight)):
            return "rows do not start at multiples of 16 bytes"
        return why_not(x.device)
    if isinstance(config, FewConfig):
        return linear_few.unsupported(x, weight, *others, gated="silu" in operation)
    return None


def _find(operation: str, x: Tensor, weight: Tensor) -> Config | None:
    multiprocessors = num_multiprocessors(x.device) if on_gpu(x) else 132
    shape = x.shape[0], weight.shape[0], x.shape[1]
    return linear_config(operation, *shape, multiprocessors, hopper=why_not(x.device) is None)


def _why_not_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> str | None:
    return _why_not_product("linear", x, weight, bias)


def _why_not_linear_add(x: Tensor, weight: Tensor, residual: Tensor) -> str | None:
    if residual.stride(-1) != 1 or residual.stride(0) % 2 or residual.storage_offset() % 2:
        return "a residual's row is not contiguous, or starts at an odd place"
    return _why_not_product("linear_add", x, weight, residual)


def _why_not_norm_linear(
    x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None  # noqa: ARG001
) -> str | None:  # fmt: skip
    return _why_not_product("norm_linear", x, weight, norm_weight, bias)


def _why_not_norm_gated(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor) -> str | None:  # noqa: ARG001
    return _why_not_product("norm_linear_silu_and_mul", x, weight, norm_weight)


def _why_not_gated(x: Tensor, weight: Tensor) -> str | None:
    return _why_not_product("linear_silu_and_mul", x, weight)


def _why_not_for_norm(x: Tensor, weight: Tensor, residual: Tensor, norm_weight: Tensor) -> str | None:
    reason = _why_not_linear_add(x, weight, residual) or _why_not_norms(x, "linear_add", weight)
    return reason or ("a norm's weight of another type" if norm_weight.dtype != x.dtype else None)


def _why_not_scaled(
    x: Tensor, square_sums: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None  # noqa: ARG001
) -> str | None:  # fmt: skip
    return _why_not_product("linear", x, weight, bias) or _why_not_norms(x, "linear", weight)


def _why_not_scaled_gated(x: Tensor, square_sums: Tensor, eps: float, weight: Tensor) -> str | None:  # noqa: ARG001
    return _why_not_product("linear_silu_and_mul", x, weight) or _why_not_norms(x, "linear_silu_and_mul", weight)


def _why_not_norms(x: Tensor, operation: str, weight: Tensor) -> str | None:
    if not uses("norms") or not isinstance(_find(operation, x, weight), HopperConfig):
        return "norms join in with Hopper's large products only"
    return "a float16 residual stream may overflow before it is normalised" if x.dtype == torch.float16 else None


def _config(operation: str, x: Tensor, weight: Tensor) -> Any:
    config = _find(operation, x, weight)
    assert config is not None
    return config


@linear.triton(supports=_why_not_linear)
def _linear_triton(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _config("linear", x, weight).product(x, weight, bias=bias)


@linear_add.triton(supports=_why_not_linear_add)
def _linear_add_triton(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    return _config("linear_add", x, weight).product(x, weight, residual=residual)


@norm_linear.triton(supports=_why_not_norm_linear)
def _norm_linear_triton(
    x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    config = _config("norm_linear", x, weight)
    return config.product(x, weight, bias=bias, norm_weight=norm_weight, eps=eps)


@norm_linear_silu_and_mul.triton(supports=_why_not_norm_gated)
def _norm_linear_silu_and_mul_triton(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor) -> Tensor:
    config = _config("norm_linear_silu_and_mul", x, weight)
    return config.product(x, weight, norm_weight=norm_weight, eps=eps, act="silu")


@linear_silu_and_mul.triton(supports=_why_not_gated)
def _linear_silu_and_mul_triton(x: Tensor, weight: Tensor) -> Tensor:
    return _config("linear_silu_and_mul", x, weight).product(x, weight, act="silu")


@linear_add_for_norm.triton(supports=_why_not_for_norm)
def _linear_add_for_norm_fast(
    x: Tensor, weight: Tensor, residual: Tensor, norm_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    found: tuple[Tensor, Tensor, Tensor]
    found = _config("linear_add", x, weight).product_for_norm(x, weight, residual, norm_weight)
    return found


@scaled_linear.triton(supports=_why_not_scaled)
def _scaled_linear_fast(
    x: Tensor, square_sums: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None
) -> Tensor:  # fmt: skip
    return _config("linear", x, weight).product(x, weight, bias=bias, square_sums=square_sums, eps=eps)


@scaled_linear_silu_and_mul.triton(supports=_why_not_scaled_gated)
def _scaled_linear_silu_and_mul_fast(x: Tensor, square_sums: Tensor, eps: float, weight: Tensor) -> Tensor:
    config = _config("linear_silu_and_mul", x, weight)
    return config.product(x, weight, act="silu", square_sums=square_sums, eps=eps)
