"""Shares: what each tenant was served, so that one tenant's flood does not make another wait.

A tenant's turn is the tokens it was served; of all that wait, the tenant of the earliest turn is next. A tenant that
comes to wait is not behind the turn of the last one let in: time in which it asked for nothing earns it nothing.
Source: start-time fair queuing (Goyal, Vin, Cheng 1996), by counters as in VTC (Sheng et al. 2024).
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt

_MOST_IDLE = 1024


class Shares:
    """Counters by tenant. A tenant is a slot in them while it has requests, and for some time after."""

    def __init__(self) -> None:
        self.served = np.zeros(8, np.float64)
        """Tokens computed or drawn, by slot."""
        self._now = 0.0
        """The latest turn that was let in."""
        self._slots: dict[str, int] = {"": 0}
        self._free = list(range(len(self.served) - 1, 0, -1))
        self._requests: Counter[str] = Counter()

    @property
    def num_active(self) -> int:
        """Tenants with unfinished requests."""
        return len(self._requests)

    def enter(self, name: str) -> int:
        """A request of a tenant begins; the tenant's slot."""
        slot = self._slots.get(name)
        if slot is None:
            if not self._free:
                size = len(self.served)
                self.served = np.concatenate((self.served, np.zeros(size)))
                self._free.extend(range(2 * size - 1, size - 1, -1))
            slot = self._slots[name] = self._free.pop()
            self.served[slot] = self._now
        self._requests[name] += 1
        return slot

    def leave(self, name: str) -> None:
        """A request of a tenant is over."""
        self._requests[name] -= 1
        if not self._requests[name]:
            del self._requests[name]
            if len(self._slots) - len(self._requests) > _MOST_IDLE:
                self._forget_idle()

    def lift(self, slot: int) -> None:
        """A tenant that had nothing waiting has now."""
        self.served[slot] = max(self.served[slot], self._now)

    def let_in(self, turn: float) -> None:
        """Somebody of this turn was let in."""
        self._now = max(self._now, turn)

    def charge(self, slot: int, num_tokens: int) -> None:
        """Note a prompt's tokens that are computed for a tenant."""
        self.served[slot] += num_tokens

    def charge_each(self, slots: npt.NDArray[np.int32]) -> None:
        """Note one drawn token for each of `slots`."""
        self.served += np.bincount(slots, minlength=len(self.served))

    def _forget_idle(self) -> None:
        """Forget half of the tenants without requests, those who were served least."""
        idle = sorted(
            (n for n in self._slots if n and n not in self._requests), key=lambda n: self.served[self._slots[n]]
        )
        for name in idle[: len(idle) // 2]:
            self._free.append(self._slots.pop(name))
