"""Attention over a paged K/V cache: one new token a sequence (decode), or ragged runs of new tokens (prefill).

A cache is [num_blocks, block_size, Hkv, D]; row b of block_tables lists the blocks that hold sequence b's tokens in
order. The keys and values of the new tokens are already in the cache. Query head h attends with key/value head
h // (Hq / Hkv). Source: PagedAttention, Kwon et al. 2023, section 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import decode_hopper, paged_decode, paged_prefill, prefill_hopper
from kernels.decode_hopper import NewTokens
from kernels.kv_cache import rotary_and_write_kv
from kernels.paged_decode import DecodeWork
from kernels.registry import kernel, on_gpu

# Decode gathers keys and values into padded tensors, of as many sequences at a time as fit in this: one that stays in
# a core's cache while it is used.
GATHER_BYTES = 1 << 20


def _check_heads(q: Tensor, k_cache: Tensor) -> None:
    if q.shape[-2] % k_cache.shape[-2]:
        raise ValueError(f"{q.shape[-2]} query heads are not a multiple of {k_cache.shape[-2]} key/value heads")


@dataclass(frozen=True)
class DecodeChunk:
    """Sequences of similar length that the torch definition decodes together."""

    rows: Tensor | None  # [n] int64 rows of the batch; None: all of them, in order
    blocks: Tensor  # [n * m] the blocks of each sequence, padded to m with block 0
    seen: Tensor  # [n, 1, 1, m * block_size] float32, added to the scores: 0 where a token counts, -inf elsewhere
    empty: Tensor | None  # [n, 1, 1] bool, rows with no context; None: there are none


@dataclass(frozen=True)
class DecodePlan:
    """How one step's decode attention is cut up. Made once a step, used by every layer with the same sliding window."""

    chunks: list[DecodeChunk]  # for the torch definition
    work: DecodeWork | None = None  # for the Triton kernel


@kernel
def plan_decode(k_cache: Tensor, block_tables: Tensor, context_lens: Tensor, *, sliding_window: int = 0) -> DecodePlan:
    """Cut one step's decode attention into pieces. Arguments as for `decode`; only k_cache's shape and dtype matter."""
    num_seqs = len(context_lens)
    block_size = k_cache.shape[1]
    block_bytes = k_cache[0].numel() * k_cache.element_size()
    lens = context_lens.to(torch.int64)
    sorted_lens, order = lens.sort(descending=True)
    lengths: list[int] = sorted_lens.tolist()
    chunks = []
    start = 0
    while start < num_seqs:
        num_blocks = -(-max(lengths[start], 1) // block_size)
        end = min(num_seqs, start + max(1, GATHER_BYTES // (num_blocks * block_bytes)))
        # Where the sequences have become half as long as the first, a new chunk pays: less padding.
        while end > start + 16 and lengths[end - 1] * 2 < lengths[start]:
            end = start + max(16, (end - start) // 2)
        whole = start == 0 and end == num_seqs
        rows = None if whole else order[start:end]
        chunks.append(_plan_chunk(rows, block_tables, lens, num_blocks, block_size, sliding_window, lengths[end - 1]))
        start = end
    return DecodePlan(chunks)


def _plan_chunk(
    rows: Tensor | None,
    block_tables: Tensor,
    lens: Tensor,
    num_blocks: int,
    block_size: int,
    sliding_window: int,
    shortest: int,
) -> DecodeChunk:
    tables = block_tables[:, :num_blocks] if rows is None else block_tables[rows, :num_blocks]
    lens = lens if rows is None else lens[rows]
    # A row without context looks at one token of block 0, so that its scores are finite; its output is zeroed.
    ends = lens.clamp(min=1)[:, None]
    index = torch.arange(num_blocks * block_size, device=lens.device)
    seen = index < ends
    if sliding_window > 0:
        seen &= index >= ends - sliding_window
    blocks = tables.masked_fill(index[::block_size] >= lens[:, None], 0).flatten()
    bias = torch.zeros(seen.shape, device=lens.device).masked_fill_(~seen, float("-inf"))
    empty = (lens == 0)[:, None, None] if shortest == 0 else None
    return DecodeChunk(rows, blocks, bias[:, None, None, :], empty)


@kernel
def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    *,
    scale: float,
    sliding_window: int = 0,
    softcap: float = 0.0,
    plan: DecodePlan | None = None,
    into: Tensor | None = None,
    behind_gate: bool = False,  # noqa: ARG001 - orders the GPU's kernels
    beside_prefill: bool = False,  # noqa: ARG001 - orders the GPU's kernels
) -> Tensor:
    """Attend one new token of each sequence to its paged keys and values.

    q [B, Hq, D]; k_cache, v_cache [N, block_size, Hkv, D]; block_tables [B, M] int32 (entries past a sequence's context
    may be anything); context_lens [B] int32, in tokens, the new one included, 0 for a padding row, whose output is
    zeros. sliding_window w > 0: only the last w tokens count; softcap c > 0: scores become c * tanh(score / c).
    plan: plan_decode's of the same tables, lengths and window, to share between layers; made here when None.
    into [B, Hq, D]: takes the results, and keeps its rows of no context.
    behind_gate: since a kernels.launch.gate() nothing was written but its results, q and the new tokens of the caches.
    beside_prefill: the kernel in front is prefill() with `beside_decodes`, and nothing was launched in between.
    Returns [B, Hq, D] in q's dtype. Raises ValueError when Hq is not a multiple of Hkv.
    """
    _check_heads(q, k_cache)
    if into is not None:
        options = {"scale": scale, "sliding_window": sliding_window, "softcap": softcap, "plan": plan}
        found = decode.definition(q, k_cache, v_cache, block_tables, context_lens, **options)
        return into.copy_(torch.where(context_lens[:, None, None] > 0, found, into))
    if plan is None or not plan.chunks:
        plan = plan_decode.definition(k_cache, block_tables, context_lens, sliding_window=sliding_window)
    if len(plan.chunks) == 1:
        return _decode_chunk(q, k_cache, v_cache, plan.chunks[0], scale, softcap)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for chunk in plan.chunks:
        out[chunk.rows] = _decode_chunk(q[chunk.rows], k_cache, v_cache, chunk, scale, softcap)
    return out


def _decode_chunk(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, chunk: DecodeChunk, scale: float, softcap: float
) -> Tensor:
    """Decode one chunk's sequences: gather all their blocks, mask what is past the context."""
    num_seqs, num_heads, head_dim = q.shape
    shape = (num_seqs, chunk.seen.shape[-1], k_cache.shape[2], head_dim)
    k = _gather_blocks(k_cache, chunk.blocks).view(shape).transpose(1, 2)
    v = _gather_blocks(v_cache, chunk.blocks).view(shape).transpose(1, 2)
    # The queries of a group are the rows of one product with their shared head.
    grouped = q.reshape(num_seqs, k_cache.shape[2], -1, head_dim)
    out = _attend(grouped, k, v, chunk.seen, scale, softcap).reshape(num_seqs, num_heads, head_dim)
    return out if chunk.empty is None else out.masked_fill(chunk.empty, 0)


def _gather_blocks(cache: Tensor, blocks: Tensor) -> Tensor:
    """The given blocks of a cache, copied side by side: [n, block_size * Hkv * D] (rows of bytes copy fastest)."""
    if cache.is_contiguous():
        return cache.view(cache.shape[0], -1).index_select(0, blocks)
    return cache.index_select(0, blocks)


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float, softcap: float) -> Tensor:
    """softmax(q kᵀ · scale, soft-capped, plus `seen`) v over [B, H, L, D] tensors; seen is 0 or -inf."""
    k, v = k.to(q.dtype), v.to(q.dtype)
    if softcap <= 0:
        if seen is not None and q.device.type != "cpu":
            seen = seen.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
    scores = torch.matmul(q, k.transpose(-1, -2)).float() * scale
    scores = softcap * torch.tanh(scores / softcap)
    if seen is not None:
        scores = scores + seen
    return torch.matmul(scores.softmax(-1).to(q.dtype), v)


@plan_decode.triton()
def _plan_decode_triton(
    k_cache: Tensor,
    block_tables: Tensor,  # noqa: ARG001
    context_lens: Tensor,
    *,
    sliding_window: int = 0,
) -> DecodePlan:
    return DecodePlan([], paged_decode.make_work(k_cache, context_lens, sliding_window))


def _why_not_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, *_: object, **__: object) -> str | None:
    return paged_decode.why_not_decode(q, k_cache, v_cache)


@decode.triton(supports=_why_not_decode)
def _decode_triton(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    *,
    scale: float,
    sliding_window: int = 0,
    softcap: float = 0.0,
    plan: DecodePlan | None = None,
    into: Tensor | None = None,
    behind_gate: bool = False,
    beside_prefill: bool = False,
) -> Tensor:
    _check_heads(q, k_cache)
    work = plan.work if plan is not None else None
    if work is None:
        # The kernel in front makes the plan.
        work = paged_decode.make_work(k_cache, context_lens, sliding_window)
        behind_gate = beside_prefill = False
    return paged_decode.decode(
        q, k_cache, v_cache, block_tables, context_lens, scale=scale, softcap=softcap, work=work, into=into,
        behind_gate=behind_gate, beside_prefill=beside_prefill,
    )  # fmt: skip


@kernel
def rotary_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    *,
    scale: float,
    sliding_window: int = 0,
    plan: DecodePlan | None = None,
    behind_gate: bool = False,  # noqa: ARG001 - orders the GPU's kernels
) -> Tensor:
    """decode() of new tokens as they were projected: rotated to the last places of their contexts, and written there.

    q [B, Hq, D]; k, v [B, Hkv, D]; cos_sin [max_position, D] float32 as in rotary_and_write_kv; the caches are mutated.
    behind_gate: since a kernels.launch.gate() nothing was written but its results, which q, k and v are.
    """
    last = (context_lens.to(torch.int64) - 1).clamp(min=0)
    block_size = k_cache.shape[1]
    blocks = block_tables.to(torch.int64).gather(1, (last // block_size)[:, None])[:, 0]
    slots = torch.where(context_lens > 0, blocks * block_size + last % block_size, -1)
    q = rotary_and_write_kv.definition(q, k, v, cos_sin, last, k_cache, v_cache, slots)
    options = {"scale": scale, "sliding_window": sliding_window, "plan": plan}
    return decode.definition(q, k_cache, v_cache, block_tables, context_lens, **options)


def _why_not_rotary_decode(
    q: Tensor, k: Tensor, v: Tensor, cos_sin: Tensor, k_cache: Tensor, *_: object, plan: DecodePlan | None = None,
    **__: object,
) -> str | None:  # fmt: skip
    if plan is None or plan.work is None or not paged_decode.on_hopper(q, k_cache, plan.work):
        return "it is for many sequences on Hopper GPUs"
    return NewTokens(k, v, cos_sin).unsupported(q, k_cache)


@rotary_decode.triton(supports=_why_not_rotary_decode)
def _rotary_decode_fast(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    *,
    scale: float,
    sliding_window: int = 0,  # noqa: ARG001 - the plan's
    plan: DecodePlan | None = None,
    behind_gate: bool = False,
) -> Tensor:
    assert plan is not None
    options = {"scale": scale, "work": plan.work, "behind_gate": behind_gate, "new": NewTokens(k, v, cos_sin)}
    return decode_hopper.decode(q, k_cache, v_cache, block_tables, context_lens, **options)  # type: ignore[arg-type]


def can_be_beside(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: DecodePlan, max_seqlen_q: int, *, scale: float
) -> bool:
    """Whether prefill() of these, and then decode() of the plan's, have kernels that can run at the same time."""
    if plan.work is None or not on_gpu(q) or not paged_decode.on_hopper(q, k_cache, plan.work):
        return False
    return prefill_hopper.chosen(q, k_cache, v_cache, max_seqlen_q, scale=scale)


@kernel
def prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,  # noqa: ARG001 - sizes the GPU's launch
    *,
    scale: float,
    sliding_window: int = 0,
    softcap: float = 0.0,
    beside_decodes: bool = False,  # noqa: ARG001 - orders the GPU's kernels
) -> Tensor:
    """Attend ragged runs of new tokens, causally, to their sequences' paged keys and values.

    q [T, Hq, D]: sequence b's new tokens are rows [cu_seqlens_q[b], cu_seqlens_q[b + 1]), the last ones of its context;
    k_cache, v_cache [N, block_size, Hkv, D]; block_tables [B, M] int32; context_lens [B] int32, cached plus new tokens;
    cu_seqlens_q [B + 1] int32; max_seqlen_q: the longest run, at least. sliding_window w > 0: a token attends to the
    last w tokens up to itself; softcap c > 0: scores become c * tanh(score / c). Rows of q before cu_seqlens_q[0] and
    from cu_seqlens_q[B] on are nobody's and give zeros. Returns [T, Hq, D] in q's dtype.
    beside_decodes, where can_be_beside(): those in front may be anything, and belong to a decode() into them, which may
    run at the same time. Raises ValueError when Hq is not a multiple of Hkv.
    """
    _check_heads(q, k_cache)
    starts: list[int] = cu_seqlens_q.tolist()
    lens: list[int] = context_lens.tolist()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    out[: starts[0]] = 0
    out[starts[-1] :] = 0
    single = [b for b in range(len(lens)) if starts[b + 1] - starts[b] == 1]
    if len(single) > 1:
        seqs = torch.tensor(single, device=q.device)
        rows = cu_seqlens_q.to(torch.int64)[seqs]
        out[rows] = decode.definition(
            q[rows],
            k_cache,
            v_cache,
            block_tables[seqs],
            context_lens[seqs],
            scale=scale,
            sliding_window=sliding_window,
            softcap=softcap,
        )
    for b, context_len in enumerate(lens):
        start, end = starts[b], starts[b + 1]
        if end - start > 1 or (end - start == 1 and len(single) == 1):
            out[start:end] = _prefill_one(
                q[start:end], k_cache, v_cache, block_tables[b], context_len, scale, sliding_window, softcap
            )
    return out


def _prefill_one(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    table: Tensor,
    context_len: int,
    scale: float,
    sliding_window: int,
    softcap: float,
) -> Tensor:
    """The last tokens q [n, Hq, D] of one sequence of context_len tokens, causally."""
    num_new, num_heads, head_dim = q.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    blocks = table[: -(-context_len // block_size)]
    k = _gather_blocks(k_cache, blocks).view(-1, num_kv_heads, head_dim)[:context_len]
    v = _gather_blocks(v_cache, blocks).view(-1, num_kv_heads, head_dim)[:context_len]
    group = num_heads // num_kv_heads
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    queries, keys, values = (x.transpose(0, 1)[None] for x in (q, k, v))
    if num_new == context_len and sliding_window <= 0 and softcap <= 0:
        out = F.scaled_dot_product_attention(queries, keys.to(q.dtype), values.to(q.dtype), is_causal=True, scale=scale)
    else:
        position = torch.arange(context_len - num_new, context_len, device=q.device)[:, None]
        index = torch.arange(context_len, device=q.device)
        seen = index <= position
        if sliding_window > 0:
            seen &= index > position - sliding_window
        bias = torch.zeros(seen.shape, device=q.device).masked_fill_(~seen, float("-inf"))
        out = _attend(queries, keys, values, bias, scale, softcap)
    return out[0].transpose(0, 1)


@prefill.triton(supports=_why_not_decode)
def _prefill_fast(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *args: Any,
    scale: float,
    sliding_window: int = 0,
    softcap: float = 0.0,
    beside_decodes: bool = False,
) -> Tensor:
    """In CUDA C++ where there is a kernel for it, otherwise in Triton."""
    _check_heads(q, k_cache)
    options = {"scale": scale, "sliding_window": sliding_window, "softcap": softcap}
    if prefill_hopper.chosen(q, k_cache, v_cache, args[3], scale=scale, softcap=softcap):
        return prefill_hopper.prefill(q, k_cache, v_cache, *args, beside_decodes=beside_decodes, **options)
    assert not beside_decodes
    return paged_prefill.prefill(q, k_cache, v_cache, *args, **options)
