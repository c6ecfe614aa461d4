"""Drawing tokens in Triton, without sorting the vocabulary: races between tokens, and checks of their winners.

A row's logits are cut into parts of PART tokens; programs (row, part) work side by side, and what they leave for one
another is a few numbers a part. Rows are independent and the parts depend on the vocabulary alone, so a row's numbers
do not depend on its batch.

    race      every part's winner: the largest logit, or logit / temperature + Gumbel noise (sampling_race.py)
    select    (top_k) the k-th largest value, the row's floor, from the maxima that `race` leaves (sampling_top_k.py)
    weigh     the mass of the tokens likelier than the winner: is it in the nucleus? (sampling_top_p.py)
    race, weigh again, for the rows whose winner is outside the kept set, among the tokens above it
    finish    the token; a row refused twice is raced again by one program until its winner is kept
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.launch import dependent_launch, next_power_of_2
from kernels.registry import jit, tl
from kernels.sampling_parts import is_kept, load_logits, max_of_parts, sum_of_parts, winner
from kernels.sampling_race import race, race_kernel
from kernels.sampling_top_k import select_kernel
from kernels.sampling_top_p import weigh_kernel

if TYPE_CHECKING:
    from kernels.sampling import SamplingTensors

PART = 4096
GROUPS = 64  # of a part: every value among a row's k largest is in one of the k groups with the largest maxima
TILE_GROUPS = 64


@jit
def _mass_above(row, x_token, m, floor, inverse, V: tl.constexpr, BLOCK: tl.constexpr):
    """The mass of the tokens of a row that are likelier than x_token, in units of exp(m)."""
    mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        x = load_logits(row, start + tl.arange(0, BLOCK), inverse, V)
        mass += tl.where((x >= floor) & (x > x_token), tl.exp(x - m), 0.0)
    return tl.sum(mass, 0)


@jit
def _race_until_kept(
    row, token, x_token, seed, position, inverse, m, floor, min_p, bound, V: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Race among the tokens above the last winner until the mass above one is below `bound`, or none is left."""
    going = 1
    while going > 0:
        value, next_token, next_x = race(row, 0, V, seed, position, inverse, x_token, floor, m, min_p, V, BLOCK, True)
        if value > -float("inf"):
            token = next_token
            x_token = next_x
            likelier = _mass_above(row, x_token, m, floor, inverse, V, BLOCK)
            if (likelier < bound) | (likelier == 0.0):
                going = 0
        else:
            going = 0
    return token


@jit(do_not_specialize=["num_rows"])
def _finish_kernel(
    logits, temperatures, seeds, positions, top_ps, min_ps, floors, best_in, index_in, xs, m_in, above, total, tokens,
    values, num_rows, num_parts, stride_l,
    V: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, FILTERED: tl.constexpr, TOP_P: tl.constexpr,
    MIN_P: tl.constexpr, VALUES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """tokens[b] = the row's winner, if it is kept; else its second winner; else who wins of those that are left."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    b = tl.program_id(0)
    base = b * num_parts
    best, token, x_token = winner(best_in, index_in, xs, base, num_parts, PARTS)
    if FILTERED:
        temperature = tl.load(temperatures + b)
        if temperature > 0:
            m = max_of_parts(m_in, base, num_parts, PARTS)
            floor = tl.load(floors + b)
            top_p = tl.load(top_ps + b) if TOP_P else 1.0
            min_p = tl.load(min_ps + b) if MIN_P else 0.0
            if not is_kept(x_token, m, floor, min_p, top_p, above, total, base, num_parts, PARTS, TOP_P):
                again = num_rows * num_parts + base
                best_again, token_again, x_again = winner(best_in, index_in, xs, again, num_parts, PARTS)
                is_left = best_again > -float("inf")
                if is_left:
                    token = token_again
                if TOP_P:
                    bound = top_p * sum_of_parts(total, base, num_parts, PARTS)
                    likelier = sum_of_parts(above + num_rows * num_parts, base, num_parts, PARTS)
                    if is_left & (top_p < 1.0) & (likelier >= bound) & (likelier > 0.0):
                        row = logits + b.to(tl.int64) * stride_l
                        inverse = tl.div_rn(1.0, temperature)
                        seed = tl.load(seeds + b)
                        position = tl.load(positions + b)
                        token = _race_until_kept(
                            row, token, x_again, seed, position, inverse, m, floor, min_p, bound, V, BLOCK
                        )  # fmt: skip
    token = tl.where((token >= 0) & (token < V), token, 0)
    tl.store(tokens + b, token.to(tl.int64))
    if VALUES:
        tl.store(values + b, best)


class _Draw:
    """One token for each row, greedily without params: a method a stage, and what the stages leave for one another."""

    def __init__(self, logits: Tensor, params: SamplingTensors | None) -> None:
        num_rows, size = logits.shape
        num_parts, device = -(-size // PART), logits.device
        self.greedy = params is None or params.all_greedy
        temperatures = seeds = positions = logits  # stands for what is not read
        self.top_k = self.top_p = self.min_p = None
        if params is not None and not self.greedy:
            temperatures, seeds, positions = params.temperature, params.seeds, params.positions
            if params.any_filter:
                self.top_k, self.top_p, self.min_p = params.top_k, params.top_p, params.min_p
        self.filtered = not (self.top_k is None and self.top_p is None and self.min_p is None)
        self._logits, self._size, self._grid = logits, size, (num_rows, num_parts)
        self._noise = seeds, positions
        self._temperatures = temperatures
        self._top_ps = logits if self.top_p is None else self.top_p
        self._min_ps = logits if self.min_p is None else self.min_p
        self._block = min(512, max(16, next_power_of_2(size)))
        self._groups = min(GROUPS, self._block)
        self._options = {"V": size, "PARTS": next_power_of_2(num_parts), **dependent_launch(logits)}
        self._filters = {"TOP_P": self.top_p is not None, "MIN_P": self.min_p is not None}
        # Of both races, one behind the other.
        best, xs, above = torch.empty(3, 2 * num_rows * num_parts, dtype=torch.float32, device=device).unbind()
        index = torch.empty(2 * num_rows * num_parts, dtype=torch.int32, device=device)
        m, total = torch.empty(2, num_rows * num_parts, dtype=torch.float32, device=device).unbind()
        self._winners, self._m, self._masses = (best, index, xs), m, (above, total)
        self._floors = torch.empty(num_rows, dtype=torch.float32, device=device)
        self._maxima, self._chosen = best, index  # not read without top_k
        if self.top_k is not None:
            num_groups = num_rows * num_parts * self._groups
            self._maxima = torch.empty(num_groups, dtype=torch.float32, device=device)
            self._chosen = torch.empty(num_groups, dtype=torch.int32, device=device)

    def race(self, *, again: bool = False) -> None:
        """Find the winner of every part; again: among the tokens above a winner that is not kept."""
        race_kernel[self._grid](
            self._logits, self._temperatures, *self._noise, self._top_ps, self._min_ps, self._floors, *self._winners,
            self._m, self._maxima, *self._masses, *self._grid, self._logits.stride(0), PART=PART, BLOCK=self._block,
            GROUPS=self._groups, GREEDY=self.greedy, FILTERED=self.filtered, TOP_K=self.top_k is not None, AGAIN=again,
            num_warps=2, **self._filters, **self._options,
        )  # fmt: skip

    def select(self) -> None:
        """Find the floor of every row that has top_k."""
        num_rows, num_parts = self._grid
        select_kernel[(num_rows,)](
            self._logits, self._temperatures, self.top_k, self._maxima, self._chosen, self._floors, num_parts,
            self._logits.stride(0), PART=PART, BLOCK=self._block, GROUPS=self._groups, TILE_GROUPS=TILE_GROUPS,
            num_warps=16, **self._options,
        )  # fmt: skip

    def weigh(self, *, again: bool = False) -> None:
        """Sum what is likelier than the winner of every row; again: than the winner of the second race."""
        weigh_kernel[self._grid](
            self._logits, self._temperatures, self._top_ps, self._min_ps, self._floors, *self._winners, self._m,
            *self._masses, *self._grid, self._logits.stride(0), PART=PART, BLOCK=min(1024, self._block * 2),
            TOP_K=self.top_k is not None, AGAIN=again, num_warps=2, **self._filters, **self._options,
        )  # fmt: skip

    def finish(self, values: Tensor | None) -> Tensor:
        """The tokens [B] int64; values [B] float32 gets the winning values."""
        num_rows, _ = self._grid
        tokens = torch.empty(num_rows, dtype=torch.int64, device=self._logits.device)
        _finish_kernel[(num_rows,)](
            self._logits, self._temperatures, *self._noise, self._top_ps, self._min_ps, self._floors, *self._winners,
            self._m, *self._masses, tokens, self._m if values is None else values, *self._grid, self._logits.stride(0),
            BLOCK=min(4096, max(16, next_power_of_2(self._size))), FILTERED=self.filtered, VALUES=values is not None,
            num_warps=16 if self.filtered else 1, **self._filters, **self._options,
        )  # fmt: skip
        return tokens


def _choose(logits: Tensor, params: SamplingTensors | None, values: Tensor | None) -> Tensor:
    """Choose each row's token; greedily without params. Writes the winning values if asked."""
    if not len(logits):
        return torch.empty(0, dtype=torch.int64, device=logits.device)
    draw = _Draw(logits, params)
    draw.race()
    if draw.filtered:
        if draw.top_k is not None:
            draw.select()
        draw.weigh()
        draw.race(again=True)
        if draw.top_p is not None:
            draw.weigh(again=True)
    return draw.finish(values)


def sample(logits: Tensor, params: SamplingTensors) -> Tensor:
    """kernels.sampling.sample, after the logits have been adjusted."""
    return _choose(logits, params, None)


def local_argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """kernels.sampling.local_argmax."""
    values = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    return values, _choose(logits, None, values)
