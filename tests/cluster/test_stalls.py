"""Ranks over Gloo that live and answer, and are stuck in a collective all the same; and some that only take long."""

import threading
import time

import pytest
import ray

from cluster.measure import IdleRank, IdleWorker, idle_executor
from cluster.peers import Peers
from engine.errors import ExecutorDied
from engine.step import StepPlan, pack, unpack

pytestmark = pytest.mark.ray

BEFORE, INSIDE, LONG = 1001, 1002, 1003
LONG_S = 5.0
FOUND_WITHIN_S = 60.0
"""Promised are seconds: three or four where the machine is not busy. Nothing but the ranks' word tells before 300."""


class MeetingWorker(IdleWorker):
    """Every step is one all-reduce. A sequence may ask rank 1 to hang before it or inside, or to compute for long."""

    def __init__(self, rank, peers):
        super().__init__(rank)
        self._peers = peers

    def submit(self, plan, masks=None):
        import torch

        asked = set(unpack(plan.seq_ids).tolist())
        if self._rank == 1 and BEFORE in asked:
            threading.Event().wait()
        if self._rank == 1 and LONG in asked:
            until_s = time.monotonic() + LONG_S
            while time.monotonic() < until_s:
                torch.ones(200, 200) @ torch.ones(200, 200)
        numbers = torch.tensor([float(self._rank == 1 and INSIDE in asked), 1.0])
        assert self._peers.all_reduce(numbers)[1] == 2
        return super().submit(plan, masks)


class HangsInside:
    """A communicator whose all-reduce of a marked tensor never comes back."""

    def __init__(self, communicator):
        self._communicator = communicator

    def all_reduce(self, tensor):
        if tensor[0] == 1:
            threading.Event().wait()
        return self._communicator.all_reduce(tensor)

    def __getattr__(self, name):
        return getattr(self._communicator, name)


class MeetingRank(IdleRank):
    def _load(self, rank, meeting, timeout_s):
        self._peers = Peers(HangsInside(self._connect(rank, meeting, timeout_s)))
        return MeetingWorker(rank, self._peers)


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def plan_of(ids, epoch, step, tokens=1):
    return StepPlan(epoch, step, seq_ids=pack(ids), num_tokens=pack([tokens] * len(ids)), sample_seqs=pack(ids))


def wait_for(executor, future, timeout_s):
    """Check the executor as the engine's loop does; how long until the future is done."""
    began_s = time.monotonic()
    while not future.done():
        assert time.monotonic() - began_s < timeout_s
        try:
            executor.check()
        except ExecutorDied:
            assert future.done()
        threading.Event().wait(0.05)
    return time.monotonic() - began_s


def pids(executor):
    return [facts.pid for facts in executor.rank_facts]


def run(executor, epoch, ids, step, tokens=1, timeout_s=200):
    future = executor.submit(plan_of(ids, epoch, step, tokens))
    return future, wait_for(executor, future, timeout_s)


def test_a_collective_that_hangs_is_found_in_seconds_by_what_its_ranks_say():
    with idle_executor(2, "socket", MeetingRank) as executor:
        # The very first step too: nothing was measured yet.
        for epoch, (fault, replaced) in enumerate([(INSIDE, {0, 1}), (BEFORE, {1})]):
            before = pids(executor)
            for step in range(epoch * 20):
                run(executor, epoch, [1], step)[0].result(0)
            future, took_s = run(executor, epoch, [fault], epoch * 20)
            with pytest.raises(ExecutorDied, match=r"is stuck: no (rank has done anything|progress) for") as raised:
                future.result(0)
            assert set(raised.value.ranks) == replaced
            assert took_s < FOUND_WITHIN_S
            executor.restart()
            after = pids(executor)
            assert {rank for rank in (0, 1) if before[rank] != after[rank]} == replaced
        run(executor, 2, [1], 0)[0].result(0)


def test_a_long_step_after_short_ones_is_no_false_alarm():
    with idle_executor(2, "socket", MeetingRank) as executor:
        for step in range(50):
            run(executor, 0, [1], step)[0].result(0)
        future, took_s = run(executor, 0, [LONG], 50, tokens=8192)
        assert future.result(0).step == 50
        assert took_s >= LONG_S
