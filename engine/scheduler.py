"""Scheduler: which sequences compute which tokens in the next step. Queues and a BlockManager in, a StepPlan out.

Every step is scheduled anew: running decodes first, one token each, then chunks of prompts, under way and waiting, in
their order, as far as tokens, seats and blocks go. When blocks run out the last-come running sequence is preempted: it
gives back its blocks and waits, to be computed again from its tokens.

Blocks are given back the moment a plan no longer needs them, even while earlier plans that write to them are in
flight. That is safe because ranks run plans strictly in order: whoever gets the block writes later.

No deadlock: a sequence is accepted only if it fits into the whole cache alone, and the first-come running one may take
the blocks of all others; a beam that has drawn waits for others of its request, so it gives its blocks up, not its
draw, when nobody could go on otherwise. No starvation: seats never outnumber the tokens of a step, so that every
running sequence advances; nobody overtakes the head of the queue, and what a tenant is served puts off its own turn,
not another's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import numpy as np

from engine.block_manager import BlockManager
from engine.claims import Claim, key_of
from engine.config import EngineConfig
from engine.draft import Draft, Mask, ScheduledStep
from engine.running_set import RunningSet
from engine.sequence import SEATED, Group, Sequence, SequenceTable, Status
from engine.shares import Shares
from engine.tail_blocks import TailBlocks
from engine.waiting_queue import WaitingQueue


class Scheduler:
    """Owns the queues, the running sequences and their blocks."""

    def __init__(self, config: EngineConfig, blocks: BlockManager) -> None:
        self.blocks = blocks
        self.table = SequenceTable()
        self.num_preemptions = 0
        self.prefix_query_tokens = 0
        self.prefix_hit_tokens = 0
        self._max_tokens = config.max_num_batched_tokens
        self._multiple = config.step_token_multiple or 1
        self._max_seqs = min(config.max_num_seqs, config.max_num_batched_tokens)
        self._chunked = config.enable_chunked_prefill
        self._by_priority = config.policy == "priority"
        self.shares = Shares()
        self.waiting = WaitingQueue(self.shares)
        self.running = RunningSet(self.table)
        self._tails = TailBlocks(blocks, self.table)
        self._unsent: list[Sequence] = []
        """Forked beams among the decodes that were in no plan yet."""
        self._dropped: list[int] = []
        """Sequences whose blocks were given back since the last plan: it tells the ranks to forget them."""

    # Queue.

    def enqueue(self, group: Group, sequences: list[Sequence]) -> None:
        """Let samples of a request wait. Of those without output one computes the prompt, for all to be forked from."""
        leader: Sequence | None = None
        for sequence in sequences:
            if sequence.num_output_tokens == 0 and leader is not None:
                sequence.status = Status.UNBORN
                group.unborn.append(sequence)
            else:
                self.waiting.push(sequence)
                if sequence.num_output_tokens == 0:
                    leader = sequence

    def finish(self, sequence: Sequence) -> None:
        """Forget a sequence, whatever it is doing: its blocks and its row can be used by the next plan."""
        status, group = sequence.status, sequence.group
        if status in SEATED:
            self._release(sequence)
        elif status is Status.UNBORN:
            group.unborn.remove(sequence)
        sequence.status = Status.FINISHED
        if status is Status.WAITING:
            self.waiting.left(sequence)
        self.table.remove(sequence.row)
        if group.unborn and status in (Status.WAITING, Status.RUNNING):
            self._lead(group)

    def branch(self, parents: list[Sequence], pairs: list[tuple[Sequence, Sequence]]) -> None:
        """Forget beams that have drawn; of each pair a child, one token longer, goes on with its parent's blocks.

        A child whose parent has lost its blocks, or for which there is no seat, waits to be computed from its tokens.
        """
        table, blocks = self.table, self.blocks
        born: list[Sequence] = []
        num_seats = self._max_seqs - len(self.running) + sum(parent.status in SEATED for parent in parents)
        for parent, child in pairs:
            if parent.status is not Status.PAUSED or len(born) == num_seats:
                self.waiting.push(child)
                continue
            blocks.fork(parent, child)
            child.status = Status.RUNNING
            table.num_computed[child.row] = end = child.num_tokens - 1
            table.num_slots[child.row] = table.num_slots[parent.row]
            table.tail_shared[child.row] = end % blocks.block_size != 0
            blocks.register(child, end)
            born.append(child)
        for parent in parents:
            self.finish(parent)
        if born:
            self._unsent += born
            self.running.set_decodes(self.running.running_decodes() + born)

    def restart(self, num_blocks: int, sequences: Iterable[Sequence]) -> None:
        """Preempt everything and begin with an empty cache. `sequences` are all the unfinished."""
        self.blocks.reset(num_blocks)
        self.waiting = WaitingQueue(self.shares)
        self._dropped, self._unsent = [], []
        self.running.clear()
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
        draft = Draft()
        if self._by_priority:
            self._make_way()
        if self.shares.num_active > 1:
            self._claim_share()
        self.running.settle()
        if not self._chunked:
            # Whole prompts do not fit beside decodes: a step is either.
            self._fill(draft)
        if not draft.prefills and (short := self._make_room()) is not None:
            draft.new += [sequence.whole() for sequence in self._unsent]
            self._unsent = []
            decodes = self.running.decodes
            draft.add_decodes(decodes, short, self._tails.grow(draft, decodes, short))
        if self._chunked:
            self._fill(draft)
            self._round(draft)
        if not draft.num_tokens:
            return self.schedule(epoch, step) if self._unblock() else None
        scheduled = draft.build(epoch, step, self._dropped, self.table)
        self._dropped = []
        self._advance(draft, scheduled)
        return scheduled

    def _make_room(self) -> Mask | None:
        """Preempt until all decodes can write their tokens. Which of them need a block; None when there are none."""
        while decodes := self.running.decodes:
            short = self._tails.short(decodes)
            if self._tails.num_needed(decodes, short) <= self.blocks.num_free:
                return short
            self._preempt(self.running.last())
            self.running.settle()
        return None

    def _fill(self, draft: Draft) -> None:
        """Compute prompts, those under way and those waiting, in their order, as far as the step's tokens go."""
        under_way = deque(self.running.prefills)
        admitting = True
        while draft.num_tokens < self._max_tokens:
            head = self.waiting.head() if admitting else None
            if under_way and (head is None or under_way[0].key < head.key):
                self._continue(draft, under_way.popleft())
            elif head is not None:
                admitting = self._admit(draft, head)  # nobody overtakes the head
            else:
                return

    def _round(self, draft: Draft) -> None:
        """Put the end of the last prompt off where it would fill the smaller part of a tile, in a step of many decodes.

        Such a step is bound by arithmetic, and a tile takes as long whatever is in it; the rest fills up the next step.
        At least half of the prompts' tokens stay, so that every step advances.
        """
        rest = draft.num_tokens % self._multiple
        if not rest or not draft.chunks or draft.decodes is None or len(draft.decodes) < self._multiple:
            return
        computed = sum(draft.chunks)
        if rest >= draft.chunks[-1] or 2 * rest > computed or draft.bears_last:
            return
        sequence, blocks = draft.prefills[-1], self.blocks
        end = sequence.num_computed + draft.chunks[-1] - rest
        surplus = len(sequence.block_table) - blocks.blocks_for(end)
        blocks.take_back(sequence, surplus)
        self.table.num_slots[sequence.row] = len(sequence.block_table) * blocks.block_size
        draft.shorten_last(rest, surplus)

    def _continue(self, draft: Draft, sequence: Sequence) -> None:
        """Compute the next chunk of a prompt under way, if there are blocks for it."""
        if sequence.status is not Status.RUNNING:
            return  # preempted for an earlier one
        start = sequence.num_computed
        end = min(sequence.num_tokens, start + self._max_tokens - draft.num_tokens)
        need = self.blocks.blocks_for(end) - len(sequence.block_table)
        while need > self.blocks.num_free and self.running.prefills[-1] is not sequence:
            self._preempt(self.running.prefills[-1])  # later in order, so not in this plan
        if need > self.blocks.num_free:
            end = (len(sequence.block_table) + self.blocks.num_free) * self.blocks.block_size
        if end > start:
            self._compute(draft, sequence, end)

    def _admit(self, draft: Draft, sequence: Sequence) -> bool:
        """Start the head of the queue. False when a seat, blocks or the reading of its tokens is missing."""
        blocks = self.blocks
        if sequence.num_in_flight:
            return False  # preempted; its tokens must be read before they can be sent again
        if len(self.running) + len(draft.births) >= self._max_seqs:
            return False
        hits = blocks.match(sequence)
        num_cached = len(hits) * blocks.block_size
        room = self._max_tokens - draft.num_tokens
        if not self._chunked and sequence.num_tokens - num_cached > room and draft.prefills:
            return False  # a prompt is computed whole, unless it grew past a whole step before it was preempted
        if self._blocks_to_start(sequence, hits) + draft.num_blank > blocks.num_free:
            return False
        self.waiting.pop()
        self.running.admit(sequence)
        blocks.adopt(sequence, hits)
        self.table.num_computed[sequence.row] = self.table.num_slots[sequence.row] = num_cached
        if sequence.num_output_tokens == 0:
            sequence.num_cached = num_cached
        if blocks.caching and not sequence.computes_all:
            self.prefix_query_tokens += sequence.num_tokens
            self.prefix_hit_tokens += num_cached
        self.shares.charge(sequence.group.tenant, sequence.num_tokens - num_cached)
        draft.new.append(sequence.whole())
        self._compute(draft, sequence, min(sequence.num_tokens, num_cached + room))
        return True

    def _blocks_to_start(self, sequence: Sequence, hits: list[int]) -> int:
        """Free blocks that it takes to start a waiting sequence that has `hits` in the cache.

        All its known tokens must have blocks, and those that run some room to grow.
        """
        need = self.blocks.blocks_for(sequence.num_tokens) - len(hits) + self.blocks.num_idle(hits)
        return need + max(1, self.blocks.num_blocks // 128) if self.running else need

    def _make_way(self) -> None:
        """Preempt running sequences of a worse priority than the head of the queue, if that lets it in."""
        head = self.waiting.head()
        if head is None or head.num_in_flight:
            return
        worse = sorted((s for s in self.running if s.key[0] > head.key[0]), key=key_of)
        if not worse:
            return
        hits = self.blocks.match(head)
        while worse:
            missing = self._blocks_to_start(head, hits) - self.blocks.num_free
            if missing <= 0 and len(self.running) < self._max_seqs:
                return
            if missing > sum(len(s.block_table) for s in worse):
                return
            self._preempt(worse.pop())

    def _claim_share(self) -> None:
        """Preempt running sequences of tenants that hold more than their share, if the head's tenant holds less.

        A share is an equal part of the seats and of the blocks.
        """
        head = self.waiting.head()
        if head is None or head.num_in_flight:
            return
        missing = self._blocks_to_start(head, self.blocks.match(head)) - self.blocks.num_free
        size = self.blocks.blocks_for(head.num_tokens)
        claim = Claim(head, size, missing, seatless=len(self.running) >= self._max_seqs)
        if not claim.seatless and claim.missing <= 0:
            return
        num_active = self.shares.num_active
        seat_share, block_share = max(1, self._max_seqs // num_active), self.blocks.num_blocks // num_active
        for victim in claim.victims(self.running, seat_share=seat_share, block_share=block_share):
            self._preempt(victim)

    def _compute(self, draft: Draft, sequence: Sequence, end: int) -> None:
        """Plan a running prompt's tokens up to `end`; its last chunk draws a token, for its unborn siblings too."""
        row, blocks = sequence.row, self.blocks
        start = sequence.num_computed
        new_blocks = blocks.allocate(sequence, max(0, blocks.blocks_for(end) - len(sequence.block_table)))
        self.table.num_slots[row] = len(sequence.block_table) * blocks.block_size
        entry = draft.add_prefill(sequence, end - start, new_blocks)
        group = sequence.group
        if not group.unborn or end < sequence.num_tokens or sequence.num_output_tokens:
            return
        shares_tail = end % blocks.block_size != 0
        children, group.unborn = group.unborn, []
        for child in children:
            if len(self.running) + len(draft.births) >= self._max_seqs or blocks.num_free <= draft.num_blank:
                self.waiting.push(child)
                continue
            blocks.fork(sequence, child)
            child.status = Status.RUNNING
            child.key = (*sequence.key[:-1], child.index)
            self.table.num_computed[child.row] = end
            self.table.num_slots[child.row] = self.table.num_slots[row]
            self.table.tail_shared[child.row] = self.table.tail_shared[row] = shares_tail
            child.num_cached = sequence.num_cached
            draft.new.append(child.whole())
            draft.births.append((child, entry))
            draft.num_blank += shares_tail

    def _advance(self, draft: Draft, scheduled: ScheduledStep) -> None:
        """Count the plan as run: what it computes is computed for all later plans, what it draws is in flight."""
        table = self.table
        if draft.decodes is not None:
            table.num_computed[draft.decodes.rows] += 1
        decodes = self.running.decodes.sequences
        if draft.prefills:
            for sequence, chunk in zip(draft.prefills, draft.chunks):
                end = sequence.num_computed + chunk
                table.num_computed[sequence.row] = end
                self.blocks.register(sequence, end)
            decodes = decodes + [s for s in draft.prefills if s.num_computed == s.num_tokens]
            decodes += [child for child, _ in draft.births]
            self.running.prefills = [s for s in self.running.prefills if s.num_computed < s.num_tokens]
        rows = scheduled.rows
        self.shares.charge_each(table.tenant[rows])
        length = table.length[rows] + 1
        table.length[rows] = length
        drained = length >= table.limit[rows]
        if drained.any():
            for index in np.flatnonzero(drained).tolist():
                self._drain(scheduled.samples[index])
            decodes = [sequence for sequence in decodes if sequence.status is Status.RUNNING]
        if decodes is not self.running.decodes.sequences:
            self.running.set_decodes(decodes)

    # Sequences that stop running.

    def _drain(self, sequence: Sequence) -> None:
        """Its last token is in flight: it needs neither blocks nor a seat any more, unless it is a beam."""
        if sequence.group.search is not None:
            self.running.pause(sequence)
            return
        self._give_back(sequence)
        sequence.status = Status.DRAINING

    def _preempt(self, sequence: Sequence) -> None:
        """Let a running sequence wait, to be computed again from its tokens, unless it is a beam that has drawn."""
        paused = sequence.status is Status.PAUSED
        self._release(sequence)
        if paused:
            sequence.status = Status.DRAINING
        else:
            self.waiting.push(sequence)
        self.num_preemptions += 1

    def _unblock(self) -> bool:
        """Take a paused beam's blocks and seat when nothing in flight will, and others cannot go on without.

        They may be its own request's: its next step needs the draws of all.
        """
        beam, head = self.running.stuck(), self.waiting.head()
        if beam is None or (not self.running.prefills and (head is None or head.num_in_flight)):
            return False
        self._preempt(beam)
        return True

    def _release(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks and seat."""
        self._give_back(sequence)
        self.running.leave(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        """Free a running sequence's blocks, full ones still to be found; the next plan tells the ranks."""
        self.blocks.register(sequence, min(sequence.num_tokens, sequence.num_computed))
        self.blocks.free(sequence)
        sequence.forget_blocks()
        if sequence in self._unsent:
            self._unsent.remove(sequence)  # the ranks never knew it
        else:
            self._dropped.append(sequence.seq_id)

    def _lead(self, group: Group) -> None:
        """The sample that was to compute the prompt is gone: the next one does it, unless another is at it."""
        siblings = group.sequences.values()
        if not any(s.status in (Status.WAITING, Status.RUNNING) and not s.num_output_tokens for s in siblings):
            self.waiting.push(group.unborn.pop(0))
