"""WaitingQueue: order, and forgetting those that left."""

from __future__ import annotations

import random

from engine.request import Request
from engine.sampling_params import SamplingParams
from engine.sequence import Group, Key, Sequence, SequenceTable, Status
from engine.waiting_queue import WaitingQueue

TABLE = SequenceTable()


def sequence(key: Key) -> Sequence:
    return Sequence(Group(Request.create("r", [1], SamplingParams(seed=0)), 0.0), 0, 1, key, 10, TABLE)


def leave(queue: WaitingQueue, one: Sequence) -> None:
    one.status = Status.FINISHED
    queue.left(one)


def test_gives_them_out_by_priority_then_arrival_then_order_then_sample() -> None:
    keys: list[Key] = [(0, 5.0, 1, 0), (0, 5.0, 2, 0), (0, 5.0, 2, 1), (0, 6.0, 0, 0), (1, 0.0, 9, 0)]
    shuffled = list(keys)
    random.Random(1).shuffle(shuffled)
    queue = WaitingQueue()
    for key in shuffled:
        queue.push(sequence(key))
    taken = []
    while (head := queue.head()) is not None:
        assert head is queue.head() and head.status is Status.WAITING
        assert queue.pop() is head
        taken.append(head.key)
    assert taken == keys and len(queue) == 0


def test_those_that_left_are_passed_over() -> None:
    queue = WaitingQueue()
    first, second, third = (sequence((0, 0.0, number, 0)) for number in range(3))
    for each in (first, second, third):
        queue.push(each)
    leave(queue, first)
    leave(queue, second)
    assert len(queue) == 1 and queue.head() is third
    leave(queue, third)
    assert len(queue) == 0 and queue.head() is None


def test_memory_follows_those_that_wait() -> None:
    queue = WaitingQueue()
    members = [sequence((0, 0.0, number, 0)) for number in range(5_000)]
    random.Random(2).shuffle(members)
    for each in members:
        queue.push(each)
    for each in members[100:]:
        leave(queue, each)
    assert len(queue) == 100 and queue.num_held <= 200 + 65
    assert [queue.pop() for _ in range(100) if queue.head()] == sorted(members[:100], key=lambda one: one.key)
