"""Both channels keep the same promises, over real actors."""

import os
import signal
import threading
import time

import pytest
import ray

from cluster.measure import IdleRank, IdleWorker, decode_plan, idle_executor, measure_dispatch
from cluster.rank_group import is_ray_worker
from cluster.step_channel import SocketChannel, SocketLink
from engine.errors import ExecutorDied
from engine.sampling_params import SamplingParams
from engine.step import NewSequence, StepPlan, pack, unpack

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(params=["socket", "actor"])
def channel(request):
    return request.param


class OddWorker(IdleWorker):
    """Draws as many tokens as the plan has prompt tokens; raises on sequence 666, sleeps for ever on 667."""

    def submit(self, plan, masks=None):  # noqa: ARG002
        ids = unpack(plan.seq_ids).tolist()
        if 666 in ids:
            raise RuntimeError("a step that cannot be")
        if 667 in ids:
            threading.Event().wait()
        step = super().submit(plan)
        if step.wait() is not None:
            step.wait().token_ids = b"".join(new.token_ids for new in plan.new) or plan.seq_ids
        return step


class OddRank(IdleRank):
    def _load(self, meeting, timeout_s):  # noqa: ARG002
        return OddWorker(self._rank)


def plan_of(ids, epoch=0, step=0):
    return StepPlan(epoch, step, seq_ids=pack(ids), num_tokens=pack([1] * len(ids)), sample_seqs=pack(ids))


def wait_died(executor, timeout_s=10):
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        try:
            executor.check()
        except ExecutorDied as error:
            return error
        time.sleep(0.005)
    raise AssertionError("nothing died")


@pytest.mark.parametrize("ranks", [1, 2])
def test_many_in_flight_and_answered_in_order_and_again_after_a_restart(channel, ranks):
    with idle_executor(ranks, channel, OddRank) as executor:
        for epoch in (0, 5):
            futures = [executor.submit(plan_of([step, 7], epoch, step)) for step in range(50)]
            results = [future.result(20) for future in futures]
            assert [(r.epoch, r.step) for r in results] == [(epoch, step) for step in range(50)]
            assert [unpack(r.token_ids).tolist() for r in results] == [[step, 7] for step in range(50)]
            if epoch == 0:
                executor.restart()


def test_a_prompt_of_many_megabytes(channel):
    tokens = pack(range(3_000_000))
    new = NewSequence(0, "long", tokens, 3_000_000, 0, b"", SamplingParams(), 0)
    with idle_executor(2, channel, OddRank) as executor:
        big = executor.submit(StepPlan(0, 0, new=[new], seq_ids=pack([0]), sample_seqs=pack([0])))
        small = executor.submit(plan_of([1], step=1))
        assert big.result(30).token_ids == tokens
        assert unpack(small.result(30).token_ids).tolist() == [1]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_fails_what_is_in_flight(channel, victim):
    with idle_executor(2, channel, OddRank) as executor:
        executor.submit(plan_of([1])).result(20)
        stuck = executor.submit(plan_of([667], step=1))
        os.kill(executor.rank_facts[victim].pid, signal.SIGKILL)
        with pytest.raises(ExecutorDied) as raised:
            stuck.result(10)
        assert raised.value.ranks == (victim,)
        with pytest.raises(ExecutorDied):
            executor.check()
        with pytest.raises(ExecutorDied):
            executor.submit(plan_of([1], step=2)).result(0)
        executor.restart()
        executor.check()
        assert executor.submit(plan_of([9], epoch=1)).result(20).epoch == 1


def test_an_idle_rank_that_dies_is_noticed(channel):
    with idle_executor(2, channel, OddRank) as executor:
        os.kill(executor.rank_facts[1].pid, signal.SIGKILL)
        assert wait_died(executor).ranks == (1,)


def test_a_raising_step_names_the_error(channel):
    with idle_executor(2, channel, OddRank) as executor:
        with pytest.raises(ExecutorDied, match="a step that cannot be"):
            executor.submit(plan_of([666])).result(20)
        executor.restart()
        executor.submit(plan_of([1], epoch=1)).result(20)


def test_a_frozen_rank_is_noticed_by_its_silence(channel):
    with idle_executor(2, channel, OddRank) as executor:
        for step in range(20):
            executor.submit(plan_of([1], step=step)).result(20)
        pid = executor.rank_facts[0].pid
        os.kill(pid, signal.SIGSTOP)
        began_s = time.monotonic()
        future = executor.submit(plan_of([1], step=20))
        assert wait_died(executor).ranks == (0,)
        assert time.monotonic() - began_s < 6
        with pytest.raises(ExecutorDied):
            future.result(0)
        executor.restart()
        assert not is_ray_worker(pid)
        executor.submit(plan_of([1], epoch=1)).result(20)


def test_shutdown_ends_the_ranks_and_what_is_in_flight(channel):
    with idle_executor(2, channel, OddRank) as executor:
        pids = [facts.pid for facts in executor.rank_facts]
        stuck = executor.submit(plan_of([667]))
        began_s = time.monotonic()
        executor.shutdown()
        assert time.monotonic() - began_s < 8
        with pytest.raises(ExecutorDied, match="shut down"):
            stuck.result(0)
        assert not [pid for pid in pids if is_ray_worker(pid)]
        with pytest.raises(ExecutorDied):
            executor.submit(plan_of([1])).result(0)


def test_dispatch_is_measured(channel):
    times = measure_dispatch(2, channel, num_sequences=50, steps=40)
    assert times.channel == channel
    assert 0 < times.median_us <= times.p99_us < 1e6
    assert times.pipelined_steps_per_s > 1
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
    assert [ticket.is_local for ticket in tickets] == [True, False]
    links = [SocketLink.open(ticket, rank) for rank, ticket in enumerate(tickets)]
    assert steps.wait_ready(5)
    payload = os.urandom(5 << 20)
    steps.send(payload)
    assert [link.receive() == payload for link in links] == [True, True]
    links[1].send(b"over tcp")
    with heard.changed:
        assert heard.changed.wait_for(lambda: (1, b"over tcp") in heard.answers, 5)
    links[1].close()
    with heard.changed:
        assert heard.changed.wait_for(lambda: (1, "end of stream") in heard.answers, 5)
    steps.close()
    assert links[0].receive() is None
