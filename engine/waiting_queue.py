"""WaitingQueue: who waits. Tenants take turns, by what they were served; each tenant's own come in their order."""

from __future__ import annotations

import heapq

from engine.sequence import Key, Sequence, Status
from engine.shares import Shares

_FEW = 64

Order = tuple[int, float, int, int]
"""A key without its turn."""


class _Line:
    """What one tenant has waiting."""

    __slots__ = ("entry", "heap")

    def __init__(self) -> None:
        self.heap: list[tuple[Order, Sequence]] = []
        self.entry: Key | None = None
        """Its valid entry among the lines; others are out of date."""


class WaitingQueue:
    """Sequences whose status is WAITING. The head is the first by key of those at the head of their tenant's line.

    Its turn is that of its tenant, and stays what it was when it was taken. Leaving from the middle costs nothing until
    it adds up.
    """

    def __init__(self, shares: Shares | None = None) -> None:
        self._shares = shares or Shares()
        self._lines: dict[int, _Line] = {}
        self._order: list[tuple[Key, int]] = []
        """Lines by their heads' keys as they were last looked at: later they only grow, but for what `push` brings."""
        self._num_waiting = self._num_left = 0

    def __len__(self) -> int:
        return self._num_waiting

    def push(self, sequence: Sequence) -> None:
        """Let a sequence wait, in its tenant's line and in its order; its status becomes WAITING."""
        sequence.status = Status.WAITING
        slot = sequence.group.tenant
        line = self._lines.get(slot)
        if line is None or self._first(line) is None:
            line = self._lines[slot] = _Line()
            self._shares.lift(slot)
        priority, _, arrival_s, number, index = sequence.key
        heapq.heappush(line.heap, ((priority, arrival_s, number, index), sequence))
        self._num_waiting += 1
        self._enter(slot, line)

    def head(self) -> Sequence | None:
        """The first, which stays; its key has the turn it would be taken at."""
        while self._order:
            entry, slot = self._order[0]
            line = self._lines.get(slot)
            if line is None or line.entry != entry:
                heapq.heappop(self._order)
                continue
            sequence = self._first(line)
            if sequence is None:
                del self._lines[slot]
                continue
            key = self._key(sequence)
            if key == entry:
                sequence.key = key
                return sequence
            line.entry = key
            heapq.heapreplace(self._order, (key, slot))
        return None

    def pop(self) -> Sequence:
        """Take the head, which `head` has just given."""
        slot = self._order[0][1]
        line = self._lines[slot]
        sequence = heapq.heappop(line.heap)[1]
        self._num_waiting -= 1
        self._shares.let_in(sequence.key[1])
        if self._first(line) is None:
            del self._lines[slot]
        else:
            self._enter(slot, line)
        return sequence

    def left(self, sequence: Sequence) -> None:
        """Note that a sequence in the queue has another status now."""
        assert sequence.status is not Status.WAITING
        self._num_waiting -= 1
        self._num_left += 1
        if self._num_left > _FEW and self._num_left > self._num_waiting:
            self._sweep()

    @property
    def num_held(self) -> int:
        """Entries in memory: never many more than twice those that wait."""
        return self._num_waiting + self._num_left

    def _first(self, line: _Line) -> Sequence | None:
        while line.heap:
            sequence = line.heap[0][1]
            if sequence.status is Status.WAITING:
                return sequence
            heapq.heappop(line.heap)
            self._num_left -= 1
        return None

    def _sweep(self) -> None:
        """Drop the entries of those that left."""
        self._num_left = 0
        for slot, line in list(self._lines.items()):
            line.heap = [entry for entry in line.heap if entry[1].status is Status.WAITING]
            heapq.heapify(line.heap)
            if not line.heap:
                del self._lines[slot]
        self._sweep_order()

    def _sweep_order(self) -> None:
        self._order = [(line.entry, slot) for slot, line in self._lines.items() if line.entry is not None]
        heapq.heapify(self._order)

    def _enter(self, slot: int, line: _Line) -> None:
        """Let a line be found by its head's key, when that is earlier than what it is found by."""
        key = self._key(line.heap[0][1])
        if line.entry is None or key < line.entry:
            line.entry = key
            heapq.heappush(self._order, (key, slot))
            if len(self._order) > _FEW + 2 * len(self._lines):
                self._sweep_order()

    def _key(self, sequence: Sequence) -> Key:
        """Its key as it would be taken now."""
        priority, _, arrival_s, number, index = sequence.key
        return (priority, float(self._shares.served[sequence.group.tenant]), arrival_s, number, index)
