"""Admission: how much may wait. What has its first token does not wait any more."""

from __future__ import annotations

import time
from collections import Counter, deque

from engine.errors import EngineOverloaded

MOST_RETRY_S = 60.0
_STARTS = 64
"""First tokens that the measured rate looks back on."""


class Admission:
    """Bounds what waits at one engine, in requests and in prompt tokens.

    Past a bound a tenant still gets in while it has less waiting than an equal share of that bound among those who
    wait, so that one tenant's flood does not close the door to another; at twice the bound nobody does.
    """

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self._limits = (max_requests, max_tokens)
        self._waiting: dict[str, tuple[str, int]] = {}
        """Tenant and prompt tokens of each request."""
        self._requests: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._num_tokens = 0
        self._starts_s: deque[float] = deque(maxlen=_STARTS)

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def num_tokens(self) -> int:
        """Prompt tokens of all that waits."""
        return self._num_tokens

    def check(self, tenant: str, num_tokens: int = 0) -> None:
        """Raise EngineOverloaded when one more request of that many prompt tokens may not wait now."""
        if not self._waiting:
            return
        held = (len(self._waiting), self._num_tokens)
        mine = (self._requests[tenant], self._tokens[tenant])
        sharing = len(self._requests) + (tenant not in self._requests)
        for what, limit, all_, own, more in zip(("requests", "tokens"), self._limits, held, mine, (1, num_tokens)):
            if all_ + more > limit and (own + more > limit / sharing or all_ + more > 2 * limit):
                raise EngineOverloaded(
                    f"{len(self._waiting)} requests with {self._num_tokens} prompt tokens wait already; "
                    f"at most {limit} {what} may",
                    retry_after_s=self.retry_after_s(),
                )

    def add(self, request_id: str, tenant: str, num_tokens: int) -> None:
        """A request waits from now on."""
        self._waiting[request_id] = (tenant, num_tokens)
        self._requests[tenant] += 1
        self._tokens[tenant] += num_tokens
        self._num_tokens += num_tokens

    def started(self, request_id: str) -> None:
        """A request has its first token."""
        if request_id in self._waiting:
            self._starts_s.append(time.monotonic())
            self.discard(request_id)

    def discard(self, request_id: str) -> None:
        """A request does not wait any more. Ignores those that do not."""
        tenant, num_tokens = self._waiting.pop(request_id, (None, 0))
        if tenant is None:
            return
        self._num_tokens -= num_tokens
        self._tokens[tenant] -= num_tokens
        self._requests[tenant] -= 1
        if not self._requests[tenant]:
            del self._requests[tenant], self._tokens[tenant]

    def retry_after_s(self) -> float:
        """The time in which half of what waits will have begun, at the rate measured of late; 1 to 60 s."""
        if len(self._starts_s) < 2:
            return 1.0
        rate = (len(self._starts_s) - 1) / max(1e-3, time.monotonic() - self._starts_s[0])
        return min(MOST_RETRY_S, max(1.0, len(self._waiting) / 2 / rate))
