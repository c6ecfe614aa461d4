"""Drawing tokens in Triton, without sorting the vocabulary: races between tokens, and checks of their winners.

A row's logits are cut into parts of PART tokens; programs (row, part) work side by side, and what they leave for one
another is a few numbers a part. Rows are independent and the parts depend on the vocabulary alone, so a row's numbers
do not depend on its batch.

    race      every part's winner: the largest logit, or logit / temperature + Gumbel noise
    select    (top_k) the k-th largest value, the row's floor, from the maxima of small groups that `race` leaves
    weigh     the mass of the tokens likelier than the winner: is it in the nucleus?
    race, weigh again, for the rows whose winner is outside the kept set, among the tokens above it
    finish    the token; a row refused twice is raced again by one program until its winner is kept
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.launch import dependent_launch, next_power_of_2
from kernels.registry import jit, tl

if TYPE_CHECKING:
    from kernels.sampling import SamplingTensors

PART = 4096
GROUPS = 64  # of a part: every value among a row's k largest is in one of the k groups with the largest maxima
TILE_GROUPS = 64


@jit
def _uniforms(seed, position, first, BLOCK: tl.constexpr):
    """kernels.philox.uniform of tokens [first, first + BLOCK), first a multiple of 4."""
    group = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = group * 0
    r0, r1, r2, r3 = tl.philox(seed, group, zero + position.to(tl.uint32), zero, zero)
    bits = tl.interleave(tl.interleave(r0, r2), tl.interleave(r1, r3))
    return tl.minimum(bits.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10, 0.999999940395355224609375)


@jit
def _gumbel(u):
    """-log(-log1p(-u)); the rounding of w = 1 - u cancels in u / (1 - w)."""
    w = 1.0 - u
    exponential = tl.where(w == 1.0, u, -tl.log(w) * (u / tl.where(w == 1.0, 1.0, 1.0 - w)))
    return -tl.log(exponential)


@jit
def _load(row, i, inverse, V: tl.constexpr):
    """Tokens i of a row of logits, over the temperature; -inf past the vocabulary."""
    return tl.load(row + i, mask=i < V, other=-float("inf")).to(tl.float32) * inverse


@jit
def _race(
    row, first, end, seed, position, inverse, above, floor, m, min_p,
    V: tl.constexpr, BLOCK: tl.constexpr, FILTERED: tl.constexpr,
):  # fmt: skip
    """The best x + noise of tokens [first, end), its index and its x; FILTERED: among x > above, x >= floor, min_p."""
    best = -float("inf")
    best_index = first
    best_x = -float("inf")
    for start in range(first, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = _load(row, i, inverse, V)
        if FILTERED:
            x = tl.where((x > above) & (x >= floor) & (tl.exp(x - m) >= min_p), x, -float("inf"))
        u = _uniforms(seed, position, start, BLOCK)
        # The noise is at most -log(u): most blocks hold nothing that could still win, and skip the logarithms.
        if tl.max((u < tl.exp(x - best) * 1.001).to(tl.int32), 0) > 0:
            value = tl.where(x == -float("inf"), x, x + _gumbel(u))
            top = tl.max(value, 0)
            if top > best:
                best = top
                best_index = tl.min(tl.where(value == top, i, 2147483647), 0)
                best_x = tl.max(tl.where(i == best_index, x, -float("inf")), 0)
    return best, best_index, best_x


@jit
def _winner(best_in, index_in, x_in, base, num_parts, PARTS: tl.constexpr):
    """The winner of a row's parts: its value, token and x."""
    part = tl.arange(0, PARTS)
    exists = part < num_parts
    best = tl.load(best_in + base + part, mask=exists, other=-float("inf"))
    index = tl.load(index_in + base + part, mask=exists, other=2147483647)
    x = tl.load(x_in + base + part, mask=exists, other=-float("inf"))
    top = tl.max(best, 0)
    token = tl.min(tl.where(best == top, index, 2147483647), 0)
    return top, token, tl.max(tl.where(index == token, x, -float("inf")), 0)


@jit
def _total(x_in, base, num_parts, PARTS: tl.constexpr):
    part = tl.arange(0, PARTS)
    return tl.sum(tl.load(x_in + base + part, mask=part < num_parts, other=0.0), 0)


@jit
def _largest(m_in, base, num_parts, PARTS: tl.constexpr):
    part = tl.arange(0, PARTS)
    return tl.max(tl.load(m_in + base + part, mask=part < num_parts, other=-float("inf")), 0)


@jit
def _is_kept(
    x_token, m, floor, min_p, top_p, above_in, total_in, base, num_parts, PARTS: tl.constexpr, TOP_P: tl.constexpr
):  # fmt: skip
    """Whether a winner belongs to the kept set; above_in: the masses that `weigh` found over it."""
    kept = (x_token >= floor) & (tl.exp(x_token - m) >= min_p)
    if TOP_P:
        likelier = _total(above_in, base, num_parts, PARTS)
        mass = _total(total_in, base, num_parts, PARTS)
        kept = kept & ((top_p >= 1.0) | (likelier < top_p * mass) | (likelier == 0.0))
    return kept


@jit(do_not_specialize=["num_rows"])
def _race_kernel(
    logits, temperatures, seeds, positions, top_ps, min_ps, floors, best, index, xs, m_in, maxima, above, total,
    num_rows, num_parts, stride_l,
    V: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr,
    GREEDY: tl.constexpr, FILTERED: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr,
    AGAIN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    b = tl.program_id(0)
    part = tl.program_id(1)
    row = logits + b.to(tl.int64) * stride_l
    first = part * PART
    end = tl.minimum(first + PART, V)
    base = b * num_parts
    temperature = 0.0
    if not GREEDY:
        temperature = tl.load(temperatures + b)
    if temperature > 0:
        if not GREEDY:
            inverse = tl.div_rn(1.0, temperature)
            seed = tl.load(seeds + b)
            position = tl.load(positions + b)
            if AGAIN:
                _, _, x_before = _winner(best, index, xs, base, num_parts, PARTS)
                m = _largest(m_in, base, num_parts, PARTS)
                floor = tl.load(floors + b)
                top_p = tl.load(top_ps + b) if TOP_P else 1.0
                min_p = tl.load(min_ps + b) if MIN_P else 0.0
                if not _is_kept(x_before, m, floor, min_p, top_p, above, total, base, num_parts, PARTS, TOP_P):
                    value, token, x = _race(
                        row, first, end, seed, position, inverse, x_before, floor, m, min_p, V, BLOCK, True
                    )  # fmt: skip
                    there = (num_rows + b) * num_parts + part
                    tl.store(best + there, value)
                    tl.store(index + there, token)
                    tl.store(xs + there, x)
            else:
                value, token, x = _race(
                    row, first, end, seed, position, inverse, 0.0, 0.0, 0.0, 0.0, V, BLOCK, False
                )  # fmt: skip
                tl.store(best + base + part, value)
                tl.store(index + base + part, token)
                tl.store(xs + base + part, x)
                if FILTERED:
                    largest = tl.full([BLOCK], -float("inf"), tl.float32)
                    for start in range(first, end, BLOCK):
                        largest = tl.maximum(largest, _load(row, start + tl.arange(0, BLOCK), inverse, V))
                    tl.store(m_in + base + part, tl.max(largest, 0))
                    if TOP_K:
                        of_groups = tl.max(tl.reshape(largest, [GROUPS, BLOCK // GROUPS]), 1)
                        tl.store(maxima + (base + part).to(tl.int64) * GROUPS + tl.arange(0, GROUPS), of_groups)
    elif not AGAIN:
        top = -float("inf")
        token = first
        for start in range(first, end, BLOCK):
            i = start + tl.arange(0, BLOCK)
            x_block = _load(row, i, 1.0, V)
            block_top = tl.max(x_block, 0)
            if block_top > top:
                top = block_top
                token = tl.min(tl.where(x_block == block_top, i, 2147483647), 0)
        tl.store(best + base + part, top)
        tl.store(index + base + part, token)
        tl.store(xs + base + part, top)


@jit
def _keys(x):
    """Integers in the order of the float32 x."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def _value(key):
    """The float32 of a key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@jit
def _kth_key(keys, k):
    """The k-th largest of the keys [N], bit by bit; the smallest integer where there are fewer."""
    kth = tl.full([], -2147483648, tl.int32)
    for i in range(32):
        candidate = kth ^ ((k * 0 + 1) << (31 - i))
        kth = tl.where(tl.sum((keys >= candidate).to(tl.int32), 0) >= k, candidate, kth)
    return kth


@jit
def _load_groups(
    row, chosen, start, count, inverse,
    V: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr, TILE_GROUPS: tl.constexpr,
):  # fmt: skip
    """Keys of the tokens of groups chosen[start: start + TILE_GROUPS], flat; the smallest integer past `count`."""
    RUN: tl.constexpr = BLOCK // GROUPS
    place = start + tl.arange(0, TILE_GROUPS)
    group = tl.load(chosen + place, mask=place < count, other=0)
    t = tl.arange(0, PART // GROUPS)
    first = group // GROUPS * PART + group % GROUPS * RUN
    token = first[:, None] + (t // RUN * BLOCK + t % RUN)[None, :]
    exists = (place < count)[:, None] & (token < V)
    keys = _keys(tl.load(row + token, mask=exists, other=0.0).to(tl.float32) * inverse)
    return tl.reshape(tl.where(exists, keys, -2147483648), [TILE_GROUPS * (PART // GROUPS)])


@jit
def _select_kernel(
    logits, temperatures, top_ks, maxima, chosen, floors, num_parts, stride_l,
    V: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr,
    TILE_GROUPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """floors[b] = the k-th largest logit over the temperature; -inf where top_k is off."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    b = tl.program_id(0)
    temperature = tl.load(temperatures + b)
    k = tl.load(top_ks + b)
    floor = -float("inf")
    if (temperature > 0) & (k > 0) & (k < V):
        row = logits + b.to(tl.int64) * stride_l
        inverse = tl.div_rn(1.0, temperature)
        num_groups = num_parts * GROUPS
        group = tl.arange(0, PARTS * GROUPS)
        exists = group < num_groups
        keys = _keys(tl.load(maxima + b.to(tl.int64) * num_groups + group, mask=exists, other=-float("inf")))
        # The k-th largest maximum bounds the k-th largest value from below: smaller groups hold none of the k largest.
        is_chosen = exists & (keys >= _kth_key(keys, k))
        count = tl.sum(is_chosen.to(tl.int32), 0)
        mine = chosen + b.to(tl.int64) * num_groups
        tl.store(mine + tl.cumsum(is_chosen.to(tl.int32), 0) - 1, group, mask=is_chosen)
        tl.debug_barrier()
        kth = tl.full([], -2147483648, tl.int32)
        if count <= TILE_GROUPS:
            kth = _kth_key(_load_groups(row, mine, 0, count, inverse, V, PART, BLOCK, GROUPS, TILE_GROUPS), k)
        else:
            for i in range(32):
                candidate = kth ^ ((k * 0 + 1) << (31 - i))
                larger = k * 0
                for start in range(0, count, TILE_GROUPS):
                    tile = _load_groups(row, mine, start, count, inverse, V, PART, BLOCK, GROUPS, TILE_GROUPS)
                    larger += tl.sum((tile >= candidate).to(tl.int32), 0)
                kth = tl.where(larger >= k, candidate, kth)
        floor = _value(kth)
    tl.store(floors + b, floor)


@jit(do_not_specialize=["num_rows"])
def _weigh_kernel(
    logits, temperatures, top_ps, min_ps, floors, best, index, xs, m_in, above, total,
    num_rows, num_parts, stride_l,
    V: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, TOP_K: tl.constexpr,
    TOP_P: tl.constexpr, MIN_P: tl.constexpr, AGAIN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    b = tl.program_id(0)
    part = tl.program_id(1)
    base = b * num_parts
    temperature = tl.load(temperatures + b)
    if temperature > 0:
        m = _largest(m_in, base, num_parts, PARTS)
        _, _, x_token = _winner(best, index, xs, base, num_parts, PARTS)
        top_p = tl.load(top_ps + b) if TOP_P else 1.0
        there = base
        weigh = top_p < 1.0
        floor = -float("inf")
        if AGAIN:
            floor = tl.load(floors + b)
            min_p = tl.load(min_ps + b) if MIN_P else 0.0
            if _is_kept(x_token, m, floor, min_p, top_p, above, total, base, num_parts, PARTS, TOP_P):
                weigh = top_p > 1.0
            there = num_rows * num_parts + base
            _, _, x_token = _winner(best, index, xs, there, num_parts, PARTS)
        elif TOP_K:
            floor = tl.load(floors + b)
        elif part == 0:
            tl.store(floors + b, floor)
        if weigh:
            row = logits + b.to(tl.int64) * stride_l
            inverse = tl.div_rn(1.0, temperature)
            likelier = tl.zeros([BLOCK], tl.float32)
            everything = tl.zeros([BLOCK], tl.float32)
            for start in range(part * PART, tl.minimum((part + 1) * PART, V), BLOCK):
                x = _load(row, start + tl.arange(0, BLOCK), inverse, V)
                weight = tl.where(x >= floor, tl.exp(x - m), 0.0)
                likelier += tl.where(x > x_token, weight, 0.0)
                everything += weight
            tl.store(above + there + part, tl.sum(likelier, 0))
            if not AGAIN:
                tl.store(total + base + part, tl.sum(everything, 0))


@jit(do_not_specialize=["num_rows"])
def _finish_kernel(
    logits, temperatures, seeds, positions, top_ps, min_ps, floors, best_in, index_in, xs, m_in, above, total, tokens,
    values, num_rows, num_parts, stride_l,
    V: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, FILTERED: tl.constexpr, TOP_P: tl.constexpr,
    MIN_P: tl.constexpr, VALUES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    b = tl.program_id(0)
    base = b * num_parts
    best, token, x_token = _winner(best_in, index_in, xs, base, num_parts, PARTS)
    if FILTERED:
        temperature = tl.load(temperatures + b)
        if temperature > 0:
            m = _largest(m_in, base, num_parts, PARTS)
            floor = tl.load(floors + b)
            top_p = tl.load(top_ps + b) if TOP_P else 1.0
            min_p = tl.load(min_ps + b) if MIN_P else 0.0
            if not _is_kept(x_token, m, floor, min_p, top_p, above, total, base, num_parts, PARTS, TOP_P):
                again = num_rows * num_parts + base
                best_again, token_again, x_again = _winner(best_in, index_in, xs, again, num_parts, PARTS)
                mass = best * 0.0
                likelier = mass
                if TOP_P:
                    mass = _total(total, base, num_parts, PARTS)
                    likelier = _total(above + num_rows * num_parts, base, num_parts, PARTS)
                going = 0
                if best_again > -float("inf"):
                    token = token_again
                    x_token = x_again
                    if (top_p < 1.0) & (likelier >= top_p * mass) & (likelier > 0.0):
                        going = 1
                if going > 0:
                    row = logits + b.to(tl.int64) * stride_l
                    inverse = tl.div_rn(1.0, temperature)
                    seed = tl.load(seeds + b)
                    position = tl.load(positions + b)
                    while going > 0:
                        value, next_token, next_x = _race(
                            row, 0, V, seed, position, inverse, x_token, floor, m, min_p, V, BLOCK, True
                        )  # fmt: skip
                        if value > -float("inf"):
                            token = next_token
                            x_token = next_x
                            above_it = tl.zeros([BLOCK], tl.float32)
                            for start in range(0, V, BLOCK):
                                x = _load(row, start + tl.arange(0, BLOCK), inverse, V)
                                above_it += tl.where((x >= floor) & (x > x_token), tl.exp(x - m), 0.0)
                            likelier = tl.sum(above_it, 0)
                            if (likelier < top_p * mass) | (likelier == 0.0):
                                going = 0
                        else:
                            going = 0
    token = tl.where((token >= 0) & (token < V), token, 0)
    tl.store(tokens + b, token.to(tl.int64))
    if VALUES:
        tl.store(values + b, best)


def _choose(logits: Tensor, params: SamplingTensors | None, values: Tensor | None) -> Tensor:
    """Choose each row's token; greedily without params. Writes the winning values if asked."""
    num_rows, size = logits.shape
    device = logits.device
    tokens = torch.empty(num_rows, dtype=torch.int64, device=device)
    if num_rows == 0:
        return tokens
    num_parts = -(-size // PART)
    best, xs, above = torch.empty(3, 2 * num_rows * num_parts, dtype=torch.float32, device=device).unbind()
    index = torch.empty(2 * num_rows * num_parts, dtype=torch.int32, device=device)
    m, total = torch.empty(2, num_rows * num_parts, dtype=torch.float32, device=device).unbind()
    floors = torch.empty(num_rows, dtype=torch.float32, device=device)
    greedy = params is None or params.all_greedy
    nothing = logits
    temperatures, seeds, positions = nothing, nothing, nothing
    top_k = top_p = min_p = None
    if params is not None and not greedy:
        temperatures, seeds, positions = params.temperature, params.seeds, params.positions
        if params.any_filter:
            top_k, top_p, min_p = params.top_k, params.top_p, params.min_p
    filtered = not (top_k is None and top_p is None and min_p is None)
    top_ps, min_ps = nothing if top_p is None else top_p, nothing if min_p is None else min_p
    block = min(512, max(16, next_power_of_2(size)))
    groups = min(GROUPS, block)
    sizes = {"V": size, "PARTS": next_power_of_2(num_parts), **dependent_launch(logits)}
    filters = {"TOP_P": top_p is not None, "MIN_P": min_p is not None}
    grid = (num_rows, num_parts)
    maxima, chosen = best, index
    if top_k is not None:
        maxima = torch.empty(num_rows * num_parts * groups, dtype=torch.float32, device=device)
        chosen = torch.empty(num_rows * num_parts * groups, dtype=torch.int32, device=device)

    def race(again: bool) -> None:
        _race_kernel[grid](
            logits, temperatures, seeds, positions, top_ps, min_ps, floors, best, index, xs, m, maxima, above, total,
            num_rows, num_parts, logits.stride(0), PART=PART, BLOCK=block, GROUPS=groups, GREEDY=greedy,
            FILTERED=filtered, TOP_K=top_k is not None, AGAIN=again, num_warps=2, **filters, **sizes,
        )  # fmt: skip

    def weigh(again: bool) -> None:
        _weigh_kernel[grid](
            logits, temperatures, top_ps, min_ps, floors, best, index, xs, m, above, total, num_rows, num_parts,
            logits.stride(0), PART=PART, BLOCK=min(1024, block * 2), TOP_K=top_k is not None, AGAIN=again,
            num_warps=2, **filters, **sizes,
        )  # fmt: skip

    race(again=False)
    if filtered:
        if top_k is not None:
            _select_kernel[(num_rows,)](
                logits, temperatures, top_k, maxima, chosen, floors, num_parts, logits.stride(0),
                PART=PART, BLOCK=block, GROUPS=groups, TILE_GROUPS=TILE_GROUPS, num_warps=16, **sizes,
            )  # fmt: skip
        weigh(again=False)
        race(again=True)
        if top_p is not None:
            weigh(again=True)
    _finish_kernel[(num_rows,)](
        logits, temperatures, seeds, positions, top_ps, min_ps, floors, best, index, xs, m, above, total, tokens,
        best if values is None else values, num_rows, num_parts, logits.stride(0),
        BLOCK=min(4096, max(16, next_power_of_2(size))), FILTERED=filtered, VALUES=values is not None,
        num_warps=16 if filtered else 1, **filters, **sizes,
    )  # fmt: skip
    return tokens


def sample(logits: Tensor, params: SamplingTensors) -> Tensor:
    """kernels.sampling.sample, after the logits have been adjusted."""
    return _choose(logits, params, None)


def local_argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """kernels.sampling.local_argmax."""
    values = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    return values, _choose(logits, None, values)
