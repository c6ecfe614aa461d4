"""Adjusting logits before a draw, counting what was drawn, and log probabilities, in Triton."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.launch import dependent_launch, next_power_of_2
from kernels.registry import jit, tl

if TYPE_CHECKING:
    from kernels.sampling import LogitBias, Penalties

PART = 4096  # tokens whose log probabilities one program handles


@jit
def _adjust_kernel(
    logits, out, rows, counts, prompt_mask, presence, frequency, repetition, allowed, stride_l, stride_c, stride_p,
    stride_a, V: tl.constexpr, BLOCK: tl.constexpr, PENALTIES: tl.constexpr, ALLOWED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    b = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < V
    x = tl.load(logits + b * stride_l + i, mask=inside, other=0.0).to(tl.float32)
    if PENALTIES:
        table = tl.load(rows + b)
        if table >= 0:
            count = tl.load(counts + table * stride_c + i, mask=inside, other=0)
            words = tl.load(prompt_mask + table * stride_p + i // 32, mask=inside, other=0)
            generated = count > 0
            seen = generated | (((words >> (i % 32)) & 1) != 0)
            r = tl.load(repetition + b) + tl.zeros([BLOCK], tl.float32)
            x = tl.where(seen, tl.where(x > 0, tl.div_rn(x, r), x * r), x)
            x = x - tl.load(frequency + b) * count.to(tl.float32)
            x = x - tl.load(presence + b) * generated.to(tl.float32)
    if ALLOWED:
        words = tl.load(allowed + b * stride_a + i // 32, mask=inside, other=0)
        x = tl.where(((words >> (i % 32)) & 1) != 0, x, -float("inf"))
    tl.store(out + b * V + i, x, mask=inside)


@jit(do_not_specialize=["size"])
def _bias_kernel(out, rows, token_ids, values, size, V: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + i, mask=i < size, other=-1)
    token = tl.load(token_ids + i, mask=i < size, other=0)
    value = tl.load(values + i, mask=i < size, other=0.0)
    tl.atomic_add(out + row * V + token, value, mask=row >= 0)


@jit(do_not_specialize=["size"])
def _count_kernel(token_ids, rows, counts, size, stride_c, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + i, mask=i < size, other=-1)
    token = tl.load(token_ids + i, mask=i < size, other=0)
    tl.atomic_add(counts + row * stride_c + token, 1, mask=row >= 0)


def adjust(logits: Tensor, penalties: Penalties | None, bias: LogitBias | None, allowed: Tensor | None) -> Tensor:
    """kernels.sampling.adjust_logits: penalties and mask in one pass, then the sparse bias."""
    num_rows, size = logits.shape
    out = torch.empty(num_rows, size, dtype=torch.float32, device=logits.device)
    block = min(4096, max(16, next_power_of_2(size)))
    p = penalties
    nothing = logits
    if num_rows:
        _adjust_kernel[(num_rows, -(-size // block))](
            logits, out, p.rows if p else nothing, p.output_counts if p else nothing, p.prompt_mask if p else nothing,
            p.presence if p else nothing, p.frequency if p else nothing, p.repetition if p else nothing,
            nothing if allowed is None else allowed, logits.stride(0), p.output_counts.stride(0) if p else 0,
            p.prompt_mask.stride(0) if p else 0, 0 if allowed is None else allowed.stride(0),
            V=size, BLOCK=block, PENALTIES=p is not None, ALLOWED=allowed is not None, num_warps=8,
            **dependent_launch(logits),
        )  # fmt: skip
    if bias is not None and len(bias.rows):
        _bias_kernel[(-(-len(bias.rows) // 128),)](
            out, bias.rows, bias.token_ids, bias.values, len(bias.rows), V=size, BLOCK=128, **dependent_launch(logits)
        )
    return out


def count_tokens(token_ids: Tensor, rows: Tensor, output_counts: Tensor) -> None:
    """kernels.sampling.count_tokens."""
    if len(rows):
        _count_kernel[(-(-len(rows) // 128),)](
            token_ids, rows, output_counts, len(rows), output_counts.stride(0), BLOCK=128, **dependent_launch(token_ids)
        )


@jit
def _part_logprobs_kernel(
    logits, token_ids, m_out, l_out, above_out, top_values, top_ids, num_parts, stride_l,
    V: tl.constexpr, PART: tl.constexpr, TOP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    b = tl.program_id(0)
    part = tl.program_id(1)
    row = logits + b.to(tl.int64) * stride_l
    chosen = tl.load(row + tl.load(token_ids + b)).to(tl.float32)
    i = part * PART + tl.arange(0, PART)
    x = tl.load(row + i, mask=i < V, other=-float("inf")).to(tl.float32)
    m = tl.max(x, 0)
    slot = b * num_parts + part
    tl.store(m_out + slot, m)
    tl.store(l_out + slot, tl.sum(tl.exp(x - tl.where(m == -float("inf"), 0.0, m)), 0))
    tl.store(above_out + slot, tl.sum((x > chosen).to(tl.int32), 0))
    left = tl.where(i < V, x, float("nan"))
    for n in range(TOP):
        # Masked-out tokens are NaN, which max ignores and equals nothing; -inf logits still have an order.
        candidate = left == left
        top = tl.max(tl.where(candidate, left, -float("inf")), 0)
        index = tl.min(tl.where(candidate & (left == top), i, 2147483647), 0)
        tl.store(top_values + slot * TOP + n, top)
        tl.store(top_ids + slot * TOP + n, index)
        left = tl.where(i == index, float("nan"), left)


@jit
def _merge_logprobs_kernel(
    logits, token_ids, m_in, l_in, above_in, part_values, part_ids, logprob_out, rank_out, ids_out, values_out,
    num_parts, stride_l,
    PARTS: tl.constexpr, TOP: tl.constexpr, CANDIDATES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    b = tl.program_id(0)
    part = tl.arange(0, PARTS)
    slot = b * num_parts + part
    m_s = tl.load(m_in + slot, mask=part < num_parts, other=-float("inf"))
    l_s = tl.load(l_in + slot, mask=part < num_parts, other=0.0)
    m = tl.max(m_s, 0)
    normaliser = m + tl.log(tl.sum(l_s * tl.exp(m_s - m), 0))
    chosen = tl.load(logits + b.to(tl.int64) * stride_l + tl.load(token_ids + b)).to(tl.float32)
    tl.store(logprob_out + b, chosen - normaliser)
    above = tl.load(above_in + slot, mask=part < num_parts, other=0)
    tl.store(rank_out + b, (tl.sum(above, 0) + 1).to(tl.int64))
    if TOP > 0:
        c = tl.arange(0, CANDIDATES)
        base = b.to(tl.int64) * num_parts * TOP
        value = tl.load(part_values + base + c, mask=c < num_parts * TOP, other=-float("inf"))
        index = tl.load(part_ids + base + c, mask=c < num_parts * TOP, other=2147483647)
        for n in range(TOP):
            open_ = index < 2147483647
            top = tl.max(tl.where(open_, value, -float("inf")), 0)
            winner = tl.min(tl.where(open_ & (value == top), index, 2147483647), 0)
            tl.store(ids_out + b * TOP + n, winner.to(tl.int64))
            tl.store(values_out + b * TOP + n, top - normaliser)
            index = tl.where(index == winner, 2147483647, index)


def gather_logprobs(logits: Tensor, token_ids: Tensor, top_n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """kernels.sampling.gather_logprobs."""
    num_rows, size = logits.shape
    top_n = min(top_n, size)
    device = logits.device
    part_size = min(PART, max(16, next_power_of_2(size)))
    num_parts = -(-size // part_size)
    m, l = torch.empty(2, num_rows * num_parts, dtype=torch.float32, device=device).unbind()  # noqa: E741
    above = torch.empty(num_rows * num_parts, dtype=torch.int32, device=device)
    part_values = torch.empty(num_rows * num_parts * top_n, dtype=torch.float32, device=device)
    part_ids = torch.empty(num_rows * num_parts * top_n, dtype=torch.int32, device=device)
    logprob = torch.empty(num_rows, dtype=torch.float32, device=device)
    rank = torch.empty(num_rows, dtype=torch.int64, device=device)
    ids = torch.empty(num_rows, top_n, dtype=torch.int64, device=device)
    values = torch.empty(num_rows, top_n, dtype=torch.float32, device=device)
    if num_rows:
        _part_logprobs_kernel[(num_rows, num_parts)](
            logits, token_ids, m, l, above, part_values, part_ids, num_parts, logits.stride(0),
            V=size, PART=part_size, TOP=top_n, num_warps=8, **dependent_launch(logits),
        )  # fmt: skip
        _merge_logprobs_kernel[(num_rows,)](
            logits, token_ids, m, l, above, part_values, part_ids, logprob, rank, ids, values, num_parts,
            logits.stride(0), PARTS=next_power_of_2(num_parts), TOP=top_n,
            CANDIDATES=next_power_of_2(max(1, num_parts * top_n)), num_warps=4, **dependent_launch(logits),
        )  # fmt: skip
    return logprob, rank, ids, values
