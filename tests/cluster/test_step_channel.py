"""Both channels keep the same promises, over real actors."""

import os
import re
import signal
import threading
import time

import pytest

from cluster.measure import IdleRank, IdleWorker, decode_plan, idle_executor, measure_dispatch
from cluster.processes import is_ray_worker
from cluster.rank import ANSWER_TIMEOUT_S
from cluster.step_channel import SocketChannel, SocketLink
from engine.errors import ExecutorDied
from engine.sampling_params import SamplingParams
from engine.step import NewSequence, StepPlan, pack, unpack

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_job")]


@pytest.fixture(params=["socket", "actor"])
def channel(request):
    return request.param


class OddWorker(IdleWorker):
    """Draws the tokens of the plan's new sequences, or else its sequence ids.

    Sequence 666: rank 1 raises. 667: every rank hangs. 668: rank 0 finds its peer gone, as a collective does, and
    rank 1 hangs. 669: each finds the other gone.
    """

    def submit(self, plan, masks=None):
        ids = unpack(plan.seq_ids).tolist()
        if 666 in ids and self._rank == 1:
            raise RuntimeError("a step that cannot be")
        if 669 in ids or (668 in ids and self._rank == 0):
            raise ExecutorDied("rank 0: a collective failed")
        if 667 in ids or 668 in ids:
            threading.Event().wait()
        step = super().submit(plan, masks)
        if step.wait() is not None:
            step.wait().token_ids = b"".join(new.token_ids for new in plan.new) or plan.seq_ids
        return step


class OddRank(IdleRank):
    def _load(self, rank, meeting, timeout_s):  # noqa: ARG002
        return OddWorker(rank)


def plan_of(ids, epoch=0, step=0):
    return StepPlan(epoch, step, seq_ids=pack(ids), num_tokens=pack([1] * len(ids)), sample_seqs=pack(ids))


def wait_died(executor, timeout_s=100):
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        try:
            executor.check()
        except ExecutorDied as error:
            return error
        time.sleep(0.005)
    raise AssertionError("nothing died")


def pids(executor):
    return [facts.pid for facts in executor.rank_facts]


def test_in_order_however_large_and_again_after_a_restart(channel):
    with idle_executor(2, channel, OddRank) as executor:
        before = pids(executor)
        for epoch in (0, 5):
            futures = [executor.submit(plan_of([step, 7], epoch, step)) for step in range(50)]
            results = [future.result(100) for future in futures]
            assert [(r.epoch, r.step) for r in results] == [(epoch, step) for step in range(50)]
            assert [unpack(r.token_ids).tolist() for r in results] == [[step, 7] for step in range(50)]
            tokens = pack(range(3_000_000))
            new = NewSequence(0, "long", tokens, 3_000_000, 0, b"", SamplingParams(), 0)
            big = executor.submit(StepPlan(epoch, 50, new=[new], seq_ids=pack([0]), sample_seqs=pack([0])))
            small = executor.submit(plan_of([1], epoch, 51))
            assert big.result(100).token_ids == tokens
            assert unpack(small.result(100).token_ids).tolist() == [1]
            if epoch == 0:
                executor.restart()
        assert not set(before) & set(pids(executor)), "nobody was to blame: all are replaced"


def kill_while_it_computes(executor, epoch):
    stuck = executor.submit(plan_of([667], epoch, 1))
    os.kill(pids(executor)[0], signal.SIGKILL)
    with pytest.raises(ExecutorDied) as raised:
        stuck.result(100)
    assert raised.value.ranks == (0,)
    with pytest.raises(ExecutorDied):
        executor.check()
    with pytest.raises(ExecutorDied):
        executor.submit(plan_of([1], epoch, 2)).result(0)
    return {0, 1}  # rank 1 does not leave its step


def kill_an_idle_one(executor, epoch):  # noqa: ARG001
    os.kill(pids(executor)[1], signal.SIGKILL)
    assert wait_died(executor).ranks == (1,)
    return {1}


def raise_in_a_step(executor, epoch):
    executor.submit(plan_of([666], epoch, 1))
    error = wait_died(executor)
    assert "a step that cannot be" in str(error)
    assert error.ranks == (1,)
    return {1}


def miss_a_peer(executor, epoch):
    with pytest.raises(ExecutorDied, match="collective") as raised:
        executor.submit(plan_of([668], epoch, 1)).result(100)
    assert raised.value.ranks == ()
    return {1}


def lose_each_other(executor, epoch):
    with pytest.raises(ExecutorDied, match="collective") as raised:
        executor.submit(plan_of([669], epoch, 1)).result(100)
    assert raised.value.ranks == ()
    return set()


def lose_each_other_again(executor, epoch):
    lose_each_other(executor, epoch)
    return {0, 1}


def freeze(executor, epoch):
    pid = pids(executor)[0]
    os.kill(pid, signal.SIGSTOP)
    future = executor.submit(plan_of([1], epoch, 1))
    error = wait_died(executor)
    assert error.ranks == (0,)
    # By the executor's own measure, which a busy machine does not stretch: not because no answer came.
    frozen_s = float(re.search(r"are frozen, ([\d.]+) s into a step", str(error))[1])
    assert frozen_s < ANSWER_TIMEOUT_S / 2
    with pytest.raises(ExecutorDied):
        future.result(0)
    return {0}


def test_failures_are_noticed_and_only_who_must_be_is_replaced(channel):
    with idle_executor(2, channel, OddRank) as executor:
        faults = [kill_an_idle_one, kill_while_it_computes, raise_in_a_step, miss_a_peer, freeze]
        for epoch, fail in enumerate([*faults, lose_each_other, lose_each_other_again]):
            executor.check()
            assert executor.submit(plan_of([9], epoch)).result(100).epoch == epoch
            before = pids(executor)
            replaced = fail(executor, epoch)
            executor.restart()
            after = pids(executor)
            assert {rank for rank in (0, 1) if before[rank] != after[rank]} == replaced, fail.__name__
            assert not any(is_ray_worker(before[rank]) for rank in replaced)
        last = pids(executor)
        stuck = executor.submit(plan_of([667], 7))
        executor.shutdown()
        with pytest.raises(ExecutorDied, match="shut down"):
            stuck.result(0)
        assert not any(is_ray_worker(pid) for pid in last)
        with pytest.raises(ExecutorDied):
            executor.submit(plan_of([1], 7, 1)).result(0)


def test_dispatch_is_measured():
    times = measure_dispatch(1, "socket", num_sequences=50, steps=40)
    assert (times.channel, times.ranks) == ("socket", 1)
    assert 0 < times.median_us <= times.p99_us
    assert times.pipelined_steps_per_s > 0
    assert decode_plan(0, 0, 50).num_decodes == 50


def test_ranks_of_another_node_come_over_tcp():
    class Heard:
        def __init__(self):
            self.answers, self.changed = [], threading.Condition()

        def received(self, rank, payload):
            with self.changed:
                self.answers.append((rank, payload))
                self.changed.notify_all()

        def lost(self, rank, reason):
            self.received(rank, reason)

    heard = Heard()
    steps = SocketChannel(2, heard, node_id="here", node_ip="127.0.0.1")
    tickets = steps.tickets(["here", "there"])
    assert [ticket.address.startswith("unix:") for ticket in tickets] == [True, False]
    links = [SocketLink.open(ticket, rank) for rank, ticket in enumerate(tickets)]
    assert steps.wait_ready(60)
    payload = os.urandom(5 << 20)
    steps.send(payload)
    assert [link.receive() == payload for link in links] == [True, True]
    links[1].send(b"over tcp")
    with heard.changed:
        assert heard.changed.wait_for(lambda: (1, b"over tcp") in heard.answers, 60)
    links[1].close()
    with heard.changed:
        assert heard.changed.wait_for(lambda: (1, "end of stream") in heard.answers, 60)
    steps.close()
    assert links[0].receive() is None
