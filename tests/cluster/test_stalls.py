"""Ranks over Gloo that live and answer, and are stuck in a collective all the same; and some that only take long."""

import threading
import time

import pytest

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


class Steps:
    """Has the executor run steps, and checks it as the engine's loop does."""

    def __init__(self, executor):
        self.executor, self._epoch = executor, 0
        self.number = 0
        """Of the next step in its epoch."""

    def run(self, sequence, tokens=1, timeout_s=200):
        """One step, done or failed, and how long it took."""
        ids = pack([sequence])
        plan = StepPlan(self._epoch, self.number, seq_ids=ids, num_tokens=pack([tokens]), sample_seqs=ids)
        self.number += 1
        began_s = time.monotonic()
        future = self.executor.submit(plan)
        while not future.done():
            assert time.monotonic() - began_s < timeout_s
            try:
                self.executor.check()
            except ExecutorDied:
                assert future.done()
            threading.Event().wait(0.05)
        return future, time.monotonic() - began_s

    def run_short(self, count):
        for _ in range(count):
            self.run(1)[0].result(0)

    def restart(self):
        """Replace who must be; which ranks were."""
        before = self._pids()
        self.executor.restart()
        self._epoch, self.number = self._epoch + 1, 0
        return {rank for rank, (old, new) in enumerate(zip(before, self._pids())) if old != new}

    def _pids(self):
        return [facts.pid for facts in self.executor.rank_facts]


@pytest.fixture(scope="module")
def steps(ray_job):  # noqa: ARG001
    with idle_executor(2, "socket", MeetingRank) as executor:
        yield Steps(executor)


# The very first step too: nothing was measured yet.
@pytest.mark.parametrize(("before", "fault", "replaced"), [(0, INSIDE, {0, 1}), (20, BEFORE, {1})])
def test_a_collective_that_hangs_is_found_in_seconds_by_what_its_ranks_say(steps, before, fault, replaced):
    steps.run_short(before)
    future, took_s = steps.run(fault)
    with pytest.raises(ExecutorDied, match="is stuck: no rank has done anything") as raised:
        future.result(0)
    assert set(raised.value.ranks) == replaced
    assert took_s < FOUND_WITHIN_S
    assert steps.restart() == replaced


def test_a_long_step_after_short_ones_is_no_false_alarm(steps):
    steps.run_short(50)
    future, took_s = steps.run(LONG, tokens=8192)
    assert future.result(0).step == steps.number - 1
    assert took_s >= LONG_S
