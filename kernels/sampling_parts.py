"""What programs that share a row of logits leave for one another, a few numbers a part, and how they read it."""

from __future__ import annotations

from kernels.registry import jit, tl


@jit
def load_logits(row, i, inverse, V: tl.constexpr):
    """Tokens i of a row of logits, over the temperature; -inf past the vocabulary."""
    return tl.load(row + i, mask=i < V, other=-float("inf")).to(tl.float32) * inverse


@jit
def leave(best, index, xs, place, value, token, x):
    """A part's winner: its value in the race, its token and its x."""
    tl.store(best + place, value)
    tl.store(index + place, token)
    tl.store(xs + place, x)


@jit
def winner(best_in, index_in, x_in, base, num_parts, PARTS: tl.constexpr):
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
def sum_of_parts(x_in, base, num_parts, PARTS: tl.constexpr):
    """The sum of a row's parts."""
    part = tl.arange(0, PARTS)
    return tl.sum(tl.load(x_in + base + part, mask=part < num_parts, other=0.0), 0)


@jit
def max_of_parts(m_in, base, num_parts, PARTS: tl.constexpr):
    """The largest of a row's parts."""
    part = tl.arange(0, PARTS)
    return tl.max(tl.load(m_in + base + part, mask=part < num_parts, other=-float("inf")), 0)


@jit
def is_kept(
    x_token, m, floor, min_p, top_p, above_in, total_in, base, num_parts, PARTS: tl.constexpr, TOP_P: tl.constexpr
):  # fmt: skip
    """Whether a winner belongs to the kept set; above_in: the masses that `weigh_kernel` found over it."""
    kept = (x_token >= floor) & (tl.exp(x_token - m) >= min_p)
    if TOP_P:
        likelier = sum_of_parts(above_in, base, num_parts, PARTS)
        mass = sum_of_parts(total_in, base, num_parts, PARTS)
        kept = kept & ((top_p >= 1.0) | (likelier < top_p * mass) | (likelier == 0.0))
    return kept
