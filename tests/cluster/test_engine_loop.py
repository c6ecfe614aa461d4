"""The loop puts plans off, on a clock that only the test moves: who comes meanwhile is in the next step."""

import queue
import threading

import pytest

from cluster.engine_loop import EngineLoop
from cluster.inbox import Call
from cluster.messages import Abort, Submit
from cluster.pacer import GATHER_S, LEAD_S, Pacer
from cluster.recovery import RecoveryPolicy
from engine.errors import ExecutorDied
from engine.llm_engine import LLMEngine
from tests.driver_clients import make_request
from tests.fakes import Collected, HashExecutor, engine_config
from tests.hash_model import EOS, VOCAB_SIZE, expected_tokens

STEP_S = 0.02
CLIENT = "client"


class SlowRanks(HashExecutor):
    """Every step takes STEP_S of the test's clock: the test lets its result out then."""

    def __init__(self, config, **changes):
        super().__init__(config, lazy=True, **changes)
        self.submitted = queue.SimpleQueue()

    def _run(self, plan, masks):
        result = super()._run(plan, masks)
        result.device_s = STEP_S
        return result

    def submit(self, plan):
        future = super().submit(plan)
        if not self._dead:
            self.submitted.put(plan)
        return future

    def die(self):
        """Of no step: a rank is gone."""
        self._dead = True
        while self._pending:
            self._pending.popleft()[0].set_exception(ExecutorDied("gone", ranks=(0,)))


class Site:
    """A loop, its ranks, and a clock that stands still."""

    def __init__(self, executor_class=SlowRanks, **changes):
        config = engine_config(**changes)
        self.now_s = 10.0
        self.executor = executor_class(config)
        self.engine = LLMEngine(config, self.executor, vocab_size=VOCAB_SIZE, eos_token_ids=(EOS,))
        self.engine.start()
        self.outputs = Collected()
        self.told = queue.SimpleQueue()
        self.loop = EngineLoop(
            self.engine,
            self.executor,
            self._emit,
            policy=RecoveryPolicy(backoff_s=0.01),
            pacer=Pacer(max_tokens=config.max_num_batched_tokens, max_seqs=config.max_num_seqs),
            clock=lambda: self.now_s,
        )
        self.loop.start()

    def _emit(self, client, outputs):
        assert client == CLIENT
        self.outputs.add(outputs)
        self.told.put(len(outputs))

    def post(self, *requests):
        for request in requests:
            self.loop.post(CLIENT, Submit(request))

    def settle(self):
        """The loop has taken what was posted, and has gone once more round: it waits for what it can wait for."""
        for _ in range(2):
            done = threading.Event()
            self.loop.post(None, Call(done.set))
            assert done.wait(60)

    def go_on(self, seconds):
        self.now_s += seconds
        self.loop.wake()

    def next_plan(self):
        plan = self.executor.submitted.get(timeout=60)
        self.settle()
        return plan

    def no_plan(self):
        self.settle()
        return self.executor.submitted.empty()

    def end_step(self, after_s=STEP_S):
        self.now_s += after_s
        self.executor.release()
        self.settle()

    def run_to_end(self, num_samples):
        self.go_on(1.0)
        self.executor.thaw()
        while len(self.outputs.reasons) < num_samples:
            self.told.get(timeout=60)
            self.go_on(1.0)
        self.settle()
        assert self.engine.stats().used_blocks == 0


@pytest.fixture
def make_site():
    sites = []

    def make(*args, **changes):
        sites.append(Site(*args, **changes))
        return sites[-1]

    yield make
    for site in sites:
        site.loop.stop()
        assert not site.loop._thread.is_alive()
        site.engine.shutdown()


def names(plan):
    return [new.request_id for new in plan.new]


def endless(name, **params):
    return make_request(name, max_tokens=40, ignore_eos=True, **params)


def pace(site):
    """Let one request run until the loop knows what a step of its kind takes; such a step has just begun, alone."""
    site.post(endless("first"))
    site.settle()
    site.go_on(GATHER_S)
    assert names(site.next_plan()) == ["first"]
    site.next_plan()  # at once: nothing is known
    site.end_step()
    site.next_plan()  # again: a step of decodes alone was not seen
    site.end_step()
    assert site.no_plan()
    assert site.engine.num_in_flight == 1


def test_a_burst_is_in_one_step(make_site):
    site = make_site()
    requests = [endless(f"r{number}") for number in range(5)]
    site.post(*requests[:2])
    assert site.no_plan()
    assert not site.loop.health().idle
    site.go_on(GATHER_S)
    site.post(*requests[2:])
    assert site.no_plan()
    site.go_on(1.0)
    assert names(site.next_plan()) == ["r0", "r1", "r2", "r3", "r4"]
    site.run_to_end(5)
    for request in requests:
        assert [(site.outputs.tokens[request.request_id, 0], "length")] == expected_tokens(request, 64)


def test_a_burst_that_fills_the_seats_waits_no_more(make_site):
    site = make_site(max_num_seqs=3)
    site.post(endless("a"), endless("b"))
    assert site.no_plan()
    site.post(endless("c"))
    assert names(site.next_plan()) == ["a", "b", "c"]


def test_who_comes_while_a_step_runs_is_in_the_very_next(make_site):
    site = make_site()
    pace(site)
    site.go_on(STEP_S - LEAD_S - 0.001)
    site.post(endless("late"))
    assert site.no_plan()
    site.go_on(0.001)
    assert names(site.next_plan()) == ["late"]
    site.run_to_end(2)


def test_a_step_that_ends_early_is_followed_at_once(make_site):
    site = make_site()
    pace(site)
    site.end_step(0.001)
    assert site.executor.submitted.get(timeout=60)


def test_an_abort_during_the_wait_leaves_nothing(make_site):
    site = make_site()
    site.post(endless("gone"))
    assert site.no_plan()
    site.loop.post(CLIENT, Abort("gone"))
    site.go_on(1.0)
    assert site.no_plan()
    assert site.loop.health().idle
    pace(site)
    site.post(endless("gone too"))
    site.loop.post(CLIENT, Abort("gone too"))
    site.loop.post(CLIENT, Abort("first"))
    assert site.no_plan()
    site.end_step()
    assert site.no_plan()
    assert site.engine.num_in_flight == 0
    assert site.loop.health().idle
    assert site.engine.stats().used_blocks == 0
    assert not site.engine.has_unfinished
    assert not site.outputs.reasons


@pytest.mark.parametrize("mid_step", [False, True])
def test_a_death_during_the_wait_is_recovered_from(make_site, mid_step):
    site = make_site()
    if mid_step:
        pace(site)
    requests = [endless("a"), endless("b")]
    site.post(*requests)
    assert site.no_plan()
    site.executor.die()
    site.loop.look()
    again = site.next_plan()  # those who were there do not wait for others again
    assert (again.epoch, names(again)) == (1, ["first", "a", "b"] if mid_step else ["a", "b"])
    site.run_to_end(2 + mid_step)
    for request in requests:
        assert [(site.outputs.tokens[request.request_id, 0], "length")] == expected_tokens(request, 64)


def test_steps_bound_by_a_search_go_on_as_before(make_site):
    site = make_site()
    pace(site)
    site.post(make_request("beams", use_beam_search=True, n=2, temperature=0, max_tokens=10))
    assert site.no_plan()
    site.run_to_end(3)
    assert set(site.outputs.reasons.values()) <= {"length", "stop"}


@pytest.mark.parametrize("mid_step", [False, True])
def test_stop_ends_the_wait_at_once(make_site, mid_step):
    site = make_site()
    if mid_step:
        pace(site)
    site.post(endless("waits"))
    assert site.no_plan()
    site.loop.stop()
    assert not site.loop._thread.is_alive()
    assert site.outputs.reasons == {("waits", 0): "error"} | ({("first", 0): "error"} if mid_step else {})
