"""When to call a step stuck, and how often to bring an engine back."""

from __future__ import annotations

import time
from collections import deque

import msgspec


class StepClock:
    """Learns how long steps take, by their size, so that a deadline follows what was measured.

    Sizes fall into powers of two of tokens. A size never seen is judged by the largest smaller one, scaled up, and by
    `first_s` before anything was measured: the first steps compile kernels and touch fresh memory.
    """

    def __init__(self, *, first_s: float = 60.0, floor_s: float = 0.05) -> None:
        self.first_s, self.floor_s = first_s, floor_s
        self._slowest: dict[int, float] = {}

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Note one step. The slowest counts, and fades by a tenth with every quicker one."""
        size = num_tokens.bit_length()
        self._slowest[size] = max(seconds, self._slowest.get(size, 0.0) * 0.9)

    def expected_s(self, num_tokens: int) -> float:
        """An upper guess of one step's time."""
        size = num_tokens.bit_length()
        known = self._known(size)
        if size in self._slowest:
            return max(known, self.floor_s)
        # Attention makes a chunk's time grow faster than its tokens: 3 for every doubling above the measured size.
        nearest = max((seen for seen in self._slowest if seen < size), default=size)
        return max(known * 3.0 ** (size - nearest), self.first_s)

    def suspect_s(self, num_tokens: int) -> float:
        """After this long the ranks are asked whether they live; a frozen one does not answer."""
        return max(1.0, 5 * (self.floor_s + self._known(num_tokens.bit_length())))

    def stuck_s(self, num_tokens: int) -> float:
        """After this long a step counts as stuck even when every rank answers (hung in a collective)."""
        return max(10.0, 20 * self.expected_s(num_tokens))

    def _known(self, size: int) -> float:
        return max((seconds for seen, seconds in self._slowest.items() if seen <= size), default=0.0)


class RecoveryPolicy(msgspec.Struct, frozen=True):
    """How hard an engine tries to come back before it gives up."""

    max_attempts: int = 3
    """Restarts tried for one failure."""
    backoff_s: float = 0.5
    """Before the second attempt; doubled before each later one."""
    max_failures: int = 10
    """Failures survived within `window_s`; one more and the engine gives up."""
    window_s: float = 60.0
    max_recoveries: int = 3
    """A request that was in this many failed steps running, more than any other, is failed. At least 2."""


class RecoveryBudget:
    """Counts failures against a policy."""

    def __init__(self, policy: RecoveryPolicy) -> None:
        self.policy = policy
        self.total = 0
        self._recent: deque[float] = deque()

    def spend(self) -> bool:
        """Note a failure; False when there have been too many of late."""
        now = time.monotonic()
        self.total += 1
        self._recent.append(now)
        while self._recent and now - self._recent[0] > self.policy.window_s:
            self._recent.popleft()
        return len(self._recent) <= self.policy.max_failures


class Quarantine:
    """Finds a request that kills the ranks whenever it runs, and keeps it from taking the others along.

    A strike is a failure of the ranks in a step that a request was part of, with no token for it since the last one.
    From the second strike on, those who share a failure run one after the other: each must bring a token before the
    next one joins. Whoever then has `max_recoveries` strikes, and more than any other, is the culprit.
    """

    def __init__(self, max_recoveries: int) -> None:
        self._max_recoveries = max_recoveries
        self._strikes: dict[str, int] = {}
        self._parked: deque[str] = deque()
        self._probe: str | None = None

    def blame(self, suspects: set[str]) -> tuple[str | None, list[str]]:
        """Note a failure of a step that `suspects` were part of: the culprit, if it is known, and whom to park."""
        for request_id in suspects:
            self._strikes[request_id] = self._strikes.get(request_id, 0) + 1
        most = max((self._strikes[r] for r in suspects), default=0)
        guilty = [r for r in suspects if self._strikes[r] == most >= self._max_recoveries]
        if len(guilty) == 1:
            self._strikes.pop(guilty[0])
            return guilty[0], []
        doubtful = sorted(r for r in suspects if self._strikes[r] >= max(1, self._max_recoveries - 1))
        if len(doubtful) < 2:
            return None, []
        self._probe = doubtful[0]
        self._parked.extend(doubtful[1:])
        return None, doubtful[1:]

    def progressed(self, request_id: str) -> None:
        """It brought a token, or is over."""
        if self._strikes:
            self._strikes.pop(request_id, None)

    def release(self) -> str | None:
        """A parked request that may run now: the one before it has proven harmless."""
        if not self._parked or (self._probe is not None and self._probe in self._strikes):
            return None
        self._probe = self._parked.popleft()
        return self._probe
