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
        guess = 0.0
        for seen, seconds in self._slowest.items():
            # Attention makes a chunk's time grow faster than its tokens: 3 for every doubling, above the measured size.
            guess = max(guess, seconds * 3.0 ** max(0, size - seen))
        return max(guess, self.floor_s) if size in self._slowest else max(guess, self.first_s)

    def suspect_s(self, num_tokens: int) -> float:
        """After this long the ranks are asked whether they live; a frozen one does not answer."""
        return max(1.0, 5 * min(self.expected_s(num_tokens), self.floor_s + self._known(num_tokens)))

    def stuck_s(self, num_tokens: int) -> float:
        """After this long a step counts as stuck even when every rank answers (hung in a collective)."""
        return max(10.0, 20 * self.expected_s(num_tokens))

    def _known(self, num_tokens: int) -> float:
        size = num_tokens.bit_length()
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
