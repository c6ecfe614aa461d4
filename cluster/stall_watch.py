"""StallWatch: whether ranks that answer still work on their step, from what they say of themselves."""

from __future__ import annotations

import msgspec

from cluster.rank_loop import Progress

LOOK_AFTER_S = 0.5
"""A step that takes longer has its ranks asked what they do."""
ASK_EVERY_S = 0.2
"""An answer costs a rank 3 ms: asked at every look, it would look busy on a host that takes cores away."""
QUIET_S = 2.0
"""Ranks that all sleep for so long, in the middle of a step, wait for something that will not come."""
QUIET_ROUNDS = 5
BUSY_SHARE = 0.15
"""A rank that uses a larger share of a core works, whichever of its threads does. It is taken over all the quiet time:
what Ray's threads and the answers themselves need (3 %) comes in bursts, and a host that takes cores away counts the
time without them as used."""
LOOK_LIMIT_S = 0.5
"""More time between two looks is not counted: whoever looks was held up, and perhaps the whole machine."""


class Stall(msgspec.Struct, frozen=True):
    """A step that will not end."""

    ranks: tuple[int, ...]
    """Who is at fault."""
    reason: str


class StallWatch:
    """Watches the oldest step in flight. Time is counted from look to look.

    Two signs, beside a rank that does not answer at all. On CPUs: every rank's thread sleeps, and none came to another
    collective. A rank that computes uses its core or waits for one, and only then may others sleep, who wait for it in
    a collective; so this needs no guess of how long a step takes. And on any device: no step and no collective was
    finished for longer than a step of this size may take.
    """

    def __init__(self, *, on_cpu: bool) -> None:
        self._on_cpu = on_cpu
        self._step: object = None
        self._looked_s = 0.0
        self._asked_s = 0.0
        self._waited_s = 0.0
        self._quiet_s = 0.0
        self._quiet_rounds = 0
        self._quiet_since: tuple[list[Progress], float] = [], 0.0
        """What the ranks said when they were last seen at work, and when."""
        self._round: list[Progress] = []
        self._round_s = 0.0

    @property
    def waited_s(self) -> float:
        """How long no step and no collective was finished."""
        return self._waited_s

    def begin(self, step: object, now_s: float) -> bool:
        """Look at the oldest step in flight; whether it is time to ask the ranks."""
        if step != self._step:
            self._step, self._waited_s, self._round = step, 0.0, []
            self._quiet_s, self._quiet_rounds = 0.0, 0
        else:
            self._waited_s += min(now_s - self._looked_s, LOOK_LIMIT_S)
        self._looked_s = now_s
        if self._waited_s < LOOK_AFTER_S or now_s - self._asked_s < ASK_EVERY_S:
            return False
        self._asked_s = now_s
        return True

    def judge(self, answers: list[Progress] | None, limit_s: float, first_s: float, now_s: float) -> Stall | None:
        """Take the answers of all ranks, if they came; what is wrong, if something is.

        limit_s: what a step of this size may take; first_s: if its kernels are compiled first.
        """
        preparing = False
        if answers is not None:
            before, self._round = self._round, answers
            if len(before) == len(answers):
                self._compare(before, answers, now_s)
            else:
                self._quiet_since = answers, now_s
            self._round_s = now_s
        if not self._on_cpu:
            preparing = any(progress.preparing for progress in self._round)
        if self._on_cpu and self._quiet_s >= QUIET_S and self._quiet_rounds >= QUIET_ROUNDS:
            return self._stall(f"no rank has done anything for {self._quiet_s:.1f} s")
        if self._waited_s > (max(limit_s, first_s) if preparing else limit_s):
            return self._stall(f"no progress for {self._waited_s:.1f} s, {limit_s:.1f} s are enough for such a step")
        return None

    def _compare(self, before: list[Progress], after: list[Progress], now_s: float) -> None:
        between_s = now_s - self._round_s
        if any(_came_further(a, b) or b.awaits_driver for a, b in zip(before, after)):
            self._waited_s = 0.0
        first, first_s = self._quiet_since
        if any(_works(a, b, between_s) for a, b in zip(before, after)) or any(
            b.process_s - a.process_s > BUSY_SHARE * (now_s - first_s) for a, b in zip(first, after)
        ):
            self._quiet_s, self._quiet_rounds = 0.0, 0
            self._quiet_since = after, now_s
        else:
            self._quiet_s += min(between_s, LOOK_LIMIT_S)
            self._quiet_rounds += 1

    def _stall(self, reason: str) -> Stall:
        """Blame the ranks that others wait for in a collective, or all when nobody is ahead."""
        reached = [progress.collectives for progress in self._round]
        absent = tuple(rank for rank, count in enumerate(reached) if count < max(reached))
        if absent:
            return Stall(absent, f"{reason}: rank {absent[0]} does not come to collective {max(reached)}")
        meeting = bool(self._round) and all(progress.meeting for progress in self._round)
        return Stall(
            tuple(range(len(self._round))), f"{reason}: all are in collective {reached[0]}" if meeting else reason
        )


def _came_further(before: Progress, after: Progress) -> bool:
    return (before.submitted, before.done, before.collectives) != (after.submitted, after.done, after.collectives)


def _works(before: Progress, after: Progress, between_s: float) -> bool:
    """Whether a rank's thread did anything between two answers, or waits for nobody but its core or the driver."""
    return (
        _came_further(before, after)
        or after.runs
        or after.awaits_driver
        or after.thread_s - before.thread_s > 0.01 * between_s
    )
