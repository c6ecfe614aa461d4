"""What a step costs before anything is computed: plans through real actors and a real channel to idle ranks."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import msgspec

from cluster.ray_executor import RayExecutor
from cluster.worker_actor import MantaWorker, RankWorker
from engine.config import EngineConfig
from engine.executor import CacheCapacity
from engine.step import StepMasks, StepPlan, StepResult, pack

Received = TypeVar("Received")


class IdleStep:
    """A step that was over at once."""

    done = True

    def __init__(self, result: StepResult | None) -> None:
        self._result = result

    def wait(self) -> StepResult | None:
        return self._result


class IdleWorker:
    """A Worker that computes nothing: every sequence draws token 0. A step takes `step_s` seconds."""

    def __init__(self, rank: int, step_s: float = 0.0) -> None:
        self._rank, self._step_s = rank, step_s

    def measure(self) -> CacheCapacity:
        return CacheCapacity(num_blocks=1024, block_size=16)

    def allocate(self, capacity: CacheCapacity) -> None:
        pass

    unrecorded = 0

    def await_plan(self, receive: Callable[[float | None], Received]) -> Received:
        return receive(None)

    def reset(self, epoch: int) -> None:
        pass

    def submit(self, plan: StepPlan, masks: Callable[[], StepMasks] | None = None) -> IdleStep:  # noqa: ARG002
        if self._step_s:
            time.sleep(self._step_s)
        token_ids = bytes(len(plan.sample_seqs))
        return IdleStep(StepResult(plan.epoch, plan.step, token_ids) if self._rank == 0 else None)

    def close(self) -> None:
        pass


class IdleRank(MantaWorker):
    """A rank without a model."""

    def _import_ahead(self) -> None:
        pass

    def _load(self, rank: int, meeting: str, timeout_s: float) -> RankWorker:  # noqa: ARG002
        return IdleWorker(rank)


class DispatchTimes(msgspec.Struct, frozen=True):
    """Step dispatch: submit to answer, nothing computed."""

    channel: str
    ranks: int
    payload_bytes: int
    median_us: float
    p99_us: float
    pipelined_steps_per_s: float
    """With two steps in flight."""


@contextmanager
def idle_executor(
    ranks: int = 1, channel: Literal["socket", "actor"] = "socket", worker_class: type[MantaWorker] = IdleRank
) -> Iterator[RayExecutor]:
    """A started RayExecutor over ranks that compute nothing. Starts a local Ray if none runs."""
    config = EngineConfig.from_args(
        model="none",
        device="cpu",
        dtype="float32",
        tensor_parallel_size=ranks,
        step_channel=channel,
        max_model_len=4096,
    )
    no_model: Any = None
    executor = RayExecutor(config, no_model, name=f"manta:idle{time.monotonic_ns()}", worker_class=worker_class)
    try:
        executor.start()
        yield executor
    finally:
        executor.shutdown()


def decode_plan(epoch: int, step: int, num_sequences: int) -> StepPlan:
    """A plan in which `num_sequences` sequences decode: 20 bytes a sequence."""
    ids = pack(range(num_sequences))
    ones = pack([1] * num_sequences)
    return StepPlan(
        epoch=epoch,
        step=step,
        seq_ids=ids,
        num_tokens=ones,
        num_decodes=num_sequences,
        block_counts=bytes(len(ids)),
        sample_seqs=ids,
        sample_entries=ids,
    )


def measure_dispatch(
    ranks: int = 1,
    channel: Literal["socket", "actor"] = "socket",
    *,
    num_sequences: int = 200,
    steps: int = 1000,
) -> DispatchTimes:
    """Time `steps` steps of `num_sequences` decodes through idle ranks, one at a time and then two in flight."""
    from engine.step import encode

    with idle_executor(ranks, channel) as executor:
        times = []
        for step in range(steps):
            plan = decode_plan(0, step, num_sequences)
            began_s = time.perf_counter()
            executor.submit(plan).result(30)
            times.append(time.perf_counter() - began_s)
        flying: deque[Any] = deque()
        began_s = time.perf_counter()
        for step in range(steps, 2 * steps):
            flying.append(executor.submit(decode_plan(0, step, num_sequences)))
            if len(flying) == 2:
                flying.popleft().result(30)
        while flying:
            flying.popleft().result(30)
        rate = steps / (time.perf_counter() - began_s)
    times = sorted(times[len(times) // 10 :])
    return DispatchTimes(
        channel=channel,
        ranks=ranks,
        payload_bytes=len(encode(decode_plan(0, 0, num_sequences))),
        median_us=statistics.median(times) * 1e6,
        p99_us=times[int(len(times) * 0.99)] * 1e6,
        pipelined_steps_per_s=rate,
    )
