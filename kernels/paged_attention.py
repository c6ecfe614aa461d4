"""Attention over a paged K/V cache: one new token a sequence (decode), or ragged runs of new tokens (prefill).

A cache is [num_blocks, block_size, Hkv, D]; row b of block_tables lists the blocks that hold sequence b's tokens in
order. The keys and values of the new tokens are already in the cache. Query head h attends with key/value head
h // (Hq / Hkv). Source: PagedAttention, Kwon et al. 2023, section 4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.registry import kernel

# Decode gathers a batch's keys and values into one padded tensor, for as many sequences at a time as fit in this.
GATHER_BYTES = 64 << 20


def _check_heads(q: Tensor, k_cache: Tensor) -> None:
    if q.shape[-2] % k_cache.shape[-2]:
        raise ValueError(f"{q.shape[-2]} query heads are not a multiple of {k_cache.shape[-2]} key/value heads")


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
) -> Tensor:
    """Attend one new token of each sequence to its paged keys and values.

    q [B, Hq, D]; k_cache, v_cache [N, block_size, Hkv, D]; block_tables [B, M] int32 (entries past a sequence's context
    may be anything); context_lens [B] int32, in tokens, the new one included, 0 for a padding row, whose output is
    zeros. sliding_window w > 0: only the last w tokens count; softcap c > 0: scores become c * tanh(score / c).
    Returns [B, Hq, D] in q's dtype. Raises ValueError when Hq is not a multiple of Hkv.
    """
    _check_heads(q, k_cache)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    block_bytes = 2 * k_cache[0].numel() * k_cache.element_size()
    lens = context_lens.to(torch.int64)
    order = torch.argsort(lens, descending=True)
    sorted_lens: list[int] = lens[order].tolist()
    start = 0
    while start < len(sorted_lens):
        num_blocks = -(-max(sorted_lens[start], 1) // k_cache.shape[1])
        end = start + max(1, GATHER_BYTES // (num_blocks * block_bytes))
        # A chunk ends early where the sequences have become half as long as its first: padding stays below one half.
        while end > start + 16 and sorted_lens[min(end, len(sorted_lens)) - 1] * 2 < sorted_lens[start]:
            end = start + max(16, (min(end, len(sorted_lens)) - start) // 2)
        rows = order[start:end]
        out[rows] = _decode_padded(
            q[rows], k_cache, v_cache, block_tables[rows, :num_blocks], lens[rows], scale, sliding_window, softcap
        )
        start = end
    return out


def _decode_padded(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tables: Tensor,
    lens: Tensor,
    scale: float,
    sliding_window: int,
    softcap: float,
) -> Tensor:
    """Decode sequences of about one length: gather every block of `tables` [B, m], mask what is past the context."""
    num_seqs, num_blocks = tables.shape
    block_size, num_kv_heads, head_dim = k_cache.shape[1:]
    length = num_blocks * block_size
    index = torch.arange(length, device=q.device)
    seen = index < lens[:, None]
    if sliding_window > 0:
        seen &= index >= lens[:, None] - sliding_window
    in_use = torch.arange(num_blocks, device=q.device) * block_size < lens[:, None]
    flat = torch.where(in_use, tables, 0).flatten()
    k = k_cache.index_select(0, flat).view(num_seqs, length, num_kv_heads, head_dim).transpose(1, 2)
    v = v_cache.index_select(0, flat).view(num_seqs, length, num_kv_heads, head_dim).transpose(1, 2)
    # The queries of a group are the rows of one product with their shared head.
    grouped = q.view(num_seqs, num_kv_heads, -1, head_dim)
    out = _attend(grouped, k, v, seen[:, None, None, :], scale, softcap)
    out = out.reshape(q.shape)
    if int(lens.min()) == 0:
        out = out.masked_fill((lens == 0)[:, None, None], 0)
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float, softcap: float) -> Tensor:
    """softmax(q kᵀ · scale, soft-capped, masked by `seen`) v over [B, H, L, D] tensors."""
    k, v = k.to(q.dtype), v.to(q.dtype)
    if softcap <= 0:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
    scores = torch.matmul(q, k.transpose(-1, -2)).float() * scale
    scores = softcap * torch.tanh(scores / softcap)
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    return torch.matmul(scores.softmax(-1).to(q.dtype), v)


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
) -> Tensor:
    """Attend ragged runs of new tokens, causally, to their sequences' paged keys and values.

    q [T, Hq, D]: sequence b's new tokens are rows [cu_seqlens_q[b], cu_seqlens_q[b + 1]), the last ones of its context;
    k_cache, v_cache [N, block_size, Hkv, D]; block_tables [B, M] int32; context_lens [B] int32, cached plus new tokens;
    cu_seqlens_q [B + 1] int32 starting at 0; max_seqlen_q: the longest run, at least. sliding_window w > 0: a token
    attends to the last w tokens up to itself; softcap c > 0: scores become c * tanh(score / c). Rows of q past
    cu_seqlens_q[B] (padding) give zeros. Returns [T, Hq, D] in q's dtype.
    Raises ValueError when Hq is not a multiple of Hkv.
    """
    _check_heads(q, k_cache)
    starts: list[int] = cu_seqlens_q.tolist()
    lens: list[int] = context_lens.tolist()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
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
    k = k_cache.index_select(0, blocks).view(-1, num_kv_heads, head_dim)[:context_len]
    v = v_cache.index_select(0, blocks).view(-1, num_kv_heads, head_dim)[:context_len]
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
        out = _attend(queries, keys, values, seen, scale, softcap)
    return out[0].transpose(0, 1)
