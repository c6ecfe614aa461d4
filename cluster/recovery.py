"""How often to bring an engine back, and who is to blame."""

from __future__ import annotations

import time
from collections import deque

import msgspec

RETRY_AFTER_S = 5.0
"""When to ask again, told to those who are refused while resources are missing."""


class RecoveryPolicy(msgspec.Struct, frozen=True):
    """How hard an engine tries to come back before it gives up."""

    max_attempts: int = 3
    """Restarts tried for one failure."""
    backoff_s: float = 0.5
    """Before the second attempt; doubled before each later one."""
    max_failures: int = 10
    """Failures survived within `window_s`; one more and the engine gives up."""
    window_s: float = 60.0
    patience_s: float = 10.0
    """Once a restart has waited for resources for so long, requests without a token yet are failed: they can be asked
    again elsewhere. New ones are refused as soon as it waits."""
    max_recoveries: int = 4
    """A request that was in this many failed steps running, more than any other, is failed. At least 2."""
    first_step_s: float = 300.0
    """A step that must compile its kernels first may take this; for others the measured times say what is too long."""


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
