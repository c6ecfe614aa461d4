"""Worker: one rank. Loads its share of the model, sizes its cache, runs plans."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from engine.config import EngineConfig
from engine.errors import ExecutorDied
from engine.executor import CacheCapacity
from engine.layers.place import Place
from engine.model_config import ModelConfig
from engine.models.base import Model
from engine.models.registry import find_model
from engine.models.weights import fill_dummy, load_weights
from engine.parallel.communicator import Communicator
from engine.step import StepMasks, StepPlan
from engine.worker.backend import PendingStep, make_backend
from engine.worker.kv_cache import KvCache, plan_capacity
from engine.worker.largest_step import largest_step
from engine.worker.model_runner import ModelRunner
from engine.worker.preparation import Preparation
from engine.worker.start_log import StartLog
from engine.worker.tracing import make_tracer

logger = logging.getLogger(__name__)

Received = TypeVar("Received")

PREPARE_S = 1.0
"""A start begins to record no graph after this; the others are while no plan comes, or when they are needed."""


class Worker:
    """One rank of an engine. Call load, measure, allocate, then submit; one thread at a time."""

    def __init__(self, config: EngineConfig, model_config: ModelConfig, rank: int, communicator: Communicator) -> None:
        assert communicator.rank == rank and communicator.size == config.tensor_parallel_size
        self.rank = rank
        self._log = StartLog()
        self._config, self._model_config, self._communicator = config, model_config, communicator
        self._preparation = Preparation(config, model_config)
        self._preparation.begin()
        self._backend = make_backend(config)
        self._model: Model | None = None
        self._runner: ModelRunner | None = None
        self._tracer = make_tracer(rank) if config.device == "cuda" else None
        self._epoch = 0
        self._next_step = 0
        self._last: PendingStep | None = None

    def load(self, *, progress: bool = False) -> None:
        """Make this rank's share of the model and fill it. Raises ModelLoadError or ConfigError."""
        config, model_config = self._config, self._model_config
        place = Place(self._backend.device, self._backend.dtype, self._communicator)
        self._model = find_model(model_config.architecture).load_class()(place, model_config)
        with torch.inference_mode():
            if config.load_format == "dummy":
                fill_dummy(self._model.weights(), config.seed + self.rank)
            else:
                tied = model_config.tie_word_embeddings
                load_weights(self._model.weights(), model_config.folder, tied=tied, progress=progress)
        self._log.part("weights")

    def measure(self) -> CacheCapacity:
        """How many KV blocks this rank can hold. Raises ConfigError when one long sequence would not fit."""
        assert self._model is not None, "load first"
        backend = self._backend
        self._preparation.wait()
        self._log.part("kernels")
        with torch.inference_mode():
            free_bytes = backend.kv_cache_bytes(self._largest_step)
        self._log.part("largest step")
        return plan_capacity(self._config, self._model_config, backend.dtype, free_bytes)

    def allocate(self, capacity: CacheCapacity) -> None:
        """Make the KV cache: the least that any rank measured."""
        assert self._model is not None, "load first"
        backend, size = self._backend, self._communicator.size
        cache = KvCache(capacity, self._model_config, size, backend.dtype, backend.device)
        self._runner = ModelRunner(
            self._config, self._model_config, self._model, cache, backend.device, graphs=backend.graphs
        )
        self._log.part("cache")
        self._runner.prepare(PREPARE_S if size == 1 else float("inf"))
        self._log.part("graphs")
        logger.info("rank %d is ready: %s", self.rank, self._log)

    def submit(self, plan: StepPlan, masks: Callable[[], StepMasks] | None = None) -> PendingStep:
        """Run a plan after those before it. Raises ExecutorDied for one of another epoch or out of order.

        `masks` waits for the masks of a plan that has masked samples; it is called once all else is queued.
        """
        assert self._runner is not None, "allocate first"
        if (plan.epoch, plan.step) != (self._epoch, self._next_step):
            raise ExecutorDied(
                f"rank {self.rank} awaits step {self._next_step} of epoch {self._epoch}, "
                f"not step {plan.step} of epoch {plan.epoch}",
                ranks=(self.rank,),
            )
        self._next_step += 1
        if self._tracer is not None:
            self._tracer.before(plan)
        timer = self._backend.timer()
        finish = self._runner.run(plan, masks)
        self._last = timer.pending(finish if self.rank == 0 else None)
        return self._last

    @property
    def unrecorded(self) -> int:
        """How many CUDA graphs `await_plan` has yet to record. Several ranks have recorded all alike."""
        return len(self._runner.recordings) if self._runner is not None and self._communicator.size == 1 else 0

    def await_plan(self, receive: Callable[[float | None], Received]) -> Received:
        """What `receive` gives, called on this thread; what is left of the CUDA graphs is recorded while it waits.

        `receive` gets the seconds after which it raises TimeoutError; None: never. What comes waits for one graph at
        most.
        """
        if self._runner is None or not self.unrecorded:
            return receive(None)
        return self._runner.recordings.record_while_waiting(receive, self._is_idle, self._backend.has_room)

    def _is_idle(self) -> bool:
        """Whether the device has done all that it was given."""
        with contextlib.suppress(Exception):  # a device that is lost says so to whoever waits for its step
            return self._last is None or self._last.done
        return False

    def _largest_step(self) -> None:
        """Compute as large a step as a plan may ask for, over a cache of one block that nothing is written to."""
        assert self._model is not None
        largest_step(self._config, self._model_config, self._model, self._backend.device, self._backend.dtype)

    def reset(self, epoch: int) -> None:
        """Forget every sequence and begin an epoch; the weights and the cache's memory stay."""
        self._epoch, self._next_step = epoch, 0
        if self._runner is not None:
            self._runner.clear()

    def close(self) -> None:
        """Leave the group and let go of the memory. Idempotent."""
        self._runner = self._model = None
        self._communicator.close()
