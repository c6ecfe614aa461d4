"""RunningSet: the sequences that hold a seat and blocks. Decodes, prompts under way, and beams that have drawn."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator

from engine.claims import key_of
from engine.draft import Decodes
from engine.sequence import Sequence, SequenceTable, Status


class RunningSet:
    """Who runs. A decode that runs no more stays among the decodes until `settle`."""

    def __init__(self, table: SequenceTable) -> None:
        self._table = table
        self.clear()

    def clear(self) -> None:
        """Forget all; their statuses are somebody else's to change."""
        self.prefills: list[Sequence] = []
        """Prompt not yet computed, by key."""
        self._paused: list[Sequence] = []
        """Beams that have drawn and wait for the others of their request."""
        self.set_decodes([])

    def set_decodes(self, sequences: list[Sequence]) -> None:
        """Let these be the decodes; all of them run."""
        self.decodes = Decodes(sequences, self._table)
        self._num_left = 0

    def __len__(self) -> int:
        """Seats taken."""
        return len(self.decodes) - self._num_left + len(self.prefills) + len(self._paused)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.running_decodes()
        yield from self.prefills
        yield from self._paused

    def running_decodes(self) -> list[Sequence]:
        """The decodes that still run."""
        return [sequence for sequence in self.decodes.sequences if sequence.status is Status.RUNNING]

    def last(self) -> Sequence:
        """The last-come of all."""
        return max(self, key=key_of)

    def admit(self, sequence: Sequence) -> None:
        """Give a waiting sequence a seat; its prompt is to be computed."""
        sequence.status = Status.RUNNING
        insort(self.prefills, sequence, key=key_of)

    def pause(self, sequence: Sequence) -> None:
        """Let a decode, a beam that has drawn, keep its seat and wait. The caller takes it out of the decodes."""
        sequence.status = Status.PAUSED
        self._paused.append(sequence)

    def stuck(self) -> Sequence | None:
        """The last-come of the paused beams, when no draw in flight will let any of them go on."""
        if not self._paused or any(sequence.num_in_flight for sequence in self._paused):
            return None
        return max(self._paused, key=key_of)

    def leave(self, sequence: Sequence) -> None:
        """Take the seat of one whose status has yet to change."""
        if sequence.status is Status.PAUSED:
            self._paused.remove(sequence)
        elif sequence in self.prefills:
            self.prefills.remove(sequence)
        else:
            self._num_left += 1

    def settle(self) -> None:
        """Take those that run no more out of the decodes, before any of them can come back."""
        if self._num_left:
            self.set_decodes(self.running_decodes())
