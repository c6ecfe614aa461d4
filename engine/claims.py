"""Claims: who gives way to a tenant that holds less than its share of the seats and of the blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from engine.sequence import Key, Sequence


@dataclass(frozen=True, slots=True)
class Claim:
    """What the head of the queue wants to be let in."""

    head: Sequence
    size: int
    """Blocks that it would hold, shared ones among them: it must not be over its share itself once it is in."""
    missing: int
    """Blocks that it takes to start it and that are not free; may be negative."""
    seatless: bool
    """No seat is free either."""

    def victims(self, running: Iterable[Sequence], *, seat_share: int, block_share: int) -> list[Sequence]:
        """Running sequences of tenants over their share whose going lets the head in, the last-come first.

        None when the head's tenant has its share already, or when nobody's going is enough.
        """
        candidates = sorted(running, key=key_of, reverse=True)
        seats: Counter[int] = Counter()
        held: Counter[int] = Counter()
        for sequence in candidates:
            seats[sequence.group.tenant] += 1
            held[sequence.group.tenant] += len(sequence.block_table)
        tenant = self.head.group.tenant
        if seats[tenant] >= seat_share or held[tenant] + self.size > block_share:
            return []
        chosen: list[Sequence] = []
        seatless, missing = self.seatless, self.missing
        for victim in candidates:
            owner, size = victim.group.tenant, len(victim.block_table)
            if not seatless and missing <= 0:
                break
            over = (seatless and seats[owner] > seat_share) or (missing > 0 and held[owner] > block_share)
            if over and victim.key[0] >= self.head.key[0]:
                seatless, missing = False, missing - size
                seats[owner] -= 1
                held[owner] -= size
                chosen.append(victim)
        return [] if seatless or missing > 0 else chosen  # they would go for nothing


def key_of(sequence: Sequence) -> Key:
    """What running sequences are ordered by."""
    return sequence.key
