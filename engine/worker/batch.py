"""Batch: a rank's mirror of the live sequences, one slot each, changed by the deltas of the plans.

Slots are rows of fixed arrays. Lengths and block tables are known on the host; token ids live on the device, because a
drawn token is an input of the next step before the host has read it. On a CPU the two are one memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.errors import ExecutorDied
from engine.step import NewSequence, StepPlan, unpack
from engine.worker.transfers import Numbers, upload
from kernels.decode_inputs import set_blocks

Int64Array = npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]


@dataclass
class Entries:
    """The S scheduled sequences of a plan, on the host."""

    slots: Int64Array
    """[S]."""
    counts: Int64Array
    """[S]: tokens computed of each."""
    starts: Int64Array
    """[S]: position of each one's first token."""
    offsets: Int64Array
    """[S + 1]: where each one's tokens start among the step's T."""
    num_decodes: int

    @property
    def num_tokens(self) -> int:
        return int(self.offsets[-1])

    def last_rows(self, indices: Int32Array) -> Int64Array:
        """Where in the step's T tokens the last one of each of these entries is."""
        return self.offsets[1:][indices] - 1

    def are_all(self, rows: Int64Array) -> bool:
        """Whether `rows` are the step's T tokens, in their order."""
        return len(rows) == self.num_tokens and np.array_equal(rows, np.arange(len(rows)))


class Batch:
    """The mirror: for each slot its tokens, how many there are and are computed, and its block table."""

    def __init__(self, max_seqs: int, max_model_len: int, block_size: int, device: torch.device) -> None:
        self.block_size, self.device = block_size, device
        self.width = max_model_len + 1
        max_blocks = -(-self.width // block_size)
        self.num_tokens: Int64Array = np.zeros(max_seqs, np.int64)
        self.num_prompt: Int64Array = np.zeros(max_seqs, np.int64)
        self.num_computed: Int64Array = np.zeros(max_seqs, np.int64)
        self.num_blocks: Int64Array = np.zeros(max_seqs, np.int64)
        self._host_tables: Int32Array = np.zeros((max_seqs, max_blocks), np.int32)
        if device.type == "cpu":
            self.block_tables = torch.from_numpy(self._host_tables)
            self.tokens = torch.from_numpy(np.zeros((max_seqs, self.width), np.int64))
        else:
            self.block_tables = torch.zeros((max_seqs, max_blocks), dtype=torch.int32, device=device)
            self.tokens = torch.zeros((max_seqs, self.width), dtype=torch.int64, device=device)
        self._flat_tokens = self.tokens.view(-1)
        self._slot_of: dict[int, int] = {}
        self._free = list(range(max_seqs - 1, -1, -1))
        self._seen_ids: bytes | None = None
        self._seen_slots: Int64Array = np.zeros(0, np.int64)

    def clear(self) -> None:
        """Forget every sequence."""
        self._free.extend(self._slot_of.values())
        self._slot_of.clear()
        self._seen_ids = None

    def drop(self, plan: StepPlan) -> list[int]:
        """Forget the plan's dropped sequences; their slots."""
        slots = [self._slot(seq_id, remove=True) for seq_id in unpack(plan.dropped).tolist()]
        self._free.extend(slots)
        return slots

    def add(self, new: NewSequence) -> int:
        """Take in a sequence sent whole; its slot."""
        if new.seq_id in self._slot_of:
            raise ExecutorDied(f"sequence {new.seq_id} was sent whole, but is here already")
        if not self._free:
            raise ExecutorDied(f"more than {len(self.num_tokens)} live sequences")
        slot = self._slot_of[new.seq_id] = self._free.pop()
        tokens, table = unpack(new.token_ids), unpack(new.block_table)
        assert 0 <= new.num_computed <= len(tokens) <= self.width
        assert 0 <= new.num_prompt_tokens <= len(tokens)
        self.num_tokens[slot] = len(tokens)
        self.num_prompt[slot] = new.num_prompt_tokens
        self.num_computed[slot] = new.num_computed
        self.num_blocks[slot] = len(table)
        self.tokens[slot, : len(tokens)] = self._to_device(tokens.astype(np.int64))
        self._set_blocks(np.full(len(table), slot, np.int64), np.arange(len(table)), table)
        return slot

    def grow_tables(self, plan: StepPlan, entries: Entries) -> None:
        """Replace the plan's copied-on-write blocks and append its new ones."""
        if plan.replaced:
            triples = unpack(plan.replaced).reshape(-1, 3)
            slots = np.array([self._slot(seq_id) for seq_id in triples[:, 0].tolist()], np.int64)
            self._set_blocks(slots, triples[:, 1].astype(np.int64), triples[:, 2])
        if not plan.block_ids:
            return
        appended = unpack(plan.block_counts).astype(np.int64)
        slots = np.repeat(entries.slots, appended)
        first = np.repeat(self.num_blocks[entries.slots] - (np.cumsum(appended) - appended), appended)
        self._set_blocks(slots, first + np.arange(len(slots)), unpack(plan.block_ids))
        self.num_blocks[entries.slots] += appended

    def entries(self, plan: StepPlan) -> Entries:
        """The plan's scheduled sequences."""
        slots = self._slots(plan.seq_ids)
        counts = unpack(plan.num_tokens).astype(np.int64)
        offsets = np.zeros(len(slots) + 1, np.int64)
        np.cumsum(counts, out=offsets[1:])
        return Entries(slots, counts, self.num_computed[slots], offsets, plan.num_decodes)

    def places(self, entries: Entries) -> tuple[Int64Array, Int64Array, Int64Array]:
        """Of the step's T tokens, on the host: where in the flat token ids they are, positions and cache slots, [T]."""
        rows, positions = entries.slots, entries.starts
        if entries.num_tokens != len(rows) or entries.num_decodes != len(rows):
            rows = np.repeat(rows, entries.counts)
            positions = np.arange(entries.num_tokens) + np.repeat(positions - entries.offsets[:-1], entries.counts)
        blocks = self._host_tables[rows, positions // self.block_size]
        slots = blocks.astype(np.int64) * self.block_size + positions % self.block_size
        return rows * self.width + positions, positions, slots

    def inputs(self, entries: Entries) -> tuple[Tensor, Tensor, Tensor]:
        """Of the step's T tokens: their ids, positions and cache slots, [T] int64 each, on the device."""
        count = entries.num_tokens
        # Rows begin at multiples of 16 bytes: kernels are compiled anew for others.
        packed = np.zeros((3, -(-count // 2) * 2), np.int64)
        packed[:, :count] = self.places(entries)
        where, positions, slots = self._to_device(packed)[:, :count]
        return self._flat_tokens[where], positions, slots

    def tables(self, entries: Entries, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Block tables [n, M] int32 and context lengths [n] int32 of entries [first, last), this step included.

        M is at least as wide as the longest of them needs.
        """
        slots = entries.slots[first:last]
        lens = entries.starts[first:last] + entries.counts[first:last]
        if self.device.type == "cpu":
            used = -(-int(lens.max()) // self.block_size)
            tables = torch.from_numpy(self._host_tables[slots, :used])
        else:
            tables = self.block_tables[self._to_device(slots)]
        return tables, self._to_device(lens.astype(np.int32))

    def computed(self, entries: Entries) -> None:
        """Count the step's tokens as computed."""
        self.num_computed[entries.slots] += entries.counts

    def sampled_slots(self, plan: StepPlan) -> Int64Array:
        """Slots [R] of the sequences that draw a token."""
        return self._slots(plan.sample_seqs)

    def append(self, slots: Int64Array, token_ids: Tensor) -> None:
        """Append a drawn token, [R] int64 on the device, to each of `slots`; it is not read."""
        where = self._to_device(slots * self.width + self.num_tokens[slots])
        self._flat_tokens[where] = token_ids
        self.num_tokens[slots] += 1

    def _slots(self, seq_ids: bytes) -> Int64Array:
        """Slots of packed sequence ids; a steady step asks for the same ones again."""
        if seq_ids != self._seen_ids:
            try:
                slots = [self._slot_of[seq_id] for seq_id in unpack(seq_ids).tolist()]
            except KeyError as error:
                raise ExecutorDied(f"sequence {error.args[0]} is scheduled, but was never sent") from None
            self._seen_ids, self._seen_slots = seq_ids, np.array(slots, np.int64)
        return self._seen_slots

    def _slot(self, seq_id: int, *, remove: bool = False) -> int:
        try:
            if not remove:
                return self._slot_of[seq_id]
            self._seen_ids = None
            return self._slot_of.pop(seq_id)
        except KeyError:
            raise ExecutorDied(f"sequence {seq_id} is named, but was never sent") from None

    def _set_blocks(self, slots: Int64Array, columns: Int64Array, blocks: Int32Array) -> None:
        self._host_tables[slots, columns] = blocks
        if self.device.type != "cpu" and len(slots):
            changes = np.full((3, -(-len(slots) // 16) * 16), -1, np.int32)
            changes[:, : len(slots)] = slots, columns, blocks
            set_blocks(self.block_tables, self._to_device(changes))

    def _to_device(self, array: Numbers) -> Tensor:
        return upload(array, self.device)
