"""StepClock: how long a step may take, from how long others took."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from engine.step import StepPlan, unpack


class StepSize(NamedTuple):
    """What a step's time depends on."""

    tokens: int
    """Computed: matrix products."""
    pairs: int
    """A token and one that it attends to: attention."""
    rows: int
    """Of logits: tokens drawn, and prompt tokens whose log-probabilities are wanted."""


class PlanSizes:
    """Sizes of one epoch's plans, in order: plans say how many tokens are computed, and not after how many."""

    def __init__(self) -> None:
        self._computed: dict[int, int] = {}
        self._listening: set[int] = set()
        self._seq_ids = b""
        self._starts: npt.NDArray[np.int64] = np.zeros(0, np.int64)

    def size(self, plan: StepPlan) -> StepSize:
        """The size of the next plan."""
        if plan.new or plan.dropped or plan.seq_ids != self._seq_ids:
            self._change(plan)
        counts = unpack(plan.num_tokens)
        ends = self._starts + counts
        pairs = int((counts * ends).sum())
        self._starts = ends
        rows = len(plan.sample_seqs) // 4
        if self._listening:
            seq_ids = unpack(plan.seq_ids).tolist()
            rows += sum(int(count) for seq_id, count in zip(seq_ids, counts) if seq_id in self._listening)
        return StepSize(int(counts.sum()), pairs, rows)

    def _change(self, plan: StepPlan) -> None:
        """Another batch than the last plan's."""
        computed = self._computed
        computed.update(zip(unpack(self._seq_ids).tolist(), self._starts.tolist()))
        for seq_id in unpack(plan.dropped).tolist():
            computed.pop(seq_id, None)
            self._listening.discard(seq_id)
        for new in plan.new:
            computed[new.seq_id] = new.num_computed
            if new.params.prompt_logprobs is not None:
                self._listening.add(new.seq_id)
        self._seq_ids = plan.seq_ids
        self._starts = np.array([computed.get(seq_id, 0) for seq_id in unpack(plan.seq_ids).tolist()], np.int64)


class StepClock:
    """Learns how long steps take, so that a deadline follows what was measured.

    A step's time is taken for a sum of parts that grow with its tokens, its pairs and its rows, and a part that stays.
    Then a step that was measured bounds every other: it cannot take longer by more than what grew most. Of all these
    bounds the least is the expectation, so that a long prefill after short steps gets the time it needs, and not a
    fixed one; `first_s` is allowed before anything was measured: the first step compiles kernels.
    """

    def __init__(self, *, first_s: float = 300.0, floor_s: float = 5.0, factor: float = 5.0) -> None:
        """A step is stuck after floor_s + factor * what is expected."""
        self._first_s, self._floor_s, self._factor = first_s, floor_s, factor
        self._slowest: dict[StepSize, float] = {}
        """Of each size, rounded down to powers of two."""

    def observe(self, size: StepSize, seconds: float) -> None:
        """Note one step. Of its size the slowest counts, and fades by a tenth with every quicker one."""
        rounded = StepSize(*(1 << n.bit_length() >> 1 for n in size))
        self._slowest[rounded] = max(seconds, self._slowest.get(rounded, 0.0) * 0.9)

    def expected_s(self, size: StepSize) -> float | None:
        """An upper guess of one step's time; None before anything was measured."""
        bounds = [seconds * _growth(size, seen) for seen, seconds in list(self._slowest.items())]
        return min(bounds, default=None)

    def stuck_s(self, size: StepSize) -> float:
        """A step that shows no progress for so long is stuck."""
        expected_s = self.expected_s(size)
        return self._first_s if expected_s is None else self._floor_s + self._factor * expected_s

    @property
    def first_s(self) -> float:
        """What a step is allowed that must be prepared first, by compiling its kernels."""
        return self._first_s


def _growth(size: StepSize, seen: StepSize) -> float:
    """How much longer a step of `size` can take than one of `seen`."""
    return max(1.0, *(now / max(1, then) for now, then in zip(size, seen)))
