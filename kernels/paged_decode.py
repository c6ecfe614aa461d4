"""Decode attention in Triton: the whole batch's context, flattened and cut into one equal slice a program.

The unit of work is a tile of TILE tokens of one sequence; a sequence's start counts as START units more, before its
tiles. All units of a batch, sequence after sequence, form a list, of which slice g is [g * per_slice, (g + 1) *
per_slice). Programs (g, h), h over the key/value heads, run next to each other, so that the heads of a token are read
from memory together. A slice that holds a whole sequence writes its output; a sequence cut between slices leaves
partial results, which the last program to arrive merges. Rows behind the last with a context are padding: they are no
units, and their output is zeros.
Symbols as in FlashAttention, Dao 2023: m running maximum, l running sum, acc running output. Split as in stream-K,
Osama et al. 2023.

The plan (int32) is made on the device, once a step:
  [0] per_slice; [1] rows up to the last with a context; [2 + g], [2 + S + g] the sequence and the tile in it where
  slice g starts, negative among the units before the first tile; [2 + 2S + b] units before b's first tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import decode_hopper
from kernels.decode_hopper import DecodeShape
from kernels.hopper import uses
from kernels.launch import dependent_launch, next_power_of_2, num_multiprocessors
from kernels.registry import jit, tl

LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class DecodeConfig:
    """How the decode kernel is compiled and how many programs run."""

    tile: int = 32  # tokens
    num_warps: int = 2
    num_stages: int = 3
    programs_per_multiprocessor: int = 4
    min_tiles: int = 1  # the least work of a slice: fewer slices are cheaper to merge
    start_tiles: int = 2  # what a sequence's start costs: looking it up, and its output
    hopper: bool = False  # kernels.decode_hopper runs it, all key/value heads in one program


def decode_config(head_dim: int, element_size: int, num_seqs: int) -> DecodeConfig:
    """The measured choice (see BENCHMARKS.md) for a head size, the cache's bytes an element and a batch's size."""
    row_bytes = next_power_of_2(head_dim) * element_size
    if row_bytes > 512:
        return DecodeConfig(tile=16, num_warps=4, num_stages=2, programs_per_multiprocessor=2)
    if row_bytes > 256:
        return DecodeConfig(num_warps=4, programs_per_multiprocessor=2)
    return DecodeConfig(programs_per_multiprocessor=2 if num_seqs <= 4 else 4)


def hopper_config(k_cache: Tensor, num_seqs: int) -> DecodeConfig | None:
    """The cut for kernels.decode_hopper, where it can run and is faster. The Triton kernel could run it, too."""
    if not uses("decode") or num_seqs < decode_hopper.LEAST_SEQUENCES:
        return None
    if decode_hopper.unsupported(k_cache) is not None:
        return None
    heads = k_cache.shape[2]
    blocks = DecodeShape(heads, 1, k_cache.shape[3]).blocks_per_multiprocessor
    return DecodeConfig(tile=decode_hopper.TILE, programs_per_multiprocessor=heads * blocks, hopper=True)


@dataclass(frozen=True)
class DecodeWork:
    """One step's plan on the device, and the counters of arrived slices, which are zero between launches."""

    plan: Tensor  # int32, see the module's docstring
    arrived: Tensor  # [B, Hkv] int32
    num_slices: int
    config: DecodeConfig
    sliding_window: int


@jit
def _first_tile(context_len, TILE: tl.constexpr, WINDOW: tl.constexpr):
    """The first tile that the last token of a context attends to."""
    if WINDOW > 0:
        return tl.maximum(context_len - WINDOW, 0) // TILE
    return context_len * 0


@jit(do_not_specialize=["num_seqs", "num_slices"])
def _plan_kernel(
    context_lens, plan, num_seqs, num_slices, min_tiles,
    B: tl.constexpr, TILE: tl.constexpr, START: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    b = tl.arange(0, B)
    lens = tl.load(context_lens + b, mask=b < num_seqs, other=0)
    num_live = tl.max(tl.where(lens > 0, b + 1, 0), 0)
    tiles = tl.maximum((lens + TILE - 1) // TILE - _first_tile(lens, TILE, WINDOW), 1)
    units = tl.where(b < num_live, START + tiles, 0)
    ends = tl.cumsum(units, 0)
    total = tl.sum(units, 0)
    per_slice = tl.maximum((total + num_slices - 1) // num_slices, min_tiles)
    if tl.program_id(0) == 0:
        tl.store(plan, per_slice)
        tl.store(plan + 1, num_live)
        tl.store(plan + 2 + 2 * num_slices + b, ends - units + START, mask=b < num_seqs)
    g = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    start = tl.minimum(g * per_slice, total)
    before = ends[None, :] <= start[:, None]
    seq = tl.sum(before.to(tl.int32), 1)
    unit = start - tl.max(tl.where(before, ends[None, :], 0), 1)
    tl.store(plan + 2 + g, tl.minimum(seq, num_live), mask=g < num_slices)
    tl.store(plan + 2 + num_slices + g, unit - START, mask=g < num_slices)


@jit(do_not_specialize=["num_seqs", "num_slices"])
def _decode_kernel(
    q, k_cache, v_cache, tables, context_lens, plan, arrived, partial, partial_ml, out,
    num_seqs, num_slices, scale, softcap,
    stride_qb, stride_qh, stride_kn, stride_ks, stride_kh, stride_vn, stride_vs, stride_vh, stride_tb, stride_ob,
    stride_oh,
    HKV: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
    START: tl.constexpr, G: tl.constexpr, G_OUT: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, SEGMENTS: tl.constexpr, STAGES: tl.constexpr, KEEP_EMPTY: tl.constexpr,
    BEHIND_GATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if not BEHIND_GATE:
            tl.extra.cuda.gdc_wait()
    g = tl.program_id(0) // HKV
    h = tl.program_id(0) % HKV
    per_slice = tl.load(plan, cache_modifier=".cg")
    num_live = tl.load(plan + 1, cache_modifier=".cg")
    seq = tl.load(plan + 2 + g, cache_modifier=".cg")
    first = tl.load(plan + 2 + num_slices + g, cache_modifier=".cg")
    row = tl.arange(0, G)
    d = tl.arange(0, D)
    token = tl.arange(0, TILE)
    in_d = d < HEAD_DIM
    is_first_segment = 1
    left = per_slice + tl.minimum(first, 0)
    first = tl.maximum(first, 0)
    context_len = tl.load(context_lens + tl.minimum(seq, num_seqs - 1), cache_modifier=".cg")
    if PDL and BEHIND_GATE:
        tl.extra.cuda.gdc_wait()
    while (left > 0) & (seq < num_live):
        skipped = _first_tile(context_len, TILE, WINDOW)
        num_tiles = tl.maximum((context_len + TILE - 1) // TILE - skipped, 1)
        take = tl.minimum(num_tiles - first, left)
        q_ptrs = q + seq.to(tl.int64) * stride_qb + (h * GROUP + row)[:, None] * stride_qh + d[None, :]
        qs = tl.load(q_ptrs, mask=(row < GROUP)[:, None] & in_d[None, :], other=0.0)
        m = tl.full([G], float("-inf"), tl.float32)
        l = tl.zeros([G], tl.float32)  # noqa: E741
        acc = tl.zeros([G, D], tl.float32)
        table = tables + seq.to(tl.int64) * stride_tb
        # A tile's blocks are looked up one tile ahead, so that K and V are no second link in a chain of loads.
        index = (skipped + first) * TILE + token
        block = tl.load(table + index // BLOCK_SIZE, mask=index < context_len, other=0)
        for _ in tl.range(0, take, num_stages=STAGES):
            valid = index < context_len
            if WINDOW > 0:
                valid = valid & (index >= context_len - WINDOW)
            offset = index % BLOCK_SIZE
            k_rows = block.to(tl.int64) * stride_kn + offset * stride_ks + h * stride_kh
            v_rows = block.to(tl.int64) * stride_vn + offset * stride_vs + h * stride_vh
            index += TILE
            block = tl.load(table + index // BLOCK_SIZE, mask=index < context_len, other=0)
            k = tl.load(k_cache + k_rows[:, None] + d[None, :], mask=valid[:, None] & in_d[None, :], other=0.0)
            v = tl.load(v_cache + v_rows[:, None] + d[None, :], mask=valid[:, None] & in_d[None, :], other=0.0)
            s = tl.dot(qs, tl.trans(k.to(qs.dtype)), input_precision="ieee") * scale
            if SOFTCAP:
                s = softcap * (1.0 - 2.0 / (tl.exp2(s * (2.0 * 1.4426950408889634 / softcap)) + 1.0))
            s = tl.where(valid[None, :], s * 1.4426950408889634, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1))
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)
            p = tl.exp2(s - shift[:, None])
            decay = tl.exp2(m - shift)
            l = l * decay + tl.sum(p, 1)  # noqa: E741
            acc = acc * decay[:, None] + tl.dot(p.to(qs.dtype), v.to(qs.dtype), input_precision="ieee")
            m = m_new
        out_ptrs = out + seq.to(tl.int64) * stride_ob + (h * GROUP + row)[:, None] * stride_oh + d[None, :]
        if take == num_tiles:
            value = acc / tl.maximum(l, 1e-30)[:, None]
            rows = tl.minimum(context_len, 1) * GROUP if KEEP_EMPTY else GROUP
            tl.store(out_ptrs, value.to(out.dtype.element_ty), mask=(row < rows)[:, None] & in_d[None, :])
        else:
            slot = (g * 2 + 1 - is_first_segment) * HKV + h
            ml_ptrs = partial_ml + slot * 2 * G_OUT + row
            tl.store(ml_ptrs, m, mask=row < G_OUT)
            tl.store(ml_ptrs + G_OUT, l, mask=row < G_OUT)
            p_ptrs = partial + slot.to(tl.int64) * (G_OUT * D) + row[:, None] * D + d[None, :]
            tl.store(p_ptrs, acc, mask=(row < G_OUT)[:, None] & in_d[None, :])
            tl.debug_barrier()
            # Slices [g_first, g_last] hold this sequence; the last one to arrive merges them.
            before = tl.load(plan + 2 + 2 * num_slices + seq)
            g_first = before // per_slice
            g_last = (before + num_tiles - 1) // per_slice
            count = tl.atomic_add(arrived + seq * HKV + h, 1, sem="acq_rel")
            if count == g_last - g_first:
                _merge(
                    partial, partial_ml, plan, out, seq, h, g_first, g_last, stride_ob, stride_oh,
                    HKV, GROUP, HEAD_DIM, G_OUT, D, SEGMENTS,
                )  # fmt: skip
                tl.store(arrived + seq * HKV + h, 0)
        left -= take + START
        seq += 1
        first = first * 0
        is_first_segment = 0
        context_len = tl.load(context_lens + tl.minimum(seq, num_seqs - 1))
    if not KEEP_EMPTY:
        padding = num_live + g
        while padding < num_seqs:
            out_ptrs = out + padding.to(tl.int64) * stride_ob + (h * GROUP + row)[:, None] * stride_oh + d[None, :]
            nothing = tl.zeros([G, D], out.dtype.element_ty)
            tl.store(out_ptrs, nothing, mask=(row < GROUP)[:, None] & in_d[None, :])
            padding += num_slices


@jit
def _merge(
    partial, partial_ml, plan, out, seq, h, g_first, g_last, stride_ob, stride_oh,
    HKV: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, G_OUT: tl.constexpr, D: tl.constexpr,
    SEGMENTS: tl.constexpr,
):  # fmt: skip
    """Merge the partial results of slices [g_first, g_last] of one sequence and key/value head, SEGMENTS at a time."""
    row = tl.arange(0, G_OUT)
    d = tl.arange(0, D)
    segment = tl.arange(0, SEGMENTS)
    # A slice that starts inside the sequence has it as its first segment; the slice it begins in may have it as last.
    second = (tl.load(plan + 2 + g_first) != seq).to(tl.int32)
    m = tl.full([G_OUT], float("-inf"), tl.float32)
    l = tl.zeros([G_OUT], tl.float32)  # noqa: E741
    acc = tl.zeros([G_OUT, D], tl.float32)
    for g0 in range(g_first, g_last + 1, SEGMENTS):
        g = g0 + segment
        slot = (g * 2 + tl.where(g == g_first, second, 0)) * HKV + h
        exists = g <= g_last
        ml_ptrs = partial_ml + slot[:, None] * (2 * G_OUT) + row[None, :]
        m_s = tl.load(ml_ptrs, mask=exists[:, None], other=float("-inf"), cache_modifier=".cg")
        l_s = tl.load(ml_ptrs + G_OUT, mask=exists[:, None], other=0.0, cache_modifier=".cg")
        p_ptrs = partial + slot.to(tl.int64)[:, None, None] * (G_OUT * D) + row[None, :, None] * D + d[None, None, :]
        in_d = (d < HEAD_DIM)[None, None, :]
        acc_s = tl.load(p_ptrs, mask=exists[:, None, None] & in_d, other=0.0, cache_modifier=".cg")
        m_new = tl.maximum(m, tl.max(m_s, 0))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        decay = tl.exp2(m - shift)
        weight = tl.exp2(m_s - shift[None, :])
        l = l * decay + tl.sum(l_s * weight, 0)  # noqa: E741
        acc = acc * decay[:, None] + tl.sum(acc_s * weight[:, :, None], 0)
        m = m_new
    value = acc / tl.maximum(l, 1e-30)[:, None]
    ptrs = out + seq.to(tl.int64) * stride_ob + (h * GROUP + row)[:, None] * stride_oh + d[None, :]
    tl.store(ptrs, value.to(out.dtype.element_ty), mask=(row < GROUP)[:, None] & (d < HEAD_DIM)[None, :])


def make_work(
    k_cache: Tensor, context_lens: Tensor, sliding_window: int, config: DecodeConfig | None = None
) -> DecodeWork:
    """Cut a step's contexts into slices, on the device, without looking at the lengths from the host."""
    num_seqs = context_lens.shape[0]
    num_kv_heads, head_dim = k_cache.shape[2:]
    config = config or hopper_config(k_cache, num_seqs) or decode_config(head_dim, k_cache.element_size(), num_seqs)
    programs = num_multiprocessors(k_cache.device) * config.programs_per_multiprocessor
    num_slices = max(1, programs // num_kv_heads)
    plan = torch.empty(2 + 2 * num_slices + num_seqs, dtype=torch.int32, device=context_lens.device)
    arrived = torch.zeros(num_seqs, num_kv_heads, dtype=torch.int32, device=context_lens.device)
    padded = max(next_power_of_2(num_seqs), 256)  # few variants to compile
    chunk = max(1, min(32, 16384 // padded))
    _plan_kernel[(-(-num_slices // chunk),)](
        context_lens, plan, num_seqs, num_slices, config.min_tiles,
        B=padded, TILE=config.tile, START=config.start_tiles, WINDOW=sliding_window, CHUNK=chunk,
        num_warps=8, **dependent_launch(plan),
    )  # fmt: skip
    return DecodeWork(plan, arrived, num_slices, config, sliding_window)


def on_hopper(q: Tensor, k_cache: Tensor, work: DecodeWork, *, softcap: float = 0.0) -> bool:
    """Whether kernels.decode_hopper runs a work."""
    return work.config.hopper and q.shape[1] // k_cache.shape[2] <= decode_hopper.MAX_GROUP and softcap <= 0


def why_not_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> str | None:
    """Why the Triton kernels cannot attend over these tensors."""
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"queries of {q.dtype}"
    if q.shape[-1] > 256:
        return f"head size {q.shape[-1]} is over 256"
    if q.stride(-1) != 1 or k_cache.stride(-1) != 1 or v_cache.stride(-1) != 1:
        return "a head's elements are not contiguous"
    return None


def decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, context_lens: Tensor, *, scale: float,
    softcap: float, work: DecodeWork, into: Tensor | None = None, behind_gate: bool = False,
    beside_prefill: bool = False,
) -> Tensor:  # fmt: skip
    """kernels.paged_attention.decode over the slices of `work`. Two kernels never share a work at the same time."""
    num_seqs, num_heads, head_dim = q.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    group = num_heads // num_kv_heads
    if on_hopper(q, k_cache, work, softcap=softcap):
        return decode_hopper.decode(
            q, k_cache, v_cache, block_tables, context_lens, scale=scale, work=work, into=into, behind_gate=behind_gate,
            beside_prefill=beside_prefill,
        )  # fmt: skip
    group_out, padded_dim = next_power_of_2(group), max(next_power_of_2(head_dim), 16)
    out = torch.empty((num_seqs, num_heads, head_dim), dtype=q.dtype, device=q.device) if into is None else into
    if num_seqs == 0:
        return out
    slots = work.num_slices * 2 * num_kv_heads
    partial = torch.empty(slots * group_out * padded_dim, dtype=torch.float32, device=q.device)
    partial_ml = torch.empty(slots * 2 * group_out, dtype=torch.float32, device=q.device)
    config = work.config
    _decode_kernel[(work.num_slices * num_kv_heads,)](
        q, k_cache, v_cache, block_tables, context_lens, work.plan, work.arrived, partial, partial_ml, out,
        num_seqs, work.num_slices, scale, softcap if softcap > 0 else 1.0,
        q.stride(0), q.stride(1), *k_cache.stride()[:3], *v_cache.stride()[:3], block_tables.stride(0),
        out.stride(0), out.stride(1),
        HKV=num_kv_heads, GROUP=group, HEAD_DIM=head_dim, BLOCK_SIZE=block_size, TILE=config.tile,
        START=config.start_tiles, G=max(16, group_out), G_OUT=group_out, D=padded_dim, WINDOW=work.sliding_window,
        SOFTCAP=softcap > 0,
        SEGMENTS=max(2, min(8, 4096 // (group_out * padded_dim))), STAGES=config.num_stages,
        KEEP_EMPTY=into is not None, BEHIND_GATE=behind_gate, num_warps=config.num_warps, **dependent_launch(q),
    )  # fmt: skip
    return out
