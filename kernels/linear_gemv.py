"""Products of one row in Triton: a read of the weights, straight into registers.

A program owns BN columns of the result (BN rows of the weight) and reads them whole: no partial sums, no shared memory,
so that the next kernel's programs fit beside it and start on their own weights: a program loads its first tile before
it waits for the kernel that computes x.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.launch import dependent_launch, gating, next_power_of_2
from kernels.linear_stream import write_out
from kernels.registry import jit, tl


@dataclass(frozen=True)
class GemvConfig:
    """How the product is compiled: columns a program, K a tile."""

    block_n: int
    block_k: int
    num_warps: int = 4

    def product(
        self,
        x: Tensor,
        weight: Tensor,
        *,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        norm_weight: Tensor | None = None,
        eps: float = 0.0,
        act: str = "",
    ) -> Tensor:
        """x [1, K] times weight [N, K] transposed, with what is asked for around it; with act, weight is [2N, K]."""
        return _product(self, x, weight, bias=bias, residual=residual, norm_weight=norm_weight, eps=eps, act=act)


@jit
def sum_runs(x, BN: tl.constexpr, BK: tl.constexpr):
    """[BN, BK] -> [BN, BK / 8]: sums of runs of 8, each of which one thread holds."""
    return tl.sum(tl.reshape(x, [BN, BK // 8, 8]), 2)


@jit
def _gemv_kernel(
    x, w, norm_weight, bias, residual, out, eps, stride_w,
    N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACT: tl.constexpr, NORM: tl.constexpr,
    ADD: tl.constexpr, BIAS: tl.constexpr, GATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)[None, :]
    w_rows = w + tl.minimum(column, N - 1).to(tl.int64)[:, None] * stride_w
    w_up_rows = w_rows + N * stride_w.to(tl.int64)
    if PDL and not GATE:
        tl.extra.cuda.gdc_launch_dependents()
    b = tl.load(w_rows + k, mask=k < K, other=0.0)
    b_up = b
    if ACT != "":
        b_up = tl.load(w_up_rows + k, mask=k < K, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        if GATE:
            tl.extra.cuda.gdc_launch_dependents()
    a = tl.load(x + k, mask=k < K, other=0.0)
    acc = tl.zeros([BN, BK // 8], tl.float32)
    acc_up = tl.zeros([BN, BK // 8], tl.float32)
    squares = tl.zeros([1, BK], tl.float32)
    for _ in range(0, K, BK):
        a32 = a.to(tl.float32)
        if NORM:
            squares += a32 * a32
            a32 = a32 * tl.load(norm_weight + k, mask=k < K, other=0.0).to(tl.float32)
        k += BK
        b_next = tl.load(w_rows + k, mask=k < K, other=0.0)
        b_up_next = b_next
        if ACT != "":
            b_up_next = tl.load(w_up_rows + k, mask=k < K, other=0.0)
        a = tl.load(x + k, mask=k < K, other=0.0)
        acc += sum_runs(a32 * b.to(tl.float32), BN, BK)
        if ACT != "":
            acc_up += sum_runs(a32 * b_up.to(tl.float32), BN, BK)
        b = b_next
        b_up = b_up_next
    total = tl.sum(acc, 1)[None, :]
    total_up = tl.sum(acc_up, 1)[None, :]
    row = tl.zeros([1], tl.int32)
    write_out(
        total, total_up, tl.sum(squares, 1), bias, residual, out, row, column, 1, 0, 0, eps, N, K, ACT, NORM, ADD, BIAS
    )


def _product(
    config: GemvConfig,
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    act: str,
) -> Tensor:
    assert x.shape[0] == 1
    size = x.shape[1]
    num_columns = weight.shape[0] // (2 if act else 1)
    out = torch.empty(1, num_columns, dtype=x.dtype, device=x.device)
    block_k = min(config.block_k, next_power_of_2(size))
    _gemv_kernel[(-(-num_columns // config.block_n),)](
        x, weight, x if norm_weight is None else norm_weight, x if bias is None else bias,
        x if residual is None else residual, out, eps, weight.stride(0),
        N=num_columns, K=size, BN=config.block_n, BK=block_k, ACT=act, NORM=norm_weight is not None,
        ADD=residual is not None, BIAS=bias is not None,
        GATE=gating(), num_warps=config.num_warps, **dependent_launch(x),
    )  # fmt: skip
    return out
