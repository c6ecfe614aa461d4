"""What a failure leaves standing: living ranks keep their process and weights, the dead are replaced."""

import os
import signal
import threading
import time

import pytest
import ray

from cluster.measure import IdleRank, IdleWorker, idle_executor
from engine.errors import ExecutorDied
from engine.step import StepPlan, pack, unpack

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


class PeerWorker(IdleWorker):
    """666: rank 1 raises. 667: rank 0 finds its peer gone, as a collective does. 668: every rank hangs."""

    def submit(self, plan, masks=None):
        ids = unpack(plan.seq_ids).tolist()
        if 666 in ids and self._rank == 1:
            raise RuntimeError("a step that cannot be")
        if 667 in ids and self._rank == 0:
            raise ExecutorDied("rank 0: a collective failed")
        if 667 in ids or 668 in ids:
            threading.Event().wait()
        return super().submit(plan, masks)


class PeerRank(IdleRank):
    def _load(self, meeting, timeout_s):  # noqa: ARG002
        return PeerWorker(self._rank)


def plan_of(ids, epoch=0, step=0):
    return StepPlan(epoch, step, seq_ids=pack(ids), num_tokens=pack([1] * len(ids)), sample_seqs=pack(ids))


def pids(executor):
    return [facts.pid for facts in executor.rank_facts]


def wait_died(executor, timeout_s=10):
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        try:
            executor.check()
        except ExecutorDied as error:
            return error
        time.sleep(0.005)
    raise AssertionError("nothing died")


@pytest.mark.parametrize("channel", ["socket", "actor"])
def test_a_killed_rank_is_replaced_beside_the_living_again_and_again(channel):
    with idle_executor(3, channel, PeerRank) as executor:
        for epoch, victim in enumerate((1, 0, 2), 1):
            before = pids(executor)
            os.kill(before[victim], signal.SIGKILL)
            assert wait_died(executor).ranks == (victim,)
            executor.restart()
            after = pids(executor)
            assert [index for index in range(3) if before[index] != after[index]] == [victim]
            futures = [executor.submit(plan_of([step], epoch, step)) for step in range(5)]
            assert [future.result(20).step for future in futures] == list(range(5))


def test_who_raised_is_replaced_and_who_missed_a_peer_is_not():
    with idle_executor(2, "socket", PeerRank) as executor:
        first = pids(executor)
        with pytest.raises(ExecutorDied, match="cannot be") as raised:
            executor.submit(plan_of([666])).result(20)
        assert raised.value.ranks == (1,)
        executor.restart()
        second = pids(executor)
        assert (second[0], second[1] != first[1]) == (first[0], True)
        with pytest.raises(ExecutorDied, match="collective") as raised:
            executor.submit(plan_of([667], 1)).result(20)
        assert raised.value.ranks == ()
        executor.restart()
        third = pids(executor)
        assert (third[0], third[1] != second[1]) == (second[0], True)
        assert executor.submit(plan_of([1], 2)).result(20).epoch == 2


def test_where_nobody_can_be_blamed_all_are_replaced():
    with idle_executor(2, "socket", PeerRank) as executor:
        before = pids(executor)
        executor.submit(plan_of([668]))
        executor.restart()
        assert not set(before) & set(pids(executor))
        assert executor.submit(plan_of([1], 1)).result(20).epoch == 1
