"""Pacer: when the engine's loop plans the next step, so that requests that come in the meantime are part of it.

A plan that is made early shuts out whoever comes until it is carried out. So an idle engine that gets a request looks
for a moment whether it is the first of a burst, and while a step runs the next one is planned shortly before its end,
not at its beginning. Late enough to take in who comes; early enough that the device never waits for a plan.
"""

from __future__ import annotations

import os
from collections import deque

from engine.config import EngineConfig
from engine.draft import ScheduledStep
from engine.step import StepResult

GATHER_S = 0.0005
"""An idle engine waits so long after the last request for another: twice after two, and so on up to GATHER_TIMES. One
that comes alone loses no more than this; nothing, if it comes within AGAIN_S of the end of another one that was."""
AGAIN_S = 0.02
GATHER_TIMES = 4
GATHER_LIMIT_S = 0.03
"""Nobody waits longer for others than this."""
LEAD_S = 0.003
"""A plan is begun so long before it is needed: it is made and sent, and every rank prepares its tensors. At first, and
LATE_S earlier from then on whenever that was too late; at most MOST_LEAD_S, and IN_TIME_S later whenever it was not."""
LATE_S = 0.0005
IN_TIME_S = 0.000005
LEAST_LEAD_S, MOST_LEAD_S = 0.002, 0.02
LEAST_SAVED_S = 0.001
"""A plan that could be put off by less than this is not."""
LIVELY_S = 2.0
"""Without a request for so long, none is expected."""
RECENT_S = 2.0
"""How long a step's time is believed: contexts grow, and other requests come."""
NUM_TIMES = 5


class StepTimes:
    """The least that recent steps took, by kind and size. A low guess: a plan that comes late leaves the device idle.

    A step of decodes alone takes as long as its rows make it, another as its tokens; sizes within an eighth or so of
    each other count as one. Of a size that was not seen, the next smaller one of its kind speaks.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[bool, int], deque[tuple[float, float]]] = {}
        """Of each kind and size when the last few ended, and what they took."""

    def observe(self, step: ScheduledStep, device_s: float, now_s: float) -> None:
        """Note one step, which has just ended."""
        self._seen.setdefault(_size(step), deque(maxlen=NUM_TIMES)).append((now_s, device_s))

    def least_s(self, step: ScheduledStep, now_s: float) -> float | None:
        """What the step takes at least; None when nothing recent says."""
        kind, size = _size(step)
        smaller = ((n, times) for (k, n), times in self._seen.items() if k is kind and n <= size)
        for _, times in sorted(smaller, key=lambda item: -item[0]):
            if recent := [took_s for ended_s, took_s in times if now_s - ended_s <= RECENT_S]:
                return min(recent)
        return None


def _size(step: ScheduledStep) -> tuple[bool, int]:
    """Whether it is of decodes alone, and its tokens, rounded down to four significant bits."""
    tokens = step.num_tokens
    shift = max(0, tokens.bit_length() - 4)
    return step.plan.num_decodes * 4 == len(step.plan.seq_ids), tokens >> shift << shift


class Pacer:
    """Says how long to wait before the next step is planned. It has no clock: `now_s` is whoever calls' monotonic one.

    `gathers`: an idle engine waits for the rest of a burst. `foresees`: the next step is planned towards the end of the
    one that runs. Both only put off a plan that can take in more requests: never past a step's tokens or seats.
    """

    def __init__(self, *, max_tokens: int, max_seqs: int, gathers: bool = True, foresees: bool = True) -> None:
        self._max_tokens, self._max_seqs = max_tokens, max_seqs
        self._gathers, self._foresees = gathers, foresees
        self._times = StepTimes()
        self._lead_s = LEAD_S
        self._last_s = self._ended_s = float("-inf")
        """When the last request came, and when the last step's result was read."""
        self._idle = False
        """Whether nothing is computed, and somebody waits."""
        self._num_served = 0
        """Requests since the engine was idle."""
        self.forget()

    @classmethod
    def of(cls, config: EngineConfig) -> Pacer:
        """An engine's. MANTA_PACING=0 in the environment: it never waits."""
        on = os.environ.get("MANTA_PACING", "1") != "0"
        # A CPU's ranks share their cores with who plans, and their steps take unequally long: on two cores, 8 clients
        # of the tiny model lost 3 to 10 % of their tokens a second.
        foresees = on and config.device == "cuda"
        max_seqs = min(config.max_num_seqs, config.max_num_batched_tokens)
        return cls(max_tokens=config.max_num_batched_tokens, max_seqs=max_seqs, gathers=on, foresees=foresees)

    def forget(self) -> None:
        """Nothing is in flight, and nobody is new: the ranks were restarted."""
        self._began_s: float | None = None
        """When the step that runs began; None: at some time."""
        self._put_off = False
        """Whether the next plan could have been made earlier, while a step ran; and those of the steps in flight."""
        self._put_off_in_flight: deque[bool] = deque()
        self._planned()

    def _planned(self) -> None:
        self._first_s = float("inf")
        self._num_new = self._seats = self._tokens = 0
        """Requests since the last plan, what they ask for, and when the first of them came."""

    def arrived(self, now_s: float, *, num_tokens: int, num_sequences: int) -> None:
        """A request came, with a prompt of `num_tokens`."""
        self._first_s, self._last_s = min(self._first_s, now_s), now_s
        self._num_new += 1
        self._num_served += 1
        self._seats += num_sequences
        self._tokens += num_tokens

    def began(self, now_s: float, *, in_flight: int) -> None:
        """A step was submitted; so many are in flight with it. Who came before is part of it, or had no room."""
        if in_flight == 1:
            self._began_s = now_s
        if self._idle:
            self._idle, self._num_served = False, self._num_new
        self._put_off_in_flight.append(self._put_off)
        self._put_off = False
        self._planned()

    def ended(self, step: ScheduledStep | None, result: StepResult, ended_s: float | None, now_s: float) -> None:
        """The oldest step's result was read; it came at `ended_s`, None: unknown. The next one began then."""
        self._began_s, self._ended_s = ended_s, now_s
        if step is not None and result.device_s > 0:
            self._times.observe(step, result.device_s, now_s)
        put_off = bool(self._put_off_in_flight) and self._put_off_in_flight.popleft()
        if put_off and step is not None and not step.plan.masked:  # masks always come when the step before has ended
            lead_s = self._lead_s + (LATE_S if result.late else -IN_TIME_S)
            self._lead_s = min(max(lead_s, LEAST_LEAD_S), MOST_LEAD_S)

    def wait_s(self, now_s: float, *, step: ScheduledStep | None, in_flight: int, running: int, waiting: int) -> float:
        """How long to wait before planning, 0: not at all. Ask again when anything happens.

        `step` is the one that runs, of `in_flight`; `running` sequences have seats, and others are `waiting`.
        """
        if not in_flight and not waiting:
            self._planned()  # who came has gone
        if not in_flight and not running:
            self._put_off, self._idle = False, waiting > 0
        if waiting > self._num_new or self._tokens + running >= self._max_tokens:
            return 0.0  # others that come would find no room either
        if running + max(waiting, self._seats) >= self._max_seqs:
            return 0.0
        if not in_flight:
            return self._gather_s(now_s) if self._gathers and waiting and not running else 0.0
        return self._foresee_s(step, now_s) if self._foresees and in_flight == 1 and step is not None else 0.0

    def _gather_s(self, now_s: float) -> float:
        if self._num_served - self._num_new == 1 and self._first_s - self._ended_s < AGAIN_S:
            return 0.0  # a client that asks again and again, alone
        quiet_s = GATHER_S * min(self._num_new, GATHER_TIMES)
        return max(0.0, min(self._last_s + quiet_s, self._first_s + GATHER_LIMIT_S) - now_s)

    def _foresee_s(self, step: ScheduledStep, now_s: float) -> float:
        if self._began_s is None or now_s - self._last_s > LIVELY_S:
            return 0.0
        least_s = self._times.least_s(step, now_s)
        if least_s is None or least_s < self._lead_s + LEAST_SAVED_S:
            return 0.0
        put_off_s = max(0.0, self._began_s + least_s - self._lead_s - now_s)
        self._put_off = self._put_off or put_off_s > 0
        return put_off_s
