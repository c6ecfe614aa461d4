"""LocalExecutor keeps the Executor's promises: order, depth, faults, restarts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine.errors import ConfigError, ExecutorDied, ModelLoadError
from engine.local_executor import LocalExecutor
from engine.sampling_params import SamplingParams
from engine.step import NewSequence, StepPlan, pack, unpack
from engine.worker.backend import CpuBackend, DoneStep
from engine.worker.recordings import Recordings
from tests.checkpoints import make_checkpoint
from tests.ranks import Ranks, resolved

PROMPT = [5, 7, 9, 11]
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama3")
    make_checkpoint(path)
    return path


@pytest.fixture
def executor(folder: Path) -> Iterator[LocalExecutor]:
    made = LocalExecutor(*resolved(folder))
    capacity = made.start()
    assert (capacity.num_blocks, capacity.block_size, capacity.num_host_blocks) == (64, 16, 0)
    yield made
    made.shutdown()


def plans(epoch: int, count: int) -> list[StepPlan]:
    """A prompt, then one token a step."""
    new = NewSequence(0, "r0", pack(PROMPT), len(PROMPT), 0, b"", GREEDY, 0)
    one = {"seq_ids": pack([0]), "sample_seqs": pack([0]), "sample_entries": pack([0])}
    first = StepPlan(epoch, 0, new=[new], num_tokens=pack([4]), block_counts=pack([1]), block_ids=pack([7]), **one)
    return [first] + [
        StepPlan(epoch, step, num_tokens=pack([1]), num_decodes=1, block_counts=pack([0]), **one)
        for step in range(1, count)
    ]


def tokens(executor: LocalExecutor, epoch: int, count: int = 8) -> list[int]:
    """All plans submitted before any is read."""
    futures = [executor.submit(plan) for plan in plans(epoch, count)]
    results = [future.result(timeout=250) for future in futures]
    assert [(result.epoch, result.step) for result in results] == [(epoch, step) for step in range(count)]
    return [int(unpack(result.token_ids)[0]) for result in results]


def test_steps_in_flight_feed_each_other(executor: LocalExecutor, folder: Path) -> None:
    with Ranks(folder) as ranks:
        assert tokens(executor, 0) == ranks.generate([PROMPT], num_tokens=8)[0]
    executor.check()


def test_a_fault_fails_all_that_follows_until_a_restart(executor: LocalExecutor) -> None:
    wanted = tokens(executor, 0)
    bad = executor.submit(StepPlan(0, 8, seq_ids=pack([5]), num_tokens=pack([1]), block_counts=pack([0])))
    later = executor.submit(StepPlan(0, 9))
    for future in (bad, later):
        with pytest.raises(ExecutorDied, match="sequence 5"):
            future.result(timeout=250)
    with pytest.raises(ExecutorDied, match="sequence 5"):
        executor.check()
    assert executor.restart().num_blocks == 64
    executor.check()
    assert tokens(executor, 1) == wanted


def test_an_unexpected_error_is_told_with_its_cause(executor: LocalExecutor) -> None:
    plan = plans(0, 1)[0]
    plan.sample_entries = pack([3])
    error = executor.submit(plan).exception(timeout=250)
    assert isinstance(error, ExecutorDied) and error.ranks == (0,) and isinstance(error.__cause__, IndexError)


def test_a_device_that_is_lost_while_it_is_asked_fails_the_step(
    executor: LocalExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(_: DoneStep) -> bool:
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(DoneStep, "done", property(lost))
    with pytest.raises(ExecutorDied, match="the device is lost"):
        executor.submit(plans(0, 1)[0]).result(timeout=250)
    monkeypatch.undo()
    executor.restart()
    assert len(tokens(executor, 1)) == 8, "the thread that runs plans goes on"


def test_plans_of_an_older_epoch_are_refused(executor: LocalExecutor) -> None:
    executor.restart()
    with pytest.raises(ExecutorDied, match="of epoch 0"):
        executor.submit(plans(0, 1)[0]).result(timeout=250)


def test_shutdown_ends_it(folder: Path) -> None:
    executor = LocalExecutor(*resolved(folder))
    executor.start()
    executor.shutdown()
    executor.shutdown()
    with pytest.raises(ExecutorDied):
        executor.submit(StepPlan(0, 0)).result(timeout=250)
    with pytest.raises(ExecutorDied, match="shut down"):
        executor.check()


def test_shutdown_before_the_start(folder: Path) -> None:
    before = set(threading.enumerate())
    LocalExecutor(*resolved(folder)).shutdown()
    assert set(threading.enumerate()) <= before


def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    executor = LocalExecutor(*resolved(tmp_path))
    with pytest.raises(ModelLoadError):
        executor.start()
    executor.shutdown()


def test_it_is_one_rank(folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        LocalExecutor(*resolved(folder, tensor_parallel_size=2))
    assert caught.value.key == "tensor_parallel_size"


class Gate:
    """Lets the graphs of a rank that records on a CPU be recorded when the test says so."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._entered, self._permits = threading.Semaphore(0), threading.Semaphore(0)
        self.recorded = 0
        record_next = Recordings.record_next

        def held(recordings: Recordings) -> bool:
            self._entered.release()
            assert self._permits.acquire(timeout=250)
            left = record_next(recordings)
            self.recorded += 1
            return left

        patch.setattr(CpuBackend, "graphs", True)
        patch.setattr(Recordings, "record_next", held)

    def wait(self) -> None:
        """Until a recording is under way."""
        assert self._entered.acquire(timeout=250)

    def let(self, count: int) -> None:
        """Let so many go on."""
        self._permits.release(count)


def during(gate: Gate, executor: LocalExecutor, end: Callable[[], object]) -> None:
    """Call `end` in the middle of a recording, which is let go on once its thread is told to end."""
    thread = threading.Thread(target=end)
    thread.start()
    while executor._plans.empty():
        assert thread.is_alive()
    gate.let(1)
    thread.join(250)
    assert not thread.is_alive()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def test_a_plan_waits_for_one_recording_at_most(executor: LocalExecutor, folder: Path, gate: Gate) -> None:
    wanted = tokens(executor, 0)
    recording = LocalExecutor(*resolved(folder))
    recording.start()
    total = recording.unrecorded
    assert total > 10
    gate.wait()
    futures = [recording.submit(plan) for plan in plans(0, 4)]
    gate.let(1)
    found = [int(unpack(future.result(timeout=250).token_ids)[0]) for future in futures]
    assert gate.recorded == 1 and recording.unrecorded == total - 1
    gate.wait()  # in the middle of the sequence
    gate.let(1)
    gate.wait()
    futures = [recording.submit(plan) for plan in plans(0, 8)[4:]]
    gate.let(1)
    found += [int(unpack(future.result(timeout=250).token_ids)[0]) for future in futures]
    assert found == wanted and gate.recorded == 3
    gate.let(1000)
    for _ in range(total - 3):
        gate.wait()
    recording.shutdown()
    assert gate.recorded == total and recording.unrecorded == 0


def test_a_shutdown_waits_for_one_recording_at_most(folder: Path, gate: Gate) -> None:
    executor = LocalExecutor(*resolved(folder))
    executor.start()
    gate.wait()
    during(gate, executor, executor.shutdown)
    assert gate.recorded == 1


def test_a_restart_goes_on_recording(executor: LocalExecutor, folder: Path, gate: Gate) -> None:
    wanted = tokens(executor, 0)
    recording = LocalExecutor(*resolved(folder))
    recording.start()
    total = recording.unrecorded
    gate.wait()
    during(gate, recording, recording.restart)
    assert gate.recorded == 1
    gate.let(1000)
    assert tokens(recording, 1) == wanted
    for _ in range(total - 1):
        gate.wait()
    recording.shutdown()
    assert gate.recorded == total
