"""WaitingQueue: order, and forgetting those that left."""

from __future__ import annotations

import random

from engine.request import Request
from engine.sampling_params import SamplingParams
from engine.sequence import Group, Key, Sequence, SequenceTable, Status
from engine.shares import Shares
from engine.waiting_queue import WaitingQueue

TABLE = SequenceTable()


def sequence(key: Key) -> Sequence:
    return Sequence(Group(Request.create("r", [1], SamplingParams(seed=0)), 0.0), 0, 1, key, 10, TABLE)


def leave(queue: WaitingQueue, one: Sequence) -> None:
    one.status = Status.FINISHED
    queue.left(one)


def test_gives_them_out_by_priority_then_arrival_then_order_then_sample() -> None:
    keys: list[Key] = [
        (0, 0.0, 5.0, 1, 0),
        (0, 0.0, 5.0, 2, 0),
        (0, 0.0, 5.0, 2, 1),
        (0, 0.0, 6.0, 0, 0),
        (1, 0.0, 0.0, 9, 0),
    ]
    shuffled = list(keys)
    random.Random(1).shuffle(shuffled)
    queue = WaitingQueue()
    for key in shuffled:
        queue.push(sequence(key))
    taken = []
    while (head := queue.head()) is not None:
        assert head is queue.head() and head.status is Status.WAITING
        assert queue.pop() is head
        taken.append((head.key[0], 0.0, *head.key[2:]))
    assert taken == keys and len(queue) == 0


def test_those_that_left_are_passed_over() -> None:
    queue = WaitingQueue()
    first, second, third = (sequence((0, 0.0, 0.0, number, 0)) for number in range(3))
    for each in (first, second, third):
        queue.push(each)
    leave(queue, first)
    leave(queue, second)
    assert len(queue) == 1 and queue.head() is third
    leave(queue, third)
    assert len(queue) == 0 and queue.head() is None


def test_memory_follows_those_that_wait() -> None:
    queue = WaitingQueue()
    members = [sequence((0, 0.0, 0.0, number, 0)) for number in range(5_000)]
    random.Random(2).shuffle(members)
    for each in members:
        queue.push(each)
    for each in members[100:]:
        leave(queue, each)
    assert len(queue) == 100 and queue.num_held <= 200 + 65
    assert [queue.pop() for _ in range(100) if queue.head()] == sorted(members[:100], key=lambda one: one.key[2:])


def of_tenant(tenant: int, number: int) -> Sequence:
    one = sequence((0, 0.0, 0.0, number, 0))
    one.group.tenant = tenant
    return one


def take(queue: WaitingQueue, shares: Shares, cost: int) -> Sequence:
    head = queue.head()
    assert head is not None and queue.pop() is head
    shares.charge(head.group.tenant, cost)
    return head


def test_tenants_take_turns_by_what_they_were_served() -> None:
    shares = Shares()
    queue = WaitingQueue(shares)
    greedy, modest = shares.enter("greedy"), shares.enter("modest")
    for number in range(6):
        queue.push(of_tenant(greedy, number))
    for number in range(6, 12):
        queue.push(of_tenant(modest, number))
    taken = []
    while len(queue):
        head = take(queue, shares, 30 if queue.head().group.tenant == greedy else 10)  # type: ignore[union-attr]
        taken.append((head.group.tenant, head.key[3]))
    assert [tenant for tenant, _ in taken[:8]].count(modest) == 6, "three of these for one of those"
    for tenant in (greedy, modest):
        numbers = [number for owner, number in taken if owner == tenant]
        assert numbers == sorted(numbers), "each tenant's own come in their order"


def test_a_tenant_saves_up_nothing_while_it_asks_for_nothing() -> None:
    shares = Shares()
    queue = WaitingQueue(shares)
    busy, late = shares.enter("busy"), shares.enter("late")
    for number in range(20):
        queue.push(of_tenant(busy, number))
        take(queue, shares, 100)
    for number in range(20, 40):
        queue.push(of_tenant(busy if number % 2 else late, number))
    owners = [take(queue, shares, 100).group.tenant for _ in range(20)]
    assert 4 <= owners[:10].count(late) <= 6


def test_the_head_follows_what_its_tenant_is_served() -> None:
    shares = Shares()
    queue = WaitingQueue(shares)
    one, other = shares.enter("one"), shares.enter("other")
    first, second = of_tenant(one, 0), of_tenant(other, 1)
    queue.push(first)
    queue.push(second)
    assert queue.head() is first
    shares.charge(one, 1000)
    assert queue.head() is second and queue.pop() is second and queue.head() is first


def test_the_order_of_many_tenants_takes_no_more_memory_than_they_do() -> None:
    shares = Shares()
    queue = WaitingQueue(shares)
    queue.push(of_tenant(shares.enter("stays"), 0))
    for number in range(1, 20_000):
        name = f"tenant{number}"
        one = of_tenant(shares.enter(name), number)
        queue.push(one)
        leave(queue, one)
        shares.leave(name)
    assert queue.num_held <= 200 and len(queue._order) <= 200
    assert len(shares.served) <= 4096 and shares.num_active == 1
