"""The mass of the tokens likelier than a winner: what tells whether it is in the nucleus (top-p)."""

from __future__ import annotations

from kernels.registry import jit, tl
from kernels.sampling_parts import is_kept, load_logits, max_of_parts, winner


@jit(do_not_specialize=["num_rows"])
def weigh_kernel(
    logits, temperatures, top_ps, min_ps, floors, best, index, xs, m_in, above, total,
    num_rows, num_parts, stride_l,
    V: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, TOP_K: tl.constexpr,
    TOP_P: tl.constexpr, MIN_P: tl.constexpr, AGAIN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A part's mass likelier than its row's winner, and its whole mass. AGAIN: likelier than the second race's."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    b = tl.program_id(0)
    part = tl.program_id(1)
    base = b * num_parts
    temperature = tl.load(temperatures + b)
    if temperature > 0:
        m = max_of_parts(m_in, base, num_parts, PARTS)
        _, _, x_token = winner(best, index, xs, base, num_parts, PARTS)
        top_p = tl.load(top_ps + b) if TOP_P else 1.0
        there = base
        weigh = top_p < 1.0
        floor = -float("inf")
        if AGAIN:
            floor = tl.load(floors + b)
            min_p = tl.load(min_ps + b) if MIN_P else 0.0
            if is_kept(x_token, m, floor, min_p, top_p, above, total, base, num_parts, PARTS, TOP_P):
                weigh = top_p > 1.0
            there = num_rows * num_parts + base
            _, _, x_token = winner(best, index, xs, there, num_parts, PARTS)
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
                x = load_logits(row, start + tl.arange(0, BLOCK), inverse, V)
                weight = tl.where(x >= floor, tl.exp(x - m), 0.0)
                likelier += tl.where(x > x_token, weight, 0.0)
                everything += weight
            tl.store(above + there + part, tl.sum(likelier, 0))
            if not AGAIN:
                tl.store(total + base + part, tl.sum(everything, 0))
