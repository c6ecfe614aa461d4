"""Draft: a StepPlan in the making. Decodes: the running decodes, and what every plan says of them."""

from __future__ import annotations

from array import array

import numpy as np
import numpy.typing as npt

from engine.sequence import Sequence, SequenceTable
from engine.step import Int32Array, NewSequence, StepPlan

RowArray = npt.NDArray[np.intp]
Mask = npt.NDArray[np.bool_]


class Decodes:
    """The running sequences that compute one token a step, with their arrays.

    Never changed, but made anew when one comes or goes: a steady step finds everything made, and steps in flight can
    hold on to it.
    """

    __slots__ = ("packed_ids", "packed_ones", "packed_range", "packed_zeros", "rows", "seq_ids", "sequences")

    def __init__(self, sequences: list[Sequence], table: SequenceTable) -> None:
        count = len(sequences)
        self.sequences = sequences
        self.rows: RowArray = np.fromiter([s.row for s in sequences], np.intp, count)
        self.seq_ids: Int32Array = table.seq_id[self.rows]
        self.packed_ids = self.seq_ids.astype("<i4", copy=False).tobytes()
        self.packed_ones = np.ones(count, "<i4").tobytes()
        self.packed_zeros = bytes(4 * count)
        self.packed_range = np.arange(count, dtype="<i4").tobytes()

    def __len__(self) -> int:
        return len(self.sequences)


class ScheduledStep:
    """A plan, and who draws its tokens: what is needed to make sense of its result.

    `rows` and `seq_ids` are those of `samples` when it was scheduled: a row that holds another id now belongs to
    somebody else.
    """

    __slots__ = ("num_tokens", "plan", "rows", "samples", "seq_ids")

    def __init__(self, plan: StepPlan, samples: list[Sequence], rows: RowArray, seq_ids: Int32Array, num_tokens: int):
        self.plan, self.samples, self.rows, self.seq_ids, self.num_tokens = plan, samples, rows, seq_ids, num_tokens


class Draft:
    """What the next step holds so far."""

    __slots__ = (
        "appended",
        "births",
        "chunks",
        "copies",
        "decodes",
        "new",
        "num_blank",
        "num_tokens",
        "prefills",
        "replaced",
        "short",
        "tables",
    )

    def __init__(self) -> None:
        self.decodes: Decodes | None = None
        self.short: Mask | None = None
        """Of the decodes: who gets a block."""
        self.appended: list[int] = []
        """These blocks, in the order of the decodes."""
        self.prefills: list[Sequence] = []
        self.chunks: list[int] = []
        """Tokens computed of each of `prefills`."""
        self.tables: list[list[int]] = []
        """Blocks appended for each of `prefills`."""
        self.births: list[tuple[Sequence, int]] = []
        """Forked children, each with the index in `prefills` of its parent."""
        self.new: list[NewSequence] = []
        self.copies: list[int] = []
        self.replaced: list[int] = []
        self.num_tokens = 0
        self.num_blank = 0
        """Free blocks that this step's children will need to write."""

    def add_decodes(self, decodes: Decodes, short: Mask, appended: list[int]) -> None:
        """Put the decodes in; they are the first of the step."""
        assert not self.num_tokens
        self.decodes, self.short, self.appended = decodes, short, appended
        self.num_tokens = len(decodes)

    def add_prefill(self, sequence: Sequence, num_tokens: int, blocks: list[int]) -> int:
        """Put a chunk of a prompt in; its index."""
        self.prefills.append(sequence)
        self.chunks.append(num_tokens)
        self.tables.append(blocks)
        self.num_tokens += num_tokens
        return len(self.prefills) - 1

    @property
    def bears_last(self) -> bool:
        """Whether children are forked from the last prompt, which ends in this step then."""
        return bool(self.births) and self.births[-1][1] == len(self.prefills) - 1

    def shorten_last(self, num_tokens: int, num_blocks: int) -> None:
        """Leave so many of the last prompt's tokens, and blocks for them, for later; it draws nothing yet."""
        assert 0 < num_tokens < self.chunks[-1] and not self.bears_last
        self.tables[-1] = self.tables[-1][: len(self.tables[-1]) - num_blocks]
        self.chunks[-1] -= num_tokens
        self.num_tokens -= num_tokens

    def build(self, epoch: int, step: int, dropped: list[int], table: SequenceTable) -> ScheduledStep:
        """It as a plan, before any of it counts as computed."""
        plan = StepPlan(epoch, step, new=self.new)
        if dropped:
            plan.dropped = array("i", dropped).tobytes()
        if self.copies:
            plan.copies = array("i", self.copies).tobytes()
            plan.replaced = array("i", self.replaced).tobytes()
        decodes = self.decodes or Decodes([], table)
        samples, rows, seq_ids = decodes.sequences, decodes.rows, decodes.seq_ids
        plan.num_decodes = len(decodes)
        plan.seq_ids = plan.sample_seqs = decodes.packed_ids
        plan.num_tokens, plan.sample_entries = decodes.packed_ones, decodes.packed_range
        plan.block_counts = decodes.packed_zeros
        if self.appended and self.short is not None:
            plan.block_counts = self.short.astype("<i4").tobytes()
            plan.block_ids = array("i", self.appended).tobytes()
        if self.prefills:
            plan.seq_ids += array("i", [s.seq_id for s in self.prefills]).tobytes()
            plan.num_tokens += array("i", self.chunks).tobytes()
            plan.block_counts += array("i", map(len, self.tables)).tobytes()
            plan.block_ids += array("i", [block for blocks in self.tables for block in blocks]).tobytes()
            late = [(s, i) for i, s in enumerate(self.prefills) if s.num_computed + self.chunks[i] == s.num_tokens]
            late += self.births
            if late:
                samples = samples + [sequence for sequence, _ in late]
                late_rows = np.array([sequence.row for sequence, _ in late], np.intp)
                rows, seq_ids = np.concatenate([rows, late_rows]), np.concatenate([seq_ids, table.seq_id[late_rows]])
                plan.sample_seqs = seq_ids.astype("<i4", copy=False).tobytes()
                plan.sample_entries += array("i", [len(decodes) + entry for _, entry in late]).tobytes()
        return ScheduledStep(plan, samples, rows, seq_ids, self.num_tokens)
