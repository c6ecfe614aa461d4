import socket
import threading
import time

import pytest

from cluster.framing import Connection
from cluster.rank_loop import FAULT, RESULT, RankLoop, decode_fault
from cluster.step_channel import QueueLink
from engine.parallel.communicator import Solo
from engine.sampling_params import SamplingParams
from engine.step import NewSequence, StepPlan, StepResult, decode_plan, decode_result, encode, pack, unpack
from engine.worker.backend import CpuBackend
from engine.worker.recordings import Recordings
from engine.worker.worker import Worker
from tests.checkpoints import make_checkpoint
from tests.ranks import resolved


class GateStep:
    """A step that is done when its gate opens."""

    def __init__(self, plan, gate, rank, error=None):
        self.plan, self.gate, self.rank, self.error = plan, gate, rank, error

    @property
    def done(self):
        return self.gate.is_set()

    def wait(self):
        self.gate.wait()
        if self.error:
            raise self.error
        return StepResult(self.plan.epoch, self.plan.step, self.plan.seq_ids) if self.rank == 0 else None


class GateWorker:
    """A device whose steps end when the test says so."""

    def __init__(self, rank=0, open_gates=False):
        self.rank, self.open_gates = rank, open_gates
        self.epochs, self.plans, self.gates = [], [], []
        self.submit_errors, self.wait_errors = {}, {}
        self.submitted = threading.Semaphore(0)

    unrecorded = 0

    def await_plan(self, receive):
        return receive(None)

    def reset(self, epoch):
        self.epochs.append(epoch)

    def submit(self, plan, masks=None):  # noqa: ARG002
        if plan.step in self.submit_errors:
            raise self.submit_errors[plan.step]
        gate = threading.Event()
        if self.open_gates:
            gate.set()
        self.plans.append(plan)
        self.gates.append(gate)
        self.submitted.release()
        return GateStep(plan, gate, self.rank, self.wait_errors.get(plan.step))


@pytest.fixture
def run():
    """Runs a RankLoop in a thread; the link, and a function that joins it for its reason."""
    links = []

    def start(worker):
        link, reasons = QueueLink(), []
        loop = RankLoop(worker, link, worker.rank)
        thread = threading.Thread(target=lambda: reasons.append(loop.run()), daemon=True)
        thread.start()
        links.append(link)

        def join():
            thread.join(60)
            assert not thread.is_alive()
            return reasons[0]

        return link, loop, join

    yield start
    for link in links:
        link.close()


def result_of(answer):
    assert answer[:1] == RESULT
    return decode_result(answer[1:])


def test_answers_come_in_order(run):
    worker = GateWorker(open_gates=True)
    link, loop, join = run(worker)
    for step in range(100):
        link.push_plan(encode(StepPlan(3, step, seq_ids=bytes([step, 0, 0, 0]))))
    results = [result_of(link.take_answer()) for _ in range(100)]
    assert [(r.epoch, r.step, r.token_ids[0]) for r in results] == [(3, step, step) for step in range(100)]
    assert worker.epochs == [3]
    link.push_plan(None)
    assert join() == "the link was closed"
    assert (loop.progress.submitted, loop.progress.done, loop.progress.busy_s) == (100, 100, 0.0)


def test_the_next_plan_is_on_the_device_before_the_first_is_done(run):
    worker = GateWorker()
    link, loop, join = run(worker)
    for step in range(3):
        link.push_plan(encode(StepPlan(0, step)))
    for _ in range(3):
        assert worker.submitted.acquire(timeout=60)
    assert loop.progress.done == 0
    assert loop.progress.busy_s > 0
    worker.gates[2].set()
    worker.gates[0].set()
    assert result_of(link.take_answer()).step == 0
    worker.gates[1].set()
    assert [result_of(link.take_answer()).step for _ in range(2)] == [1, 2]
    link.push_plan(None)
    join()


def test_other_ranks_answer_nothing(run):
    worker = GateWorker(rank=1, open_gates=True)
    link, loop, join = run(worker)
    for step in range(5):
        link.push_plan(encode(StepPlan(0, step)))
    link.push_plan(None)
    join()
    assert loop.progress.done == 5
    link.close()
    assert link.take_answer() is None


@pytest.mark.parametrize("where", ["submit_errors", "wait_errors"])
def test_a_failing_step_is_told_with_its_trace(run, where):
    worker = GateWorker(open_gates=where == "submit_errors")
    getattr(worker, where)[1] = RuntimeError("no such block")
    link, _, join = run(worker)
    for step in range(2):
        link.push_plan(encode(StepPlan(0, step)))
    if where == "wait_errors":
        for _ in range(2):
            assert worker.submitted.acquire(timeout=60)
        for gate in worker.gates:
            gate.set()
    assert result_of(link.take_answer()).step == 0
    answer = link.take_answer()
    assert answer[:1] == FAULT
    fault = decode_fault(answer[1:])
    assert (fault.step, fault.error) == (1, "RuntimeError: no such block")
    assert "no such block" in fault.trace
    link.push_plan(None)
    join()


def test_a_gap_in_the_plans_is_a_fault(run):
    worker = GateWorker(open_gates=True)
    link, _, join = run(worker)
    link.push_plan(encode(StepPlan(0, 0)))
    link.push_plan(encode(StepPlan(0, 2)))
    assert result_of(link.take_answer()).step == 0
    assert "plan 0:2 at 0:1" in decode_fault(link.take_answer()[1:]).error
    assert "plan 0:2 at 0:1" in join()


def plan_bytes(step):
    """A prompt, then a token a step."""
    one = {"seq_ids": pack([0]), "sample_seqs": pack([0]), "sample_entries": pack([0])}
    if step:
        return encode(StepPlan(0, step, num_tokens=pack([1]), num_decodes=1, block_counts=pack([0]), **one))
    new = NewSequence(0, "r0", pack([5, 7, 9]), 3, 0, b"", SamplingParams(temperature=0.0), 0)
    return encode(StepPlan(0, 0, new=[new], num_tokens=pack([3]), block_counts=pack([1]), block_ids=pack([7]), **one))


@pytest.fixture(params=["socket", "queue"])
def ends(request):
    """A link; how its driver sends a plan, ends it, and takes an answer."""
    if request.param == "queue":
        link = QueueLink()
        yield link, link.push_plan, lambda: link.push_plan(None), link.take_answer
    else:
        link, driver = map(Connection, socket.socketpair())
        yield link, driver.send, driver.close, driver.receive
        driver.close()
    link.close()


@pytest.mark.parametrize("graphs", [False, True])
def test_graphs_are_recorded_while_no_plan_comes(tmp_path, monkeypatch, ends, graphs):
    """And between the steps of a sequence; the rank says that it is at work, and what comes is served."""
    make_checkpoint(tmp_path)
    go, entered = threading.Semaphore(0), threading.Semaphore(0)
    record_next = Recordings.record_next

    def held(recordings):
        entered.release()
        while not go.acquire(blocking=False):
            pass  # a recording keeps its thread busy
        return record_next(recordings)

    monkeypatch.setattr(CpuBackend, "graphs", graphs)
    monkeypatch.setattr(Recordings, "record_next", held)
    worker = Worker(*resolved(tmp_path), 0, Solo())
    worker.load()
    worker.allocate(worker.measure())
    total = worker.unrecorded
    assert (total > 10) == graphs
    link, send, end, take = ends
    loop, reasons = RankLoop(worker, link, 0), []
    thread = threading.Thread(target=lambda: reasons.append(loop.run()), daemon=True)
    thread.start()
    tokens = []
    for step in range(8):
        if graphs:
            assert entered.acquire(timeout=60)
            progress = loop.progress
            assert (progress.submitted, progress.done, progress.busy_s) == (step, step, 0.0)
            assert progress.unrecorded == total - step
            deadline_s = time.monotonic() + 60
            while not loop.progress.preparing:  # at times the thread waits for the interpreter
                assert time.monotonic() < deadline_s
        send(plan_bytes(step))
        go.release()
        tokens += unpack(result_of(take()).token_ids).tolist()
    for _ in range(total - 8):
        assert entered.acquire(timeout=60)
        go.release()
    end()
    thread.join(60)
    assert reasons == ["the link was closed"]
    assert loop.progress.unrecorded == 0 and not loop.progress.preparing
    worker.close()
    monkeypatch.setattr(CpuBackend, "graphs", False)
    plain = Worker(*resolved(tmp_path), 0, Solo())
    plain.load()
    plain.allocate(plain.measure())
    wanted = [plain.submit(decode_plan(plan_bytes(step))).wait() for step in range(8)]
    assert tokens == [unpack(result.token_ids)[0] for result in wanted]
    plain.close()
