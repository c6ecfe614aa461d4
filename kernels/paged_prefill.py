"""Prefill attention in Triton: one program a tile of BLOCK_M queries of one sequence and head.

Keys and values are read through the block table. Tiles that every query of the program sees whole need no mask; those
on the diagonal and at the window's edge do. The longest tiles (the last queries) start first.
Symbols as in FlashAttention, Dao 2023: m running maximum, l running sum, acc running output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.launch import dependent_launch, next_power_of_2
from kernels.registry import jit, tl


@dataclass(frozen=True)
class PrefillConfig:
    """How the prefill kernel is compiled."""

    block_m: int = 128
    block_n: int = 64
    num_warps: int = 8
    num_stages: int = 3


def prefill_config(head_dim: int, element_size: int, max_seqlen_q: int) -> PrefillConfig:
    """The measured choice (see BENCHMARKS.md) for a head size, bytes an element and the longest run of new tokens."""
    row_bytes = next_power_of_2(head_dim) * element_size
    if row_bytes > 512:
        return PrefillConfig(block_m=32, block_n=16, num_warps=4, num_stages=1)
    if row_bytes > 256:
        return PrefillConfig(block_m=64, block_n=32, num_warps=4, num_stages=2)
    if max_seqlen_q <= 256:
        return PrefillConfig(block_m=64, num_warps=4, num_stages=2)
    return PrefillConfig()


@jit
def _tiles(
    acc, l, m, q, k_cache, v_cache, table, start, end, position, context_len, h_kv, scale, softcap,  # noqa: E741
    stride_kn, stride_ks, stride_kh, stride_vn, stride_vs, stride_vh,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, MASKED: tl.constexpr, SAME_STRIDES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Fold keys [start, end), whole tiles, into the running softmax; MASKED looks at each (query, key) pair."""
    d = tl.arange(0, D)
    in_d = d < HEAD_DIM
    # A tile's blocks are looked up one tile ahead, so that K and V are no second link in a chain of loads.
    index = start + tl.arange(0, BLOCK_N)
    next_block = tl.load(table + index // BLOCK_SIZE, mask=index < context_len, other=0)
    for n in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        index = n + tl.arange(0, BLOCK_N)
        block = next_block.to(tl.int64)
        offset = index % BLOCK_SIZE
        k_rows = block * stride_kn + offset * stride_ks + h_kv * stride_kh
        if SAME_STRIDES:
            v_rows = k_rows
        else:
            v_rows = block * stride_vn + offset * stride_vs + h_kv * stride_vh
        ahead = index + BLOCK_N
        next_block = tl.load(table + ahead // BLOCK_SIZE, mask=ahead < context_len, other=0)
        k_ptrs = k_cache + k_rows[:, None] + d[None, :]
        v_ptrs = v_cache + v_rows[:, None] + d[None, :]
        if MASKED:
            inside = (index < context_len)[:, None] & in_d[None, :]
            k = tl.load(k_ptrs, mask=inside, other=0.0)
            v = tl.load(v_ptrs, mask=inside, other=0.0)
        elif HEAD_DIM == D:
            k = tl.load(k_ptrs)
            v = tl.load(v_ptrs)
        else:
            k = tl.load(k_ptrs, mask=in_d[None, :], other=0.0)
            v = tl.load(v_ptrs, mask=in_d[None, :], other=0.0)
        s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
        if SOFTCAP:
            s = softcap * (1.0 - 2.0 / (tl.exp2(s * (scale * 2.0 * 1.4426950408889634 / softcap)) + 1.0))
            s = s * 1.4426950408889634
            factor = 1.0
        else:
            factor = scale
        if MASKED:
            seen = index[None, :] <= position[:, None]
            if WINDOW > 0:
                seen = seen & (index[None, :] > position[:, None] - WINDOW)
            s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * factor)
        if MASKED:
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        else:
            shift = m_new
        p = tl.exp2(s * factor - shift[:, None])
        decay = tl.exp2(m - shift)
        l = l * decay + tl.sum(p, 1)  # noqa: E741
        acc = acc * decay[:, None]
        acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc, input_precision="ieee")
        m = m_new
    return acc, l, m


@jit(do_not_specialize=["num_tiles"])
def _prefill_kernel(
    q, k_cache, v_cache, tables, context_lens, cu_seqlens_q, out, num_tiles, scale, softcap,
    stride_qt, stride_qh, stride_kn, stride_ks, stride_kh, stride_vn, stride_vs, stride_vh, stride_tb, stride_ot,
    stride_oh,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SAME_STRIDES: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    h = tl.program_id(0)
    seq = tl.program_id(1)
    tile = num_tiles - 1 - tl.program_id(2)
    row_start = tl.load(cu_seqlens_q + seq)
    num_new = tl.load(cu_seqlens_q + seq + 1) - row_start
    if tile * BLOCK_M < num_new:
        context_len = tl.load(context_lens + seq)
        row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        d = tl.arange(0, D)
        in_rows = (row < num_new)[:, None] & (d < HEAD_DIM)[None, :]
        q_ptrs = q + (row_start + row).to(tl.int64)[:, None] * stride_qt + h * stride_qh + d[None, :]
        qs = tl.load(q_ptrs, mask=in_rows, other=0.0)
        cached = context_len - num_new
        position = cached + row
        # Keys [low, high) are seen by some query of the tile, keys [full_low, full_high) by all of them.
        high = tl.minimum(cached + (tile + 1) * BLOCK_M, context_len)
        full_high = (cached + tile * BLOCK_M + 1) // BLOCK_N * BLOCK_N
        low = full_high * 0
        full_low = low
        if WINDOW > 0:
            low = tl.maximum(cached + tile * BLOCK_M - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
            last = tl.maximum(cached + (tile + 1) * BLOCK_M - WINDOW, 0)
            full_low = tl.minimum((last + BLOCK_N - 1) // BLOCK_N * BLOCK_N, full_high)
            full_low = tl.maximum(full_low, low)
            full_high = tl.maximum(full_high, full_low)
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        l = tl.zeros([BLOCK_M], tl.float32)  # noqa: E741
        acc = tl.zeros([BLOCK_M, D], tl.float32)
        table = tables + seq.to(tl.int64) * stride_tb
        h_kv = h // GROUP
        if WINDOW > 0:
            acc, l, m = _tiles(  # noqa: E741
                acc, l, m, qs, k_cache, v_cache, table, low, full_low, position, context_len, h_kv, scale, softcap,
                stride_kn, stride_ks, stride_kh, stride_vn, stride_vs, stride_vh,
                HEAD_DIM, BLOCK_SIZE, BLOCK_N, D, WINDOW, SOFTCAP, True, SAME_STRIDES, STAGES,
            )  # fmt: skip
        acc, l, m = _tiles(  # noqa: E741
            acc, l, m, qs, k_cache, v_cache, table, full_low, full_high, position, context_len, h_kv, scale, softcap,
            stride_kn, stride_ks, stride_kh, stride_vn, stride_vs, stride_vh,
            HEAD_DIM, BLOCK_SIZE, BLOCK_N, D, WINDOW, SOFTCAP, False, SAME_STRIDES, STAGES,
        )  # fmt: skip
        acc, l, m = _tiles(  # noqa: E741
            acc, l, m, qs, k_cache, v_cache, table, full_high, high, position, context_len, h_kv, scale, softcap,
            stride_kn, stride_ks, stride_kh, stride_vn, stride_vs, stride_vh,
            HEAD_DIM, BLOCK_SIZE, BLOCK_N, D, WINDOW, SOFTCAP, True, SAME_STRIDES, STAGES,
        )  # fmt: skip
        value = acc / tl.maximum(l, 1e-30)[:, None]
        o_ptrs = out + (row_start + row).to(tl.int64)[:, None] * stride_ot + h * stride_oh + d[None, :]
        tl.store(o_ptrs, value.to(out.dtype.element_ty), mask=in_rows)


def prefill(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, context_lens: Tensor, cu_seqlens_q: Tensor,
    max_seqlen_q: int, *, scale: float, sliding_window: int = 0, softcap: float = 0.0,
    config: PrefillConfig | None = None,
) -> Tensor:  # fmt: skip
    """kernels.paged_attention.prefill; rows of q past the last sequence are zeros."""
    num_rows, num_heads, head_dim = q.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    config = config or prefill_config(head_dim, k_cache.element_size(), max_seqlen_q)
    out = torch.zeros((num_rows, num_heads, head_dim), dtype=q.dtype, device=q.device)
    num_tiles = -(-max_seqlen_q // config.block_m)
    _prefill_kernel[(num_heads, context_lens.shape[0], num_tiles)](
        q, k_cache, v_cache, block_tables, context_lens, cu_seqlens_q, out, num_tiles,
        scale if softcap > 0 else scale * 1.4426950408889634, softcap if softcap > 0 else 1.0,
        q.stride(0), q.stride(1), *k_cache.stride()[:3], *v_cache.stride()[:3], block_tables.stride(0),
        out.stride(0), out.stride(1),
        GROUP=num_heads // num_kv_heads, HEAD_DIM=head_dim, BLOCK_SIZE=block_size, BLOCK_M=config.block_m,
        BLOCK_N=config.block_n, D=max(next_power_of_2(head_dim), 16), WINDOW=sliding_window, SOFTCAP=softcap > 0,
        SAME_STRIDES=k_cache.stride() == v_cache.stride(),
        STAGES=config.num_stages, num_warps=config.num_warps, **dependent_launch(q),
    )  # fmt: skip
    return out
