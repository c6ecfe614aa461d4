"""Matrix products with few rows in Triton: every multiprocessor streams an equal share of the weights.

The work is the list of (column tile, K step) pairs, tile after tile; range r is its steps [r * per_range, (r + 1) *
per_range). The row tiles of a range run next to each other, so that a weight is read from memory once. A tile cut
between ranges leaves partial sums, which the last program to arrive adds up in the order of the ranges: results do not
depend on timing. Source: stream-K, Osama et al. 2023.

Around the product: RMSNorm of the rows before it (its scale is one number a row, so it is applied after the product),
a gated activation or a residual sum behind it. The first weights of a range are fetched into the L2 cache before the
program waits for the kernel that computes x.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from kernels.activation import activate
from kernels.launch import dependent_launch, gating, num_multiprocessors
from kernels.registry import jit, tl

MAX_TILES = 1 << 16


@dataclass(frozen=True)
class LinearConfig:
    """How the product is compiled and how many programs run."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    programs_per_multiprocessor: int = 1
    swap: bool = False  # weights as the left operand
    prefetch: int = 0  # columns of the range's first weights to bring into L2 early

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
        """x [M, K] times weight [N, K] transposed, with what is asked for around it; with act, weight is [2N, K]."""
        return _product(self, x, weight, bias=bias, residual=residual, norm_weight=norm_weight, eps=eps, act=act)


@cache
def _arrived(device: torch.device) -> Tensor:
    """Counters of arrived ranges a tile, zero between launches; products of one device share one stream.

    The first product of a process runs outside of a recording, which would not set them to zero.
    """
    return torch.zeros(MAX_TILES, dtype=torch.int32, device=device)


@jit
def prefetch_l2(address, size):
    """Start fetching `size` bytes from each address (multiples of 16) into the L2 cache."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;", "=r,l,r", [address, size], dtype=tl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@jit
def write_out(
    acc, acc_up, square_sum, bias, residual, out, row, column, rows, stride_r, stride_o, eps,
    N: tl.constexpr, K: tl.constexpr, ACT: tl.constexpr, NORM: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Everything after the product, and the store."""
    mask = (row < rows)[:, None] & (column < N)[None, :]
    if NORM:
        scale = 1.0 / tl.sqrt_rn(square_sum / K + eps)
        acc = acc * scale[:, None]
        acc_up = acc_up * scale[:, None]
    if BIAS:
        acc += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    if ACT != "":
        dtype = out.dtype.element_ty
        gate = activate(acc.to(dtype).to(tl.float32), ACT).to(dtype).to(tl.float32)
        acc = gate * acc_up.to(dtype).to(tl.float32)
    row64 = row.to(tl.int64)[:, None]
    if ADD:
        acc += tl.load(residual + row64 * stride_r + column[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row64 * stride_o + column[None, :], acc.to(out.dtype.element_ty), mask=mask)


@jit
def _prefetch_weights(
    w, step, prefetch, stride_w, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACT: tl.constexpr
):  # fmt: skip
    """Start fetching the weights of a range's first step, `prefetch` columns of them."""
    STEPS: tl.constexpr = (K + BK - 1) // BK
    n = tl.arange(0, BN)
    first_row = tl.minimum(step // STEPS * BN + n, N - 1).to(tl.int64)
    first_k = tl.minimum(step % STEPS * BK, K - prefetch)
    size = n * 0 + prefetch * 2
    prefetch_l2((w + first_row * stride_w + first_k).to(tl.int64), size)
    if ACT != "":
        prefetch_l2((w + (first_row + N) * stride_w + first_k).to(tl.int64), size)


@jit
def _load_columns(rows, k, K: tl.constexpr, EVEN_K: tl.constexpr):
    """Columns k of rows that all exist; zeros past K."""
    if EVEN_K:
        return tl.load(rows + k[None, :])
    else:
        return tl.load(rows + k[None, :], mask=(k < K)[None, :], other=0.0)


@jit
def _add_up(
    partial, partial_squares, place, tile, r_first, r_last, per_range, row_tile,
    STEPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ROW_TILES: tl.constexpr, PLANES: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """The sums that ranges [r_first, r_last] have left of a tile, in their order."""
    acc = tl.zeros([BM, BN], tl.float32)
    acc_up = tl.zeros([BM, BN], tl.float32)
    square_sum = tl.zeros([BM], tl.float32)
    for other in range(r_first, r_last + 1):
        second = (other * per_range // STEPS != tile).to(tl.int32)
        slot = (other * 2 + second) * ROW_TILES + row_tile
        there = partial + slot.to(tl.int64) * (PLANES * BM * BN) + place
        acc += tl.load(there, cache_modifier=".cg")
        if PLANES == 2:
            acc_up += tl.load(there + BM * BN, cache_modifier=".cg")
        if NORM:
            squares = partial_squares + slot * BM + tl.arange(0, BM)
            square_sum += tl.load(squares, cache_modifier=".cg")
    return acc, acc_up, square_sum


@jit(do_not_specialize=["rows", "total", "per_range", "prefetch"])
def _linear_kernel(
    x, w, norm_weight, bias, residual, out, partial, partial_squares, arrived, rows, total, per_range, prefetch, eps,
    stride_x, stride_w, stride_r, stride_o,
    N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ROW_TILES: tl.constexpr,
    SWAP: tl.constexpr, ACT: tl.constexpr, NORM: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr,
    EVEN_K: tl.constexpr, FULL_ROWS: tl.constexpr, STAGES: tl.constexpr, GATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    STEPS: tl.constexpr = (K + BK - 1) // BK
    r = tl.program_id(0) // ROW_TILES
    row_tile = tl.program_id(0) % ROW_TILES
    step = r * per_range
    left = tl.minimum(per_range, total - step)
    n = tl.arange(0, BN)
    kk = tl.arange(0, BK)
    if PDL:
        if not GATE:
            tl.extra.cuda.gdc_launch_dependents()
        if (prefetch > 0) & (row_tile == 0):
            _prefetch_weights(w, step, prefetch, stride_w, N, K, BN, BK, ACT)
        tl.extra.cuda.gdc_wait()
        if GATE:
            tl.extra.cuda.gdc_launch_dependents()
    row = row_tile * BM + tl.arange(0, BM)
    in_rows = (row < rows)[:, None]
    x_rows = x + row.to(tl.int64)[:, None] * stride_x
    is_first_segment = 1
    while left > 0:
        tile = step // STEPS
        first = step % STEPS
        take = tl.minimum(STEPS - first, left)
        column = tile * BN + n
        w_rows = w + tl.minimum(column, N - 1).to(tl.int64)[:, None] * stride_w
        w_up_rows = w_rows + N * stride_w.to(tl.int64)
        square_sum = tl.zeros([BM], tl.float32)
        if SWAP:
            acc = tl.zeros([BN, BM], tl.float32)
            acc_up = tl.zeros([BN, BM], tl.float32)
        else:
            acc = tl.zeros([BM, BN], tl.float32)
            acc_up = tl.zeros([BM, BN], tl.float32)
        for s in tl.range(first, first + take, num_stages=STAGES):
            k = s * BK + kk
            if EVEN_K and FULL_ROWS:
                a = tl.load(x_rows + k[None, :])
            else:
                a = tl.load(x_rows + k[None, :], mask=in_rows & (k < K)[None, :], other=0.0)
            b = _load_columns(w_rows, k, K, EVEN_K)
            if NORM:
                dtype = a.dtype
                a = a.to(tl.float32)
                square_sum += tl.sum(a * a, 1)
                a = (a * tl.load(norm_weight + k, mask=k < K, other=0.0).to(tl.float32)[None, :]).to(dtype)
            if SWAP:
                acc = tl.dot(b, tl.trans(a), acc, input_precision="ieee")
            else:
                acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
            if ACT != "":
                b_up = _load_columns(w_up_rows, k, K, EVEN_K)
                if SWAP:
                    acc_up = tl.dot(b_up, tl.trans(a), acc_up, input_precision="ieee")
                else:
                    acc_up = tl.dot(a, tl.trans(b_up), acc_up, input_precision="ieee")
        if SWAP:
            acc = tl.trans(acc)
            acc_up = tl.trans(acc_up)
        if take == STEPS:
            write_out(
                acc, acc_up, square_sum, bias, residual, out, row, column, rows, stride_r, stride_o, eps,
                N, K, ACT, NORM, ADD, BIAS,
            )  # fmt: skip
        else:
            place = tl.arange(0, BM)[:, None] * BN + n[None, :]
            PLANES: tl.constexpr = 1 if ACT == "" else 2
            slot = (r * 2 + 1 - is_first_segment) * ROW_TILES + row_tile
            here = partial + slot.to(tl.int64) * (PLANES * BM * BN) + place
            tl.store(here, acc)
            if ACT != "":
                tl.store(here + BM * BN, acc_up)
            if NORM:
                tl.store(partial_squares + slot * BM + tl.arange(0, BM), square_sum)
            tl.debug_barrier()
            r_first = tile * STEPS // per_range
            r_last = (tile * STEPS + STEPS - 1) // per_range
            counter = arrived + tile * ROW_TILES + row_tile
            count = tl.atomic_add(counter, 1, sem="acq_rel")
            if count == r_last - r_first:
                acc, acc_up, square_sum = _add_up(
                    partial, partial_squares, place, tile, r_first, r_last, per_range, row_tile,
                    STEPS, BM, BN, ROW_TILES, PLANES, NORM,
                )  # fmt: skip
                write_out(
                    acc, acc_up, square_sum, bias, residual, out, row, column, rows, stride_r, stride_o, eps,
                    N, K, ACT, NORM, ADD, BIAS,
                )  # fmt: skip
                tl.store(counter, 0)
        step += take
        left -= take
        is_first_segment = 0


def _product(
    config: LinearConfig,
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    act: str,
) -> Tensor:
    rows, size = x.shape
    num_columns = weight.shape[0] // (2 if act else 1)
    out = torch.empty(rows, num_columns, dtype=x.dtype, device=x.device)
    if rows == 0:
        return out
    row_tiles = -(-rows // config.block_m)
    programs = num_multiprocessors(x.device) * config.programs_per_multiprocessor
    num_ranges = max(1, programs // row_tiles)
    num_tiles = -(-num_columns // config.block_n)
    assert num_tiles * row_tiles <= MAX_TILES
    total = num_tiles * -(-size // config.block_k)
    per_range = -(-total // num_ranges)
    num_ranges = -(-total // per_range)
    slots = num_ranges * 2 * row_tiles
    planes = 2 if act else 1
    partial = torch.empty(slots * planes * config.block_m * config.block_n, dtype=torch.float32, device=x.device)
    squares = torch.empty(slots * config.block_m if norm_weight is not None else 1, device=x.device)
    prefetch = min(config.prefetch, size)
    _linear_kernel[(num_ranges * row_tiles,)](
        x, weight, x if norm_weight is None else norm_weight, x if bias is None else bias,
        x if residual is None else residual, out, partial, squares, _arrived(x.device), rows, total, per_range,
        prefetch, eps,
        x.stride(0), weight.stride(0), 0 if residual is None else residual.stride(0), out.stride(0),
        N=num_columns, K=size, BM=config.block_m, BN=config.block_n, BK=config.block_k, ROW_TILES=row_tiles,
        SWAP=config.swap, ACT=act, NORM=norm_weight is not None, ADD=residual is not None, BIAS=bias is not None,
        EVEN_K=size % config.block_k == 0, FULL_ROWS=rows % config.block_m == 0,
        STAGES=config.num_stages, GATE=gating(), num_warps=config.num_warps, **dependent_launch(x),
    )  # fmt: skip
    return out
