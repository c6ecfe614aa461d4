"""LocalExecutor: one rank in this process, its plans run in order on one thread."""

from __future__ import annotations

import queue
import threading
from concurrent.futures import Future

from engine.config import EngineConfig
from engine.errors import ConfigError, ExecutorDied
from engine.executor import CacheCapacity
from engine.model_config import ModelConfig
from engine.parallel.communicator import Solo
from engine.step import StepMasks, StepPlan, StepResult
from engine.worker.backend import PendingStep
from engine.worker.worker import Worker

_Job = tuple[StepPlan, "Future[StepResult]"]
_Started = tuple[PendingStep, "Future[StepResult]"]


class LocalExecutor:
    """Executor of an engine whose model is on one device. `config` is resolved."""

    def __init__(self, config: EngineConfig, model_config: ModelConfig, *, progress: bool = False) -> None:
        if config.tensor_parallel_size != 1:
            raise ConfigError("tensor_parallel_size", config.tensor_parallel_size, "1 in this process")
        self._worker = Worker(config, model_config, 0, Solo())
        self._progress = progress
        self._capacity: CacheCapacity | None = None
        self._epoch = 0
        self._fault: ExecutorDied | None = None
        self._plans: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._masks: queue.SimpleQueue[StepMasks | None] = queue.SimpleQueue()
        self._started: queue.SimpleQueue[_Started | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def start(self) -> CacheCapacity:
        self._worker.load(progress=self._progress)
        self._capacity = self._worker.measure()
        self._worker.allocate(self._capacity)
        self._start_threads()
        return self._capacity

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        future: Future[StepResult] = Future()
        if not self._threads:
            future.set_exception(ExecutorDied("the executor is not running"))
        else:
            self._plans.put((plan, future))
        return future

    def send_masks(self, masks: StepMasks) -> None:
        self._masks.put(masks)

    @property
    def unrecorded(self) -> int:
        """How many CUDA graphs will be recorded while no plan comes."""
        return self._worker.unrecorded

    def check(self) -> None:
        if self._fault is not None:
            raise self._fault

    def restart(self) -> CacheCapacity:
        assert self._capacity is not None, "start first"
        self._stop_threads()
        self._epoch += 1
        self._fault = None
        self._worker.reset(self._epoch)
        self._start_threads()
        return self._capacity

    def shutdown(self) -> None:
        if self._threads:
            self._fault = self._fault or ExecutorDied("the executor was shut down")
            self._stop_threads()
        self._worker.close()

    def _start_threads(self) -> None:
        """One thread submits plans; another waits for those that a device is still busy with."""
        for name, run in (("manta-steps", self._run_plans), ("manta-results", self._finish_steps)):
            thread = threading.Thread(target=run, name=name, daemon=True)
            thread.start()
            self._threads.append(thread)

    def _stop_threads(self) -> None:
        """Run what is queued, or fail it after a fault, and end the threads."""
        self._plans.put(None)
        self._masks.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        self._masks = queue.SimpleQueue()

    def _await_masks(self) -> StepMasks:
        masks = self._masks.get()
        if masks is None:
            raise ExecutorDied("the executor was stopped while a step waited for its masks")
        return masks

    def _receive(self, timeout_s: float | None) -> _Job | None:
        try:
            return self._plans.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError from None

    def _run_plans(self) -> None:
        while (job := self._worker.await_plan(self._receive)) is not None:
            plan, future = job
            if self._fault is not None:
                future.set_exception(self._fault)
                continue
            try:
                pending = self._worker.submit(plan, self._await_masks)
                is_done = pending.done  # a device that is lost may say so here
            except Exception as error:
                self._fail(future, error)
                continue
            if is_done:
                self._finish(pending, future)
            else:
                self._started.put((pending, future))
        self._started.put(None)

    def _finish_steps(self) -> None:
        while (started := self._started.get()) is not None:
            self._finish(*started)

    def _finish(self, pending: PendingStep, future: Future[StepResult]) -> None:
        try:
            result = pending.wait()
            assert result is not None
        except Exception as error:
            self._fail(future, error)
        else:
            future.set_result(result)

    def _fail(self, future: Future[StepResult], error: Exception) -> None:
        """Every later step fails too, until a restart."""
        fault = (
            error if isinstance(error, ExecutorDied) else ExecutorDied(f"{type(error).__name__}: {error}", ranks=(0,))
        )
        fault.__cause__ = error if fault is not error else None
        self._fault = fault
        future.set_exception(fault)
