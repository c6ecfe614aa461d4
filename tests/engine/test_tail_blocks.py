"""TailBlocks: who needs a block to write to, and whose is copied."""

from __future__ import annotations

from engine.block_manager import BlockManager
from engine.draft import Decodes, Draft
from engine.request import Request
from engine.sampling_params import SamplingParams
from engine.sequence import Group, Sequence, SequenceTable
from engine.tail_blocks import TailBlocks

BLOCK_SIZE = 4


class Bench:
    def __init__(self, num_tokens: int, *, forks: int = 0) -> None:
        """A decode of so many computed tokens and one drawn, and its forks."""
        self.table, self.blocks = SequenceTable(), BlockManager(8, BLOCK_SIZE)
        self.tails = TailBlocks(self.blocks, self.table)
        group = Group(Request.create("r", list(range(num_tokens)), SamplingParams(seed=1)), 0.0)
        self.sequences = [
            Sequence(group, i, i, (0, 0.0, 0.0, 0, i), 20, self.table)  #
            for i in range(forks + 1)
        ]
        parent, *children = self.sequences
        self.blocks.allocate(parent, self.blocks.blocks_for(num_tokens))
        for child in children:
            self.blocks.fork(parent, child)
        for sequence in self.sequences:
            self.table.num_computed[sequence.row] = num_tokens
            self.table.length[sequence.row] = num_tokens + 1
            self.table.num_slots[sequence.row] = len(parent.block_table) * BLOCK_SIZE
            self.table.tail_shared[sequence.row] = bool(forks) and num_tokens % BLOCK_SIZE != 0
        self.decodes = Decodes(self.sequences, self.table)

    def grow(self) -> tuple[int, list[int], Draft]:
        draft, short = Draft(), self.tails.short(self.decodes)
        needed, free = self.tails.num_needed(self.decodes, short), self.blocks.num_free
        appended = self.tails.grow(draft, self.decodes, short)
        assert free - self.blocks.num_free == needed
        self.blocks.check(self.sequences)
        return needed, appended, draft


def test_there_is_a_slot_left() -> None:
    assert Bench(6).grow()[:2] == (0, [])


def test_full_blocks_are_followed_by_new_ones_shared_or_not() -> None:
    bench = Bench(8, forks=2)
    needed, appended, draft = bench.grow()
    assert needed == 3 and not draft.copies
    assert [sequence.block_table[-1] for sequence in bench.sequences] == appended
    assert (bench.table.num_slots[bench.decodes.rows] == 12).all()


def test_all_but_the_last_writer_of_a_shared_block_get_a_copy() -> None:
    bench = Bench(6, forks=2)
    shared = bench.sequences[0].block_table[1]
    needed, appended, draft = bench.grow()
    assert (needed, appended) == (2, [])
    own = [sequence.block_table[1] for sequence in bench.sequences]
    assert len(set(own)) == 3 and own[2] == shared
    assert draft.copies == [shared, own[0], shared, own[1]]
    assert draft.replaced == [0, 1, own[0], 1, 1, own[1]]
    assert bench.grow()[2].copies == []  # they are their own now


def test_a_block_that_somebody_else_only_reads_is_copied_for_every_writer() -> None:
    bench = Bench(6, forks=1)
    reader = bench.sequences.pop()
    bench.decodes = Decodes(bench.sequences, bench.table)
    draft, short = Draft(), bench.tails.short(bench.decodes)
    assert bench.tails.num_needed(bench.decodes, short) == 1
    bench.tails.grow(draft, bench.decodes, short)
    assert bench.sequences[0].block_table[1] != reader.block_table[1]
    bench.blocks.check([*bench.sequences, reader])
