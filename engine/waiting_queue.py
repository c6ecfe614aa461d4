"""WaitingQueue: who waits, the first by key at its head."""

from __future__ import annotations

import heapq

from engine.sequence import Key, Sequence, Status

_FEW = 64


class WaitingQueue:
    """Sequences whose status is WAITING, ordered by key. Leaving from the middle costs nothing until it adds up."""

    def __init__(self) -> None:
        self._heap: list[tuple[Key, Sequence]] = []
        self._num_left = 0
        """Entries that wait no more."""

    def __len__(self) -> int:
        return len(self._heap) - self._num_left

    def push(self, sequence: Sequence) -> None:
        sequence.status = Status.WAITING
        heapq.heappush(self._heap, (sequence.key, sequence))

    def head(self) -> Sequence | None:
        """The first, which stays."""
        while self._heap:
            sequence = self._heap[0][1]
            if sequence.status is Status.WAITING:
                return sequence
            heapq.heappop(self._heap)
            self._num_left -= 1
        return None

    def pop(self) -> Sequence:
        """Take the head, which `head` has just given."""
        return heapq.heappop(self._heap)[1]

    def left(self, sequence: Sequence) -> None:
        """Note that a sequence in the queue has another status now."""
        assert sequence.status is not Status.WAITING
        self._num_left += 1
        if self._num_left > _FEW and self._num_left > len(self._heap) // 2:
            self._heap = [entry for entry in self._heap if entry[1].status is Status.WAITING]
            heapq.heapify(self._heap)
            self._num_left = 0

    @property
    def num_held(self) -> int:
        """Entries in memory: never many more than twice those that wait."""
        return len(self._heap)
