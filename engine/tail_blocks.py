"""TailBlocks: the block that each decode writes its next token to: a new one, its last, or a copy of a shared one."""

from __future__ import annotations

from collections import Counter

import numpy as np

from engine.block_manager import BlockManager
from engine.draft import Decodes, Draft, Mask
from engine.sequence import Sequence, SequenceTable


class TailBlocks:
    """Finds what a step's decodes need of the free blocks, and gives it to them."""

    def __init__(self, blocks: BlockManager, table: SequenceTable) -> None:
        self._blocks, self._table = blocks, table
        self._owned: Decodes | None = None
        """Decodes whose tails are all their own: forks are among the decodes only after these were made anew."""

    def short(self, decodes: Decodes) -> Mask:
        """Which of them have no slot for their token."""
        table, rows = self._table, decodes.rows
        return table.length[rows] > table.num_slots[rows]

    def num_needed(self, decodes: Decodes, short: Mask) -> int:
        """Free blocks that it takes to `grow`."""
        return int(np.count_nonzero(short)) + self._num_copies(decodes, short)

    def grow(self, draft: Draft, decodes: Decodes, short: Mask) -> list[int]:
        """Give every decode a block of its own to write to; the blocks appended."""
        blocks, rows = self._blocks, decodes.rows
        for sequence in self._shared_writers(decodes, short):
            tail = self._tail(sequence)
            copy = blocks.copy_on_write(sequence, tail)
            if copy is not None:
                draft.copies += copy
                draft.replaced += (sequence.seq_id, tail, copy[1])
        if self._owned is not decodes:
            self._table.tail_shared[rows] = False
            self._owned = decodes
        growing = np.flatnonzero(short)
        if not growing.size:
            return []
        self._table.num_slots[rows[growing]] += blocks.block_size
        return [blocks.allocate(decodes.sequences[index])[0] for index in growing.tolist()]

    def _num_copies(self, decodes: Decodes, short: Mask) -> int:
        """Blocks for copies. Of those that all hold one block and all write, the last needs none."""
        writers = Counter(s.block_table[self._tail(s)] for s in self._shared_writers(decodes, short))
        return sum(count - (self._blocks.num_owners(block) == count) for block, count in writers.items())

    def _shared_writers(self, decodes: Decodes, short: Mask) -> list[Sequence]:
        """Decodes that may write to a block that others hold too."""
        if self._owned is decodes:
            return []
        return [decodes.sequences[i] for i in np.flatnonzero(self._table.tail_shared[decodes.rows] & ~short).tolist()]

    def _tail(self, sequence: Sequence) -> int:
        """Index of the block that a decode writes to."""
        return int(self._table.length[sequence.row] - 1) // self._blocks.block_size
