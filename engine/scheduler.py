"""Scheduler: which sequences compute which tokens in the next step. Queues and a BlockManager in, a StepPlan out.

Every step is scheduled anew: running decodes first, one token each, then chunks of prompts, then waiting sequences in
their order, as far as tokens, seats and blocks go. When blocks run out the last-come running sequence is preempted: it
gives back its blocks and waits, to be computed again from its tokens.

Blocks are given back the moment a plan no longer needs them, even while earlier plans that write to them are in
flight. That is safe because ranks run plans strictly in order: whoever gets the block writes later.

No deadlock: a sequence is accepted only if it fits into the whole cache alone, and the first-come running one may take
the blocks of all others. No starvation: seats never outnumber the tokens of a step, so that every running sequence
advances, and nobody overtakes the head of the queue.
"""

from __future__ import annotations

import heapq
from array import array
from collections import Counter
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from engine.block_manager import BlockManager
from engine.config import EngineConfig
from engine.sequence import Group, Key, Sequence, SequenceTable, Status
from engine.step import Int32Array, NewSequence, StepPlan

RowArray = npt.NDArray[np.intp]

_NO_ROWS: RowArray = np.zeros(0, np.intp)


class ScheduledStep:
    """A plan, and who draws its tokens: what is needed to make sense of its result."""

    __slots__ = ("num_tokens", "plan", "rows", "samples", "seq_ids")

    def __init__(self, plan: StepPlan, samples: list[Sequence], rows: RowArray, seq_ids: Int32Array, num_tokens: int):
        self.plan, self.samples, self.rows, self.seq_ids, self.num_tokens = plan, samples, rows, seq_ids, num_tokens


class _Draft:
    """A plan in the making, without its decodes."""

    __slots__ = ("births", "chunks", "copies", "new", "num_blank", "num_tokens", "replaced", "sequences", "tables")

    def __init__(self) -> None:
        self.sequences: list[Sequence] = []
        self.chunks: list[int] = []
        self.tables: list[list[int]] = []
        """Blocks appended for each of `sequences`."""
        self.births: list[tuple[Sequence, int]] = []
        """Forked children, each with the index in `sequences` of its parent."""
        self.new: list[NewSequence] = []
        self.copies: list[int] = []
        self.replaced: list[int] = []
        self.num_tokens = 0
        self.num_blank = 0
        """Free blocks that this step's children will need to write."""


class Scheduler:
    """Owns the queues, the running sequences and their blocks."""

    def __init__(self, config: EngineConfig, blocks: BlockManager) -> None:
        self.blocks = blocks
        self.table = SequenceTable()
        self.num_preemptions = 0
        self.prefix_query_tokens = 0
        self.prefix_hit_tokens = 0
        self._max_tokens = config.max_num_batched_tokens
        self._max_seqs = min(config.max_num_seqs, config.max_num_batched_tokens)
        self._chunked = config.enable_chunked_prefill
        self._by_priority = config.policy == "priority"
        self._waiting: list[tuple[Key, Sequence]] = []
        self._num_stale = 0
        """Entries of the queue that do not wait any more."""
        self._decodes: list[Sequence] = []
        """Never changed in place: scheduled steps hold it."""
        self._prefills: list[Sequence] = []
        """Running, prompt not yet computed, by key."""
        self._dropped: list[int] = []
        self._watch_shared = False
        """Whether a decode may write to a shared block."""
        self._set_decodes([])

    # Queue.

    @property
    def num_running(self) -> int:
        return len(self._decodes) + len(self._prefills)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) - self._num_stale

    def running(self) -> Iterable[Sequence]:
        """All that hold blocks."""
        yield from self._decodes
        yield from self._prefills

    def enqueue(self, group: Group, sequences: list[Sequence]) -> None:
        """Let samples of a request wait. Of those without output one computes the prompt, for all to be forked from."""
        leader: Sequence | None = None
        for sequence in sequences:
            if sequence.num_output_tokens == 0 and leader is not None:
                sequence.status = Status.UNBORN
                group.unborn.append(sequence)
            else:
                self._wait(sequence)
                if sequence.num_output_tokens == 0:
                    leader = sequence

    def finish(self, sequence: Sequence) -> None:
        """Forget a sequence, whatever it is doing: its blocks and its row can be used by the next plan."""
        status, group = sequence.status, sequence.group
        if status is Status.RUNNING:
            self._release(sequence, Status.FINISHED)
        elif status is Status.WAITING:
            self._num_stale += 1
        elif status is Status.UNBORN:
            group.unborn.remove(sequence)
        sequence.status = Status.FINISHED
        self.table.remove(sequence.row)
        if group.unborn and status in (Status.WAITING, Status.RUNNING) and sequence.num_output_tokens == 0:
            self._lead(group)
        if self._num_stale > 64 and self._num_stale > len(self._waiting) // 2:
            self._waiting = [entry for entry in self._waiting if entry[1].status is Status.WAITING]
            heapq.heapify(self._waiting)
            self._num_stale = 0

    def restart(self, num_blocks: int, sequences: Iterable[Sequence]) -> None:
        """Preempt everything and begin with an empty cache. `sequences` are all the unfinished."""
        self.blocks.reset(num_blocks)
        self._waiting, self._num_stale = [], 0
        self._prefills, self._dropped = [], []
        self._set_decodes([])
        groups: dict[Group, list[Sequence]] = {}
        for sequence in sequences:
            sequence.forget_in_flight()
            sequence.forget_blocks()
            sequence.block_table = []
            sequence.group.unborn = []
            groups.setdefault(sequence.group, []).append(sequence)
        for group, members in groups.items():
            self.enqueue(group, members)

    # One step.

    def schedule(self, epoch: int, step: int) -> ScheduledStep | None:
        """The next plan, or None when nothing can be computed now. The sequences count as having run it."""
        draft = _Draft()
        if self._by_priority:
            self._make_way()
        if not self._chunked:
            # Whole prompts do not fit beside decodes: a step is either.
            self._continue_prefills(draft)
            self._admit(draft)
        decoding = not draft.sequences and self._make_room()
        if decoding:
            appended = self._grow_decodes(draft)
        else:
            appended = []
        if self._chunked:
            self._continue_prefills(draft)
            self._admit(draft)
        if not decoding and not draft.sequences:
            return None
        scheduled = self._build(epoch, step, draft, decoding, appended)
        self._advance(draft, scheduled, decoding)
        return scheduled

    def _make_room(self) -> bool:
        """Preempt until all decodes can write their tokens. Whether there are any decodes."""
        while self._decodes:
            if self._blocks_to_write() <= self.blocks.num_free:
                return True
            self._preempt(max(self.running(), key=_key))
        return False

    def _blocks_to_write(self) -> int:
        """Blocks that the decodes need for one token each: a new one past the last, a copy of a shared one."""
        table, rows = self.table, self._rows
        self._short = table.length[rows] > table.num_slots[rows]
        need = int(np.count_nonzero(self._short))
        if self._watch_shared:
            writers: Counter[int] = Counter()
            for index in np.flatnonzero(table.tail_shared[rows] & ~self._short).tolist():
                sequence = self._decodes[index]
                writers[sequence.block_table[self._tail(sequence)]] += 1
            for block, count in writers.items():
                need += count - (self.blocks.num_owners(block) == count)
        return need

    def _tail(self, sequence: Sequence) -> int:
        """Index of the block that a decode writes to."""
        return int(self.table.length[sequence.row] - 1) // self.blocks.block_size

    def _grow_decodes(self, draft: _Draft) -> list[int]:
        """Give every decode a block of its own to write to. The blocks appended, in the order of the decodes."""
        table, rows, blocks = self.table, self._rows, self.blocks
        short = np.flatnonzero(self._short)
        if self._watch_shared:
            for index in np.flatnonzero(table.tail_shared[rows] & ~self._short).tolist():
                sequence = self._decodes[index]
                tail = self._tail(sequence)
                copy = blocks.copy_on_write(sequence, tail)
                if copy is not None:
                    draft.copies += copy
                    draft.replaced += (sequence.seq_id, tail, copy[1])
            table.tail_shared[rows] = False
            self._watch_shared = False
        draft.num_tokens = len(rows)
        if not short.size:
            return []
        decodes = self._decodes
        table.num_slots[rows[short]] += blocks.block_size
        return [blocks.allocate(decodes[index])[0] for index in short.tolist()]

    def _continue_prefills(self, draft: _Draft) -> None:
        """Compute further chunks of the prompts that are under way, first-come first."""
        for sequence in list(self._prefills):
            if draft.num_tokens == self._max_tokens:
                return
            if sequence.status is not Status.RUNNING:
                continue  # preempted for an earlier one
            start = sequence.num_computed
            end = min(sequence.num_tokens, start + self._max_tokens - draft.num_tokens)
            need = self.blocks.blocks_for(end) - len(sequence.block_table)
            while need > self.blocks.num_free and self._prefills[-1] is not sequence:
                self._preempt(self._prefills[-1])  # later in order, so not in this plan
            if need > self.blocks.num_free:
                end = (len(sequence.block_table) + self.blocks.num_free) * self.blocks.block_size
            if end > start:
                self._compute(draft, sequence, end)

    def _admit(self, draft: _Draft) -> None:
        """Start waiting sequences in their order while tokens, seats and blocks last. Nobody overtakes the head."""
        blocks = self.blocks
        while draft.num_tokens < self._max_tokens and (sequence := self._head()) is not None:
            if sequence.num_in_flight:
                return  # preempted; its tokens must be read before they can be sent again
            if self.num_running + len(draft.births) >= self._max_seqs:
                return
            hits = blocks.match(sequence)
            num_cached = len(hits) * blocks.block_size
            todo = sequence.num_tokens - num_cached
            if not self._chunked and todo > self._max_tokens - draft.num_tokens and draft.sequences:
                return  # a prompt is computed whole, unless it grew past a whole step before it was preempted
            need = self._blocks_to_start(sequence, hits) + self._reserved(draft.num_blank)
            if need > blocks.num_free:
                return
            heapq.heappop(self._waiting)
            sequence.status = Status.RUNNING
            blocks.adopt(sequence, hits)
            row = sequence.row
            self.table.num_computed[row] = num_cached
            self.table.num_slots[row] = num_cached
            if sequence.num_output_tokens == 0:
                sequence.num_cached = num_cached
            if blocks.caching and not sequence.wants_prompt_logprobs:
                self.prefix_query_tokens += sequence.num_tokens
                self.prefix_hit_tokens += num_cached
            draft.new.append(sequence.whole())
            self._prefills.append(sequence)
            self._prefills.sort(key=_key)
            self._compute(draft, sequence, min(sequence.num_tokens, num_cached + self._max_tokens - draft.num_tokens))

    def _head(self) -> Sequence | None:
        """The first of the queue that still waits."""
        while self._waiting:
            sequence = self._waiting[0][1]
            if sequence.status is Status.WAITING:
                return sequence
            heapq.heappop(self._waiting)
            self._num_stale -= 1
        return None

    def _reserved(self, num_blank: int) -> int:
        """Free blocks that are spoken for: prompts under way, children's first writes, some room for decodes."""
        if not self.num_running:
            return 0
        under_way = sum(self.blocks.blocks_for(s.num_tokens) - len(s.block_table) for s in self._prefills)
        return under_way + num_blank + max(1, self.blocks.num_blocks // 128)

    def _blocks_to_start(self, sequence: Sequence, hits: list[int]) -> int:
        """Free blocks that it takes to compute all known tokens of a waiting sequence, `hits` taken from the cache."""
        return self.blocks.blocks_for(sequence.num_tokens) - len(hits) + self.blocks.num_idle(hits)

    def _make_way(self) -> None:
        """Preempt running sequences of a worse priority than the head of the queue, if that lets it in."""
        head = self._head()
        if head is None or head.num_in_flight:
            return
        worse = sorted((s for s in self.running() if s.key[0] > head.key[0]), key=_key)
        if not worse:
            return
        hits = self.blocks.match(head)
        while worse:
            missing = self._blocks_to_start(head, hits) + self._reserved(0) - self.blocks.num_free
            if missing <= 0 and self.num_running < self._max_seqs:
                return
            if missing > sum(len(s.block_table) for s in worse):
                return
            self._preempt(worse.pop())

    def _compute(self, draft: _Draft, sequence: Sequence, end: int) -> None:
        """Plan a running prompt's tokens up to `end`; its last chunk draws a token, for its unborn siblings too."""
        row, blocks = sequence.row, self.blocks
        start = sequence.num_computed
        new_blocks = blocks.allocate(sequence, max(0, blocks.blocks_for(end) - len(sequence.block_table)))
        self.table.num_slots[row] = len(sequence.block_table) * blocks.block_size
        entry = len(draft.sequences)
        draft.sequences.append(sequence)
        draft.chunks.append(end - start)
        draft.tables.append(new_blocks)
        draft.num_tokens += end - start
        group = sequence.group
        if not group.unborn or end < sequence.num_tokens or sequence.num_output_tokens:
            return
        shares_tail = end % blocks.block_size != 0
        children, group.unborn = group.unborn, []
        for child in children:
            if self.num_running + len(draft.births) >= self._max_seqs or blocks.num_free <= draft.num_blank:
                self._wait(child)
                continue
            blocks.fork(sequence, child)
            child.status = Status.RUNNING
            self.table.num_computed[child.row] = end
            self.table.num_slots[child.row] = self.table.num_slots[row]
            self.table.tail_shared[child.row] = self.table.tail_shared[row] = shares_tail
            child.num_cached = sequence.num_cached
            draft.new.append(child.whole())
            draft.births.append((child, entry))
            draft.num_blank += shares_tail

    def _build(self, epoch: int, step: int, draft: _Draft, decoding: bool, appended: list[int]) -> ScheduledStep:
        """The draft as a plan."""
        num_decodes = len(self._decodes) if decoding else 0
        samples = self._decodes if decoding else []
        rows = self._rows if decoding else _NO_ROWS
        seq_ids = self._seq_ids if decoding else np.zeros(0, np.int32)
        plan = StepPlan(epoch, step, new=draft.new, num_decodes=num_decodes)
        if self._dropped:
            plan.dropped = array("i", self._dropped).tobytes()
            self._dropped = []
        if draft.copies:
            plan.copies = array("i", draft.copies).tobytes()
            plan.replaced = array("i", draft.replaced).tobytes()
        if decoding:
            plan.seq_ids = plan.sample_seqs = self._packed_ids
            plan.num_tokens, plan.sample_entries = self._packed_ones, self._packed_range
            plan.block_counts = self._short.astype("<i4").tobytes() if appended else self._packed_zeros
            plan.block_ids = array("i", appended).tobytes()
        if draft.sequences:
            drawing = [(s, i) for i, (s, n) in enumerate(zip(draft.sequences, draft.chunks)) if _completes(s, n)]
            drawing += draft.births
            plan.seq_ids += array("i", [s.seq_id for s in draft.sequences]).tobytes()
            plan.num_tokens += array("i", draft.chunks).tobytes()
            plan.block_counts += array("i", map(len, draft.tables)).tobytes()
            plan.block_ids += array("i", [block for table in draft.tables for block in table]).tobytes()
            if drawing:
                late = [sequence for sequence, _ in drawing]
                samples = samples + late
                rows = np.concatenate([rows, np.array([s.row for s in late], np.intp)])
                late_ids = np.array([s.seq_id for s in late], np.int32)
                seq_ids = np.concatenate([seq_ids, late_ids])
                plan.sample_seqs += late_ids.astype("<i4", copy=False).tobytes()
                plan.sample_entries += array("i", [num_decodes + entry for _, entry in drawing]).tobytes()
        return ScheduledStep(plan, samples, rows, seq_ids, draft.num_tokens)

    def _advance(self, draft: _Draft, scheduled: ScheduledStep, decoding: bool) -> None:
        """Count the plan as run: what it computes is computed for all later plans, what it draws is in flight."""
        table = self.table
        if decoding:
            table.num_computed[self._rows] += 1
        decodes = self._decodes
        if draft.sequences:
            for sequence, chunk in zip(draft.sequences, draft.chunks):
                end = sequence.num_computed + chunk
                table.num_computed[sequence.row] = end
                self.blocks.register(sequence, end)
            decodes = decodes + [s for s in draft.sequences if s.num_computed == s.num_tokens]
            decodes += [child for child, _ in draft.births]
            self._prefills = [s for s in self._prefills if s.num_computed < s.num_tokens]
        rows = scheduled.rows
        length = table.length[rows] + 1
        table.length[rows] = length
        drained = length >= table.limit[rows]
        if drained.any():
            for index in np.flatnonzero(drained).tolist():
                self._drain(scheduled.samples[index])
            decodes = [sequence for sequence in decodes if sequence.status is Status.RUNNING]
        if decodes is not self._decodes:
            self._set_decodes(decodes)

    # Sequences that stop running.

    def _drain(self, sequence: Sequence) -> None:
        """Its last token is in flight: it needs neither blocks nor a seat any more."""
        self.blocks.register(sequence, min(sequence.num_tokens, sequence.num_computed))
        sequence.status = Status.DRAINING
        self._dropped.append(sequence.seq_id)
        self.blocks.free(sequence)
        sequence.forget_blocks()

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence, Status.WAITING)
        heapq.heappush(self._waiting, (sequence.key, sequence))
        self.num_preemptions += 1

    def _release(self, sequence: Sequence, status: Status) -> None:
        """Take a running sequence's blocks and seat; the next plan tells the ranks."""
        self.blocks.register(sequence, min(sequence.num_tokens, sequence.num_computed))
        self.blocks.free(sequence)
        sequence.forget_blocks()
        sequence.status = status
        self._dropped.append(sequence.seq_id)
        if sequence in self._prefills:
            self._prefills.remove(sequence)
        else:
            self._set_decodes([other for other in self._decodes if other is not sequence])

    def _wait(self, sequence: Sequence) -> None:
        sequence.status = Status.WAITING
        heapq.heappush(self._waiting, (sequence.key, sequence))

    def _lead(self, group: Group) -> None:
        """The sample that was to compute the prompt is gone: the next one does it, unless another is at it."""
        siblings = group.sequences.values()
        if not any(s.status in (Status.WAITING, Status.RUNNING) and not s.num_output_tokens for s in siblings):
            self._wait(group.unborn.pop(0))

    def _set_decodes(self, decodes: list[Sequence]) -> None:
        """Change who decodes, and the arrays made from it."""
        count = len(decodes)
        self._decodes = decodes
        self._rows: RowArray = np.fromiter([s.row for s in decodes], np.intp, count)
        self._seq_ids: Int32Array = self.table.seq_id[self._rows]
        self._packed_ids = self._seq_ids.astype("<i4", copy=False).tobytes()
        self._packed_ones = np.ones(count, "<i4").tobytes()
        self._packed_zeros = bytes(4 * count)
        self._packed_range = np.arange(count, dtype="<i4").tobytes()
        self._watch_shared = bool(self.table.tail_shared[self._rows].any())


def _key(sequence: Sequence) -> Key:
    return sequence.key


def _completes(sequence: Sequence, chunk: int) -> bool:
    """Whether a chunk is the last of what is known, so that a token is drawn."""
    return sequence.num_computed + chunk == sequence.num_tokens
