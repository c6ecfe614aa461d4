"""The sampling operations of kernels.sampling in Triton.

Two launches choose a token. The race: programs (row, part), each over PART tokens, leave their winner, largest scaled
logit m and sum of exponentials l. The finish: one program a row picks the winner of winners and, where a row has a
filter, checks that it belongs to the kept set; a winner that does not shows that the kept set lies above it, and the
race is run again over what is left. The parts depend on the vocabulary alone, so a row's numbers do not depend on the
batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.launch import dependent_launch, next_power_of_2
from kernels.registry import jit, tl

if TYPE_CHECKING:
    from kernels.sampling import LogitBias, Penalties, SamplingTensors

PART = 4096  # tokens a program of the race handles


@jit
def gumbel(seed, position, first, BLOCK: tl.constexpr):
    """Gumbel noise of tokens [first, first + BLOCK), first a multiple of 4: kernels.philox.gumbel_noise."""
    group = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = group * 0
    r0, r1, r2, r3 = tl.philox(seed, group, zero + position.to(tl.uint32), zero, zero)
    bits = tl.interleave(tl.interleave(r0, r2), tl.interleave(r1, r3))
    u = tl.minimum(bits.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10, 0.999999940395355224609375)
    # -log1p(-u): the rounding of w = 1 - u cancels in u / (1 - w).
    w = 1.0 - u
    exponential = tl.where(w == 1.0, u, -tl.log(w) * (u / tl.where(w == 1.0, 1.0, 1.0 - w)))
    return -tl.log(exponential)


@jit
def _race_kernel(
    logits, temperatures, seeds, positions, best_out, index_out, x_out, m_out, l_out, num_parts, stride_l,
    V: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr, GREEDY: tl.constexpr, SUMS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    b = tl.program_id(0)
    part = tl.program_id(1)
    row = logits + b.to(tl.int64) * stride_l
    temperature = 0.0
    if not GREEDY:
        temperature = tl.load(temperatures + b)
        seed = tl.load(seeds + b)
        position = tl.load(positions + b)
    best = -float("inf")
    best_x = -float("inf")
    best_index = part * PART
    m = -float("inf")
    l = 0.0  # noqa: E741
    for first in range(part * PART, min((part + 1) * PART, V), BLOCK):
        i = first + tl.arange(0, BLOCK)
        x = tl.load(row + i, mask=i < V, other=-float("inf")).to(tl.float32)
        value = x
        if not GREEDY:  # noqa: SIM102 - one is known at compile time
            if temperature > 0:
                x = tl.div_rn(x, temperature + tl.zeros([BLOCK], tl.float32))
                value = x + gumbel(seed, position, first, BLOCK)
                value = tl.where(x == -float("inf"), x, value)
        top = tl.max(value, 0)
        index = tl.min(tl.where(value == top, i, 2147483647), 0)
        if top > best:
            best = top
            best_index = index
            best_x = tl.max(tl.where(i == index, x, -float("inf")), 0)
        if SUMS:
            m_new = tl.maximum(m, tl.max(x, 0))
            shift = tl.where(m_new == -float("inf"), 0.0, m_new)
            l = l * tl.exp(m - shift) + tl.sum(tl.exp(x - shift), 0)  # noqa: E741
            m = m_new
    slot = b * num_parts + part
    tl.store(best_out + slot, best)
    tl.store(index_out + slot, best_index)
    tl.store(x_out + slot, best_x)
    if SUMS:
        tl.store(m_out + slot, m)
        tl.store(l_out + slot, l)


@jit
def _kth_largest(row, temperature, k, largest, V: tl.constexpr, BLOCK: tl.constexpr):
    """A value t with count(x >= t) >= k > count(x > t), or with exactly k values from t on; -inf if they are fewer.

    Values more than 60 below the largest cannot win and are not looked for. Eight-fold search by value.
    """
    low = largest - 60.0
    high = largest + tl.abs(largest) * 1e-6 + 1e-30
    pivot = tl.arange(0, 8)
    searching = 1
    is_first = 1
    while searching > 0:
        pivots = low + (high - low) * (pivot.to(tl.float32) * 0.125)
        counts = tl.zeros([8, BLOCK], tl.int32)
        for first in range(0, V, BLOCK):
            i = first + tl.arange(0, BLOCK)
            x = tl.load(row + i, mask=i < V, other=-float("inf")).to(tl.float32)
            x = tl.div_rn(x, temperature + tl.zeros([BLOCK], tl.float32))
            counts += (x[None, :] >= pivots[:, None]).to(tl.int32)
        count = tl.sum(counts, 1)
        enough = count >= k
        middle = tl.max(tl.where(pivot == 4, pivots, -float("inf")), 0)
        at_low = tl.max(tl.where(pivot == 0, count, 0), 0)
        if at_low < k:
            if is_first > 0:
                low = low * 0 - float("inf")
            searching = 0
        else:
            done = (middle <= low) | (middle >= high)
            new_low = tl.max(tl.where(enough, pivots, -float("inf")), 0)
            new_high = tl.min(tl.where(enough, high, pivots), 0)
            exactly = tl.max((count == k).to(tl.int32), 0)
            if exactly > 0:
                new_low = tl.max(tl.where(count == k, pivots, -float("inf")), 0)
                done = middle == middle
            low = new_low
            high = new_high
            if done:
                searching = 0
        is_first = 0
    return low


@jit
def _finish_kernel(
    logits, temperatures, seeds, positions, top_ks, top_ps, min_ps, best_in, index_in, x_in, m_in, l_in, tokens,
    values, num_parts, stride_l,
    V: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, SEARCH_BLOCK: tl.constexpr, TOP_K: tl.constexpr,
    TOP_P: tl.constexpr, MIN_P: tl.constexpr, VALUES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    b = tl.program_id(0)
    row = logits + b.to(tl.int64) * stride_l
    part = tl.arange(0, PARTS)
    slot = b * num_parts + part
    exists = part < num_parts
    part_best = tl.load(best_in + slot, mask=exists, other=-float("inf"))
    part_index = tl.load(index_in + slot, mask=exists, other=2147483647)
    best = tl.max(part_best, 0)
    token = tl.min(tl.where(part_best == best, part_index, 2147483647), 0)
    token = tl.where(token < V, token, 0)
    if TOP_K or TOP_P or MIN_P:
        temperature = tl.load(temperatures + b)
        if temperature > 0:
            seed = tl.load(seeds + b)
            position = tl.load(positions + b)
            part_m = tl.load(m_in + slot, mask=exists, other=-float("inf"))
            part_l = tl.load(l_in + slot, mask=exists, other=0.0)
            part_x = tl.load(x_in + slot, mask=exists, other=-float("inf"))
            m = tl.max(part_m, 0)
            mass = tl.sum(part_l * tl.exp(part_m - m), 0)
            x_token = tl.max(tl.where(part_index == token, part_x, -float("inf")), 0)
            floor = m * 0 - float("inf")
            if TOP_K:
                k = tl.load(top_ks + b)
                if (k > 0) & (k < V):
                    floor = _kth_largest(row, temperature, k, m, V, SEARCH_BLOCK)
            top_p = m * 0 + 1.0
            if TOP_P:
                top_p = tl.load(top_ps + b)
            min_p = m * 0
            if MIN_P:
                min_p = tl.load(min_ps + b)
            going = 1
            if (floor == -float("inf")) & (top_p >= 1) & (min_p <= 0):
                going = 0
            while going > 0:
                kept = (x_token >= floor) & (tl.exp(x_token - m) >= min_p)
                if kept & (top_p < 1):
                    # In the nucleus if what is strictly likelier does not reach top_p of the mass yet.
                    above = tl.zeros([BLOCK], tl.float32)
                    total = tl.zeros([BLOCK], tl.float32)
                    for first in range(0, V, BLOCK):
                        i = first + tl.arange(0, BLOCK)
                        x = tl.load(row + i, mask=i < V, other=-float("inf")).to(tl.float32)
                        x = tl.div_rn(x, temperature + tl.zeros([BLOCK], tl.float32))
                        weight = tl.where(x >= floor, tl.exp(x - m), 0.0)
                        total += weight
                        above += tl.where(x > x_token, weight, 0.0)
                    likelier = tl.sum(above, 0)
                    if floor > -float("inf"):
                        mass = tl.sum(total, 0)
                    kept = (likelier < top_p * mass) | (likelier == 0)
                if kept:
                    going = 0
                else:
                    best = -float("inf")
                    next_x = x_token
                    for first in range(0, V, BLOCK):
                        i = first + tl.arange(0, BLOCK)
                        x = tl.load(row + i, mask=i < V, other=-float("inf")).to(tl.float32)
                        x = tl.div_rn(x, temperature + tl.zeros([BLOCK], tl.float32))
                        runs = (x > x_token) & (x >= floor) & (tl.exp(x - m) >= min_p)
                        value = tl.where(runs, x + gumbel(seed, position, first, BLOCK), -float("inf"))
                        top = tl.max(value, 0)
                        if top > best:
                            best = top
                            token = tl.min(tl.where(value == top, i, 2147483647), 0)
                            next_x = tl.max(tl.where(i == token, x, -float("inf")), 0)
                    x_token = next_x
                    if best == -float("inf"):
                        going = 0
    tl.store(tokens + b, token.to(tl.int64))
    if VALUES:
        tl.store(values + b, best)


def _choose(logits: Tensor, params: SamplingTensors | None, values: Tensor | None) -> Tensor:
    """The race and its finish over logits [B, V]; greedy without params. Writes the winning values if asked."""
    num_rows, size = logits.shape
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if num_rows == 0:
        return tokens
    num_parts = -(-size // PART)
    floats = torch.empty(4, num_rows * num_parts, dtype=torch.float32, device=logits.device)
    best, x, m, l = floats.unbind()  # noqa: E741
    index = torch.empty(num_rows * num_parts, dtype=torch.int32, device=logits.device)
    greedy = params is None or params.all_greedy
    nothing = logits
    temperature, seeds, positions = nothing, nothing, nothing
    top_k = top_p = min_p = None
    if params is not None and not greedy:
        temperature, seeds, positions = params.temperature, params.seeds, params.positions
        if params.any_filter:
            top_k, top_p, min_p = params.top_k, params.top_p, params.min_p
    filtered = not (top_k is None and top_p is None and min_p is None)
    _race_kernel[(num_rows, num_parts)](
        logits, temperature, seeds, positions, best, index, x, m, l, num_parts, logits.stride(0),
        V=size, PART=PART, BLOCK=min(2048, max(16, next_power_of_2(size))), GREEDY=greedy, SUMS=filtered, num_warps=8,
        **dependent_launch(logits),
    )  # fmt: skip
    _finish_kernel[(num_rows,)](
        logits, temperature, seeds, positions,
        nothing if top_k is None else top_k, nothing if top_p is None else top_p, nothing if min_p is None else min_p,
        best, index, x, m, l, tokens, best if values is None else values, num_parts, logits.stride(0),
        V=size, PARTS=next_power_of_2(num_parts), BLOCK=min(4096, max(16, next_power_of_2(size))),
        SEARCH_BLOCK=min(2048, max(16, next_power_of_2(size))), TOP_K=top_k is not None, TOP_P=top_p is not None,
        MIN_P=min_p is not None, VALUES=values is not None, num_warps=16 if filtered else 1,
        **dependent_launch(logits),
    )  # fmt: skip
    return tokens


def sample(logits: Tensor, params: SamplingTensors) -> Tensor:
    """kernels.sampling.sample, after the logits have been adjusted."""
    return _choose(logits, params, None)


def local_argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """kernels.sampling.local_argmax."""
    values = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    return values, _choose(logits, None, values)


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
