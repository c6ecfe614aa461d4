"""The race between the tokens of a row: the largest logit / temperature + Gumbel noise wins, or the largest logit."""

from __future__ import annotations

from kernels.registry import jit, tl
from kernels.sampling_parts import is_kept, leave, load_logits, max_of_parts, winner


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
def race(
    row, first, end, seed, position, inverse, above, floor, m, min_p,
    V: tl.constexpr, BLOCK: tl.constexpr, FILTERED: tl.constexpr,
):  # fmt: skip
    """The best x + noise of tokens [first, end), its index and its x; FILTERED: among x > above, x >= floor, min_p."""
    best = -float("inf")
    best_index = first
    best_x = -float("inf")
    for start in range(first, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = load_logits(row, i, inverse, V)
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
def _leave_argmax(row, first, end, best, index, xs, place, V: tl.constexpr, BLOCK: tl.constexpr):
    """A greedy row's winner: the largest logit of tokens [first, end), and the first token that has it."""
    top = -float("inf")
    token = first
    for start in range(first, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x_block = load_logits(row, i, 1.0, V)
        block_top = tl.max(x_block, 0)
        if block_top > top:
            top = block_top
            token = tl.min(tl.where(x_block == block_top, i, 2147483647), 0)
    leave(best, index, xs, place, top, token, top)


@jit
def _leave_maxima(
    row, first, end, inverse, m_out, maxima_out,
    V: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr, TOP_K: tl.constexpr,
):  # fmt: skip
    """m_out: the largest logit over the temperature of tokens [first, end). TOP_K: maxima_out, those of its groups."""
    maxima = tl.full([BLOCK], -float("inf"), tl.float32)
    for start in range(first, end, BLOCK):
        maxima = tl.maximum(maxima, load_logits(row, start + tl.arange(0, BLOCK), inverse, V))
    tl.store(m_out, tl.max(maxima, 0))
    if TOP_K:
        of_groups = tl.max(tl.reshape(maxima, [GROUPS, BLOCK // GROUPS]), 1)
        tl.store(maxima_out + tl.arange(0, GROUPS), of_groups)


@jit(do_not_specialize=["num_rows"])
def race_kernel(
    logits, temperatures, seeds, positions, top_ps, min_ps, floors, best, index, xs, m_in, maxima, above, total,
    num_rows, num_parts, stride_l,
    V: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr,
    GREEDY: tl.constexpr, FILTERED: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr,
    AGAIN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The winner of a part of a row. AGAIN: of a row whose winner is not kept, among the tokens above that winner."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    b = tl.program_id(0)
    part = tl.program_id(1)
    row = logits + b.to(tl.int64) * stride_l
    first = part * PART
    end = tl.minimum(first + PART, V)
    base = b * num_parts
    if GREEDY:
        _leave_argmax(row, first, end, best, index, xs, base + part, V, BLOCK)
    else:
        temperature = tl.load(temperatures + b)
        if temperature > 0:
            inverse = tl.div_rn(1.0, temperature)
            seed = tl.load(seeds + b)
            position = tl.load(positions + b)
            if AGAIN:
                _, _, x_before = winner(best, index, xs, base, num_parts, PARTS)
                m = max_of_parts(m_in, base, num_parts, PARTS)
                floor = tl.load(floors + b)
                top_p = tl.load(top_ps + b) if TOP_P else 1.0
                min_p = tl.load(min_ps + b) if MIN_P else 0.0
                if not is_kept(x_before, m, floor, min_p, top_p, above, total, base, num_parts, PARTS, TOP_P):
                    value, token, x = race(
                        row, first, end, seed, position, inverse, x_before, floor, m, min_p, V, BLOCK, True
                    )  # fmt: skip
                    leave(best, index, xs, (num_rows + b) * num_parts + part, value, token, x)
            else:
                value, token, x = race(
                    row, first, end, seed, position, inverse, 0.0, 0.0, 0.0, 0.0, V, BLOCK, False
                )  # fmt: skip
                leave(best, index, xs, base + part, value, token, x)
                if FILTERED:
                    of_groups = maxima + (base + part).to(tl.int64) * GROUPS
                    _leave_maxima(row, first, end, inverse, m_in + base + part, of_groups, V, BLOCK, GROUPS, TOP_K)
        elif not AGAIN:
            _leave_argmax(row, first, end, best, index, xs, base + part, V, BLOCK)
