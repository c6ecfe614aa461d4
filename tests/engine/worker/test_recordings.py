"""Graphs recorded while no plan comes: when, how many, and that no step is any different for it.

On a CPU recording is a run of the step over padding rows, with the same effects on what the host and the device hold.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine.sampling_params import SamplingParams
from engine.step import StepResult
from engine.worker.backend import CpuBackend
from engine.worker.cuda_graphs import graph_sizes
from engine.worker.mixed_graphs import token_sizes
from engine.worker.recorder import Recorder, Recording
from engine.worker.recordings import IDLE_S, Recordings
from engine.worker.worker import Worker
from tests.ranks import GREEDY, Ranks

PROMPTS = [[5, 7, 9], [11] * 16, list(range(20, 61)), [3], [8, 9] * 7]
PARAMS = [
    GREEDY,
    SamplingParams(temperature=0.9),
    SamplingParams(temperature=1.1, top_k=7, top_p=0.8, logprobs=2),
    SamplingParams(temperature=0.8, min_tokens=6, presence_penalty=0.7),
    GREEDY,
]
SETTINGS = {"max_num_seqs": 6, "max_num_batched_tokens": 100}
NUM_GRAPHS = len(token_sizes(100)) + 4 * len(graph_sizes(6))


@pytest.fixture
def ranks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    """One rank that records."""
    monkeypatch.setattr(CpuBackend, "graphs", True)
    with Ranks(folder, **SETTINGS) as made:
        yield made


def wait(times: int) -> tuple[Callable[[float | None], str], list[float | None]]:
    """A way to receive a plan that comes after so many waits, and how long each was."""
    waits: list[float | None] = []

    def receive(timeout_s: float | None) -> str:
        waits.append(timeout_s)
        if timeout_s is not None and len(waits) <= times:
            raise TimeoutError
        return "plan"

    return receive, waits


def always() -> bool:
    return True


def idle(worker: Worker, times: int) -> int:
    """Let the worker wait for a plan; how many graphs are left."""
    receive, _ = wait(times)
    assert worker.await_plan(receive) == "plan"
    return worker.unrecorded


def numbered(count: int, recorded: list[int]) -> Recordings:
    return Recordings(Recording(str(index), lambda index=index: recorded.append(index)) for index in range(count))  # type: ignore[misc]


def test_one_graph_is_recorded_at_a_time_and_a_plan_looked_for_in_between() -> None:
    recorded: list[int] = []
    receive, waits = wait(3)
    assert numbered(9, recorded).record_while_waiting(receive, always, always) == "plan"
    assert recorded == [0, 1, 2]
    assert waits == [IDLE_S, 0, 0, 0]


def test_once_nothing_is_left_nobody_wakes_up() -> None:
    recorded: list[int] = []
    left = numbered(2, recorded)
    for expected in ([IDLE_S, 0, None], [None]):
        receive, waits = wait(100)
        assert left.record_while_waiting(receive, always, always) == "plan"
        assert waits == expected
    assert recorded == [0, 1] and not left.record_next()


def test_nothing_is_recorded_while_a_step_is_under_way() -> None:
    """Nor when it ended after the wait had begun: its successor is being planned."""
    recorded: list[int] = []
    receive, waits = wait(3)
    states = iter([False, False, True, True])
    assert numbered(9, recorded).record_while_waiting(receive, lambda: next(states), always) == "plan"
    assert recorded == [0]
    assert waits == [IDLE_S, IDLE_S, IDLE_S, 0]


def test_what_fails_is_logged_once_and_left_to_the_steps(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise MemoryError("no room")

    left = Recordings([Recording("64 decodes", fail), Recording("32 decodes", fail)])
    receive, waits = wait(100)
    with caplog.at_level(logging.WARNING):
        assert left.record_while_waiting(receive, always, always) == "plan"
    assert waits == [IDLE_S, None] and not left
    (record,) = caplog.records
    assert "64 decodes" in record.getMessage() and "MemoryError: no room" in record.getMessage() and record.exc_info


def test_memory_for_the_largest_step_is_left(caplog: pytest.LogCaptureFixture) -> None:
    recorded: list[int] = []
    left = numbered(5, recorded)
    receive, waits = wait(100)
    with caplog.at_level(logging.WARNING):
        assert left.record_while_waiting(receive, always, lambda: len(recorded) < 2) == "plan"
    assert recorded == [0, 1] and waits == [IDLE_S, 0, 0, None] and not left
    assert "the largest step" in caplog.text


def test_a_start_records_for_a_while_only() -> None:
    recorded: list[int] = []
    left = numbered(3, recorded)
    left.record_for(0.0)
    assert recorded == []
    left.record_for(float("inf"))
    assert recorded == [0, 1, 2] and not left


def test_every_graph_of_a_rank_is_recorded(ranks: Ranks) -> None:
    (worker,) = ranks.workers
    assert worker.unrecorded == NUM_GRAPHS
    assert idle(worker, 3) == NUM_GRAPHS - 3
    assert idle(worker, 10_000) == 0
    recorded: list[object] = []
    original = Recorder.record
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "record", lambda *args: recorded.append(args) or original(*args))
        ranks.generate(PROMPTS, PARAMS, num_tokens=9, chunk=10)
        assert not recorded, "a step found a graph missing"


@pytest.mark.parametrize("at_once", [1, 3])
def test_steps_after_a_recording_go_on_as_they_would_have(ranks: Ranks, folder: Path, at_once: int) -> None:
    """Between every two steps, while sequences live that the next step goes on with."""
    (worker,) = ranks.workers
    step = ranks.step
    left: list[int] = []

    def step_after_recording(*args: object, **kwargs: object) -> StepResult:
        left.append(idle(worker, at_once))
        return step(*args, **kwargs)  # type: ignore[arg-type]

    ranks.step = step_after_recording  # type: ignore[method-assign]
    with Ranks(folder, **SETTINGS) as plain:
        results: tuple[list[StepResult], list[StepResult]] = ([], [])
        tokens = [
            made.generate(PROMPTS, PARAMS, num_tokens=24, chunk=7, results=kept)
            for made, kept in zip((ranks, plain), results, strict=True)
        ]
    assert tokens[0] == tokens[1]
    assert [result.logprobs for result in results[0]] == [result.logprobs for result in results[1]]
    steps = min(len(left), -(-NUM_GRAPHS // at_once))
    assert left[:steps] == [max(0, NUM_GRAPHS - at_once * (index + 1)) for index in range(steps)]


def test_a_step_tries_again_what_could_not_be_recorded(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    (worker,) = ranks.workers
    original = Recorder.record

    def fail(*_: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(Recorder, "record", fail)
    assert idle(worker, 5) == 0
    ranks.add(1, PROMPTS[0])
    with pytest.raises(MemoryError):
        ranks.step([(1, 3)])
    monkeypatch.setattr(Recorder, "record", original)
    ranks.restart()
    assert len(ranks.generate(PROMPTS, PARAMS)) == len(PROMPTS)


def test_several_ranks_and_ranks_without_graphs_have_nothing_to_record(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Ranks(folder, **SETTINGS) as plain:
        monkeypatch.setattr(CpuBackend, "graphs", True)
        with Ranks(folder, **SETTINGS, tensor_parallel_size=2) as two:
            for worker in (*plain.workers, *two.workers):
                receive, waits = wait(100)
                assert worker.unrecorded == 0 and worker.await_plan(receive) == "plan"
                assert waits == [None]
