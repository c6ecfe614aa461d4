"""Scheduler: what a step holds, who goes first, and who makes way."""

from __future__ import annotations

import random

import pytest

from engine.block_manager import BlockManager
from engine.request import Request
from engine.sampling_params import SamplingParams
from engine.scheduler import ScheduledStep, Scheduler
from engine.sequence import Group, Sequence, Status
from engine.step import StepPlan, unpack
from tests.fakes import engine_config
from tests.hash_model import random_prompt


class Bench:
    """A scheduler whose steps are read at once, with tokens that stop nothing."""

    def __init__(self, num_blocks: int = 100, *, block_size: int = 4, **changes: object) -> None:
        self.blocks = BlockManager(num_blocks, block_size)
        self.scheduler = Scheduler(engine_config(**changes), self.blocks)
        self.num_steps = 0
        self.num_sequences = 0

    def add(self, num_tokens: int, *, n: int = 1, priority: int = 0, limit: int = 64, seed: int = 0) -> list[Sequence]:
        number = self.num_sequences
        prompt = random_prompt(random.Random(number + seed), num_tokens)
        group = Group(Request.create(str(number), prompt, SamplingParams(n=n, seed=1)), 0.0)
        for index in range(n):
            key = (priority, 0.0, 0.0, number, index)
            group.sequences[index] = Sequence(group, index, self.num_sequences, key, limit, self.scheduler.table)
            self.num_sequences += 1
        self.scheduler.enqueue(group, list(group.sequences.values()))
        return list(group.sequences.values())

    def plan(self) -> ScheduledStep | None:
        """A step that is not read."""
        scheduled = self.scheduler.schedule(0, self.num_steps)
        if scheduled is not None:
            self.num_steps += 1
            self.blocks.check(self.scheduler.running)
        return scheduled

    def read(self, scheduled: ScheduledStep) -> None:
        for sequence in scheduled.samples:
            if sequence.status is not Status.FINISHED:
                sequence.tokens.append(2)
                self.scheduler.table.known[sequence.row] += 1
                if sequence.num_tokens == self.scheduler.table.limit[sequence.row]:
                    del sequence.group.sequences[sequence.index]
                    self.scheduler.finish(sequence)

    def step(self) -> StepPlan:
        scheduled = self.plan()
        assert scheduled is not None
        self.read(scheduled)
        return scheduled.plan


def entries(plan: StepPlan) -> list[tuple[int, int]]:
    return list(zip(unpack(plan.seq_ids).tolist(), unpack(plan.num_tokens).tolist()))


def test_chunks_of_prompts_fill_up_the_step_behind_the_decodes() -> None:
    bench = Bench(max_num_batched_tokens=16)
    bench.add(10)
    bench.add(20)
    bench.add(3)
    assert entries(bench.step()) == [(0, 10), (1, 6)]
    plan = bench.step()
    assert entries(plan) == [(0, 1), (1, 14), (2, 1)] and plan.num_decodes == 1
    assert unpack(plan.sample_seqs).tolist() == [0, 1] and unpack(plan.sample_entries).tolist() == [0, 1]
    plan = bench.step()
    assert entries(plan) == [(0, 1), (1, 1), (2, 2)] and plan.num_decodes == 2


def test_whole_prompts_and_decodes_do_not_mix_without_chunks() -> None:
    bench = Bench(enable_chunked_prefill=False, max_num_batched_tokens=16)
    bench.add(10)
    bench.add(7)
    bench.add(5)
    assert entries(bench.step()) == [(0, 10)], "7 more do not fit, and 5 do not overtake"
    assert entries(bench.step()) == [(1, 7), (2, 5)]
    assert entries(bench.step()) == [(0, 1), (1, 1), (2, 1)]


def test_large_steps_are_cut_to_a_multiple() -> None:
    bench = Bench(max_num_seqs=16, step_token_multiple=4)
    for length in (3, 2, 3, 2):
        bench.add(length)
    assert entries(bench.step()) == [(0, 3), (1, 2), (2, 3), (3, 2)], "no decodes yet: a prompt is not put off"
    bench.add(5)
    bench.add(6)
    ones = [(i, 1) for i in range(4)]
    assert entries(bench.step()) == [*ones, (4, 5), (5, 3)], "3 of 15 put off"
    assert entries(bench.step()) == [*ones, (4, 1), (5, 3)], "5 decodes; the 3 put off would all be: more than half"
    bench.add(3)
    assert entries(bench.step()) == [*ones, (4, 1), (5, 1), (6, 2)], "6 decodes; 1 of 3 is put off"
    assert entries(bench.step()) == [*ones, (4, 1), (5, 1), (6, 1)], "the last of a prompt goes whatever the multiple"


def test_a_prompt_whose_samples_are_forked_is_not_cut() -> None:
    bench = Bench(max_num_seqs=16, step_token_multiple=2)
    bench.add(3)
    bench.add(4)
    bench.step()
    bench.add(5, n=2)
    assert entries(bench.step()) == [(0, 1), (1, 1), (2, 5)]
    assert entries(bench.step()) == [(0, 1), (1, 1), (2, 1), (3, 1)]


def test_a_steady_step_is_a_small_delta() -> None:
    bench = Bench(num_blocks=1000, max_num_seqs=256, max_num_batched_tokens=512, block_size=8)
    for _ in range(256):
        bench.add(2)
    bench.step()
    plan = bench.step()
    assert plan.num_decodes == 256 and not plan.new and not plan.dropped and not plan.block_ids and not plan.copies
    assert unpack(plan.sample_entries).tolist() == list(range(256))


def test_seats_are_never_more_than_asked_nor_more_than_tokens() -> None:
    for settings, seats in ({"max_num_seqs": 3}, 3), ({"max_num_seqs": 8, "max_num_batched_tokens": 2}, 2):
        bench = Bench(**settings)  # type: ignore[arg-type]
        for _ in range(5):
            bench.add(1)
        for _ in range(5):
            bench.step()
            assert len(bench.scheduler.running) <= seats
        assert len(bench.scheduler.running) == seats and len(bench.scheduler.waiting) == 5 - seats


def test_the_last_come_makes_way_and_comes_back_first() -> None:
    bench = Bench(num_blocks=5, block_size=2)
    first, second, third = bench.add(3)[0], bench.add(3)[0], bench.add(1)[0]
    bench.step()
    assert third.status is Status.WAITING, "a block is kept for those that run"
    while second.status is Status.RUNNING:
        bench.step()
    assert first.status is Status.RUNNING and not second.block_table
    plan = bench.step()
    assert [seq_id for seq_id, _ in entries(plan)] == [0]
    waiting = [bench.scheduler.waiting.head()]
    assert waiting == [second], "before the third"


def test_the_ranks_are_told_of_the_preempted_and_get_it_whole_again() -> None:
    bench = Bench(num_blocks=6, block_size=2)
    first, second = bench.add(3, limit=10)[0], bench.add(3, limit=13)[0]
    dropped: list[int] = []
    back: list[tuple[int, int]] = []
    for _ in range(10):
        plan = bench.step()
        dropped += unpack(plan.dropped).tolist()
        back += [(new.seq_id, len(new.token_ids) // 4) for new in plan.new]
    assert first.status is Status.FINISHED
    assert dropped == [1, 0] and back[:2] == [(0, 3), (1, 3)]
    assert back[2][0] == 1 and back[2][1] > 3, "with the tokens it has drawn"
    assert second.status is Status.RUNNING and bench.scheduler.num_preemptions == 1


def test_a_preempted_sequence_waits_until_its_tokens_are_read() -> None:
    bench = Bench(num_blocks=6, block_size=2)
    first, second = bench.add(3, limit=13)[0], bench.add(3, limit=13)[0]
    unread: list[ScheduledStep] = []
    while second.status is Status.RUNNING or not unread:
        scheduled = bench.plan()
        assert scheduled is not None
        unread.append(scheduled)
        if len(unread) > 2:
            bench.read(unread.pop(0))
    assert second.num_in_flight
    bench.scheduler.finish(first)
    assert bench.plan() is None
    for scheduled in unread:
        bench.read(scheduled)
    assert [new.seq_id for new in bench.step().new] == [second.seq_id]


def test_samples_share_the_prompt_until_they_write() -> None:
    bench = Bench(block_size=4)
    bench.add(6, n=3)
    plan = bench.step()
    assert entries(plan) == [(0, 6)]
    assert [(new.seq_id, new.num_computed) for new in plan.new] == [(0, 0), (1, 6), (2, 6)]
    assert unpack(plan.sample_seqs).tolist() == [0, 1, 2] and unpack(plan.sample_entries).tolist() == [0, 0, 0]
    assert bench.blocks.stats().used == 2 and bench.blocks.stats().saved == 4
    plan = bench.step()
    assert len(unpack(plan.copies)) == 4 and len(unpack(plan.replaced)) == 6, "two copy, the last writes in place"
    assert bench.blocks.stats().used == 4 and bench.blocks.stats().shared == 1
    assert not bench.step().copies


def test_samples_without_a_seat_come_later_and_find_the_prompt_cached() -> None:
    bench = Bench(block_size=4, max_num_seqs=2)
    samples = bench.add(6, n=3, limit=9)
    bench.step()
    assert [s.status for s in samples] == [Status.RUNNING, Status.RUNNING, Status.WAITING]
    while samples[2].status is not Status.RUNNING:
        bench.step()
    assert samples[2].num_cached == 4


def test_the_next_sample_computes_the_prompt_when_the_first_is_gone() -> None:
    bench = Bench(max_num_batched_tokens=4)
    samples = bench.add(10, n=3)
    bench.step()
    assert [s.status for s in samples] == [Status.RUNNING, Status.UNBORN, Status.UNBORN]
    del samples[0].group.sequences[0]
    bench.scheduler.finish(samples[0])
    assert [s.status for s in samples[1:]] == [Status.WAITING, Status.UNBORN]
    while samples[2].status is Status.UNBORN:
        bench.step()
    assert samples[2].num_computed == 10


def test_better_priorities_go_first_and_take_seats() -> None:
    bench = Bench(policy="priority", max_num_seqs=2)
    low, other = bench.add(3, priority=5)[0], bench.add(3, priority=5)[0]
    bench.step()
    late, urgent = bench.add(3, priority=5)[0], bench.add(3, priority=1)[0]
    bench.step()
    assert (low.status, other.status) == (Status.RUNNING, Status.WAITING), "the last-come of the worst gives way"
    assert (urgent.status, late.status) == (Status.RUNNING, Status.WAITING)
    bench.add(3, priority=5)
    bench.step()
    assert low.status is urgent.status is Status.RUNNING, "an equal takes nothing"


def test_a_better_priority_does_not_wait_for_the_end_of_a_long_prompt() -> None:
    bench = Bench(policy="priority", max_num_batched_tokens=8)
    bench.add(40, priority=5)
    bench.step()
    bench.add(5, priority=1)
    assert entries(bench.step()) == [(1, 5), (0, 3)]
    assert entries(bench.step()) == [(1, 1), (0, 7)]
    bench.add(2, priority=5)
    assert entries(bench.step()) == [(1, 1), (0, 7)], "an equal waits"


def test_a_priority_that_would_not_fit_anyway_preempts_nobody() -> None:
    bench = Bench(num_blocks=8, block_size=4, policy="priority")
    urgent, low = bench.add(12, priority=0)[0], bench.add(4, priority=9)[0]
    bench.step()
    bench.add(24, priority=1)
    bench.step()
    assert urgent.status is low.status is Status.RUNNING and bench.scheduler.num_preemptions == 0


def test_a_last_token_in_flight_needs_no_blocks() -> None:
    bench = Bench()
    sequence = bench.add(3, limit=4)[0]
    scheduled = bench.plan()
    assert scheduled is not None and sequence.status is Status.DRAINING
    assert bench.blocks.stats().used == 0 and len(bench.scheduler.running) == 0
    assert bench.plan() is None, "nothing is scheduled past its end"
    bench.add(3)
    assert unpack(bench.step().dropped).tolist() == [0]


@pytest.mark.parametrize("count", [10, 1000])
def test_the_queue_forgets_what_was_aborted_in_it(count: int) -> None:
    bench = Bench(max_num_seqs=1)
    bench.add(3)
    bench.step()
    for sequence in [bench.add(3)[0] for _ in range(count)]:
        bench.scheduler.finish(sequence)
    assert len(bench.scheduler.waiting) == 0
    assert bench.scheduler.waiting.num_held <= 128


def test_restart_keeps_the_order_and_joins_the_samples_again() -> None:
    bench = Bench()
    single, pair = bench.add(3), bench.add(5, n=2)
    bench.step()
    pair_tokens = [s.num_output_tokens for s in pair]
    assert pair_tokens == [1, 1]
    fresh = bench.add(4, n=3)
    scheduled = bench.plan()
    assert scheduled is not None and all(s.num_in_flight for s in fresh)
    bench.scheduler.restart(50, [*single, *pair, *fresh])
    assert bench.blocks.num_blocks == 50 and bench.blocks.num_free == 50
    assert [s.status for s in fresh] == [Status.WAITING, Status.UNBORN, Status.UNBORN]
    plan = bench.step()
    assert [new.seq_id for new in plan.new][:4] == [s.seq_id for s in [*single, *pair, fresh[0]]]
    assert not plan.dropped
