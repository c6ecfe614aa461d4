"""Rehearsing an engine: everything its first steps launch, on a GPU that is not there, so that it is compiled.

    python -m engine.worker.rehearsal < PICKLE       (preparation.py starts it)
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import operator
import os
import pickle
import sys
import time
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.executor import CacheCapacity
from engine.layers.place import Place
from engine.layers.rotary import cos_sin_table
from engine.model_config import ModelConfig
from engine.models.base import Model
from engine.models.registry import find_model
from engine.parallel.communicator import Communicator, Solo
from engine.sampling_params import SamplingParams
from engine.step import NewSequence, StepPlan, pack
from engine.worker.backend import DTYPES
from engine.worker.batch import Batch
from engine.worker.cuda_graphs import DecodeGraphs
from engine.worker.kv_cache import KvCache
from engine.worker.largest_step import largest_step
from engine.worker.mixed_graphs import MixedGraphs
from engine.worker.model_runner import ModelRunner
from engine.worker.recorder import Recorder
from engine.worker.recordings import Recordings, all_recordings
from engine.worker.rehearsal_task import Task
from engine.worker.sampling_state import SamplingState
from kernels.launch import Chip
from kernels.rehearsal import Rehearsal

logger = logging.getLogger(__name__)

META = torch.device("meta")
# Prompts of one step, and how their tokens are drawn: long ones and short ones, each way of drawing.
PROMPTS = (
    (1, SamplingParams(temperature=0.0)),
    (3, SamplingParams(temperature=0.0)),
    (16, SamplingParams(temperature=0.8, top_p=0.95)),
    (3, SamplingParams(temperature=0.8, top_k=50)),
    (3, SamplingParams(temperature=0.8, top_k=50, top_p=0.95)),
    (70, SamplingParams(temperature=0.8)),
    (3, SamplingParams(temperature=0.8, presence_penalty=0.5, repetition_penalty=1.1, logprobs=5)),
)


class Silent:
    """A Communicator of `size` ranks whose collectives carry nothing; `fused`: the residual sum and norm join in."""

    rank = 0

    def __init__(self, size: int, *, fused: bool) -> None:
        self.size, self._fused = size, fused

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor

    def all_reduce_add_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float  # noqa: ARG002
    ) -> tuple[Tensor, Tensor] | None:  # fmt: skip
        return (torch.empty_like(x), torch.empty_like(x)) if self._fused else None

    def all_gather(self, tensor: Tensor, dim: int = -1) -> Tensor:
        return torch.cat([tensor] * self.size, dim=dim)

    def barrier(self) -> None:
        pass

    def close(self) -> None:
        pass


def rehearse(config: EngineConfig, model_config: ModelConfig) -> bool:
    """Go through a start and the first steps, inside an open kernels.rehearsal.Rehearsal. What comes first is first.

    False: something failed, and what comes behind it was not met.
    """
    size = config.tensor_parallel_size
    model_config = few_layers(model_config)
    ranks: list[Communicator] = [Solo()] if size == 1 else [Silent(size, fused=fused) for fused in (True, False)]
    complete = True
    for communicator in ranks:
        try:
            with torch.inference_mode():
                _rehearse_rank(config, model_config, communicator)
        except Exception:  # what has not been met is compiled when it is needed
            logger.exception("the rehearsal ended early")
            complete = False
    return complete


def few_layers(model_config: ModelConfig) -> ModelConfig:
    """The same model with only as many layers as launch different kernels: the first two, and each sliding window."""
    windows = model_config.sliding_windows
    wanted = {0, 1, *(windows.index(window) for window in set(windows))}
    kept = tuple(window for layer, window in enumerate(windows) if layer in wanted)
    return dataclasses.replace(model_config, num_layers=len(kept), sliding_windows=kept)


def _rehearse_rank(config: EngineConfig, model_config: ModelConfig, communicator: Communicator) -> None:
    dtype = DTYPES[config.dtype]
    model = find_model(model_config.architecture).load_class()(Place(META, dtype, communicator), model_config)
    largest_step(config, model_config, model, META, dtype)
    # Enough blocks that strides and sizes are as divisible as they will be.
    capacity = CacheCapacity(1024, config.block_size)
    cache = KvCache(capacity, model_config, communicator.size, dtype, META)
    if not config.enforce_eager:
        _record(config, model_config, model, cache)
    runner = ModelRunner(config, model_config, model, cache, META, graphs=False)
    for count, params in PROMPTS:
        _prompts(config, runner, params, count)
        runner.clear()


def _record(config: EngineConfig, model_config: ModelConfig, model: Model, cache: KvCache) -> None:
    """What a rank records, in its order."""
    cos_sin = cos_sin_table(model_config.rope, model_config.head_dim, config.model_len + 1, META)
    batch = Batch(config.max_num_seqs, config.model_len, config.block_size, META)
    state = SamplingState(batch, config.max_num_seqs, model_config.vocab_size, model_config.eos_token_ids)
    shared = (cache.layers, cos_sin, Recorder(META))
    decodes = DecodeGraphs(model, batch, state, *shared)
    mixed = MixedGraphs(model, batch, config.max_num_batched_tokens, *shared)
    Recordings(all_recordings(mixed, decodes)).record_for(float("inf"))


def _prompts(config: EngineConfig, runner: ModelRunner, params: SamplingParams, count: int) -> None:
    """A step of `count` prompts that fill it, or a sequence each, and draw a token each."""
    count = min(count, config.max_num_seqs)
    length = max(1, min(config.model_len - 1, config.max_num_batched_tokens // count))
    blocks = -(-length // config.block_size)
    ids, ones = list(range(count)), [1] * count
    prompt = pack(np.full(length, 7, np.int32))
    table = pack(range(blocks))
    new = [NewSequence(i, str(i), prompt, length, 0, table, params, i) for i in ids]
    runner.run(
        StepPlan(
            0,
            0,
            new=new,
            seq_ids=pack(ids),
            num_tokens=pack(np.array(ones, np.int32) * length),
            block_counts=pack(np.zeros(count, np.int32)),
            sample_seqs=pack(ids),
            sample_entries=pack(ids),
        )
    )


def this_chip() -> Chip:
    """The first GPU's. Asked in a process of its own: one that has initialised CUDA forks slowly."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            properties = torch.cuda.get_device_properties(0)
            os.write(writer, pickle.dumps((properties.major, properties.minor, properties.multi_processor_count)))
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as answer:
        major, minor, multiprocessors = pickle.load(answer)
    os.waitpid(pid, 0)
    return Chip((major, minor), multiprocessors)


class _Deferred(ModuleType):
    """Stands for a module that is imported once something of it is asked for that is not `known`."""

    def __init__(self, name: str, **known: Any) -> None:
        super().__init__(name)
        self.__dict__.update(known)
        sys.modules[name] = self

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return getattr(self.replace(), attribute)

    def replace(self) -> Any:
        """The module itself, from now on in its place."""
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return importlib.import_module(self.__name__)


def spare_imports() -> list[_Deferred]:
    """Leave out what torch imports for operations on the device "meta" and does not use: its compiler, and SymPy.

    That would be most of a rehearsal's time.
    """
    # The second module's questions about sizes, which are plain integers here.
    conditions = ("expect_true", "guard_or_false", "guard_or_true", "guard_size_oblivious", "statically_known_true")
    hints = {"has_hint": lambda _: True, "has_guarding_hint": lambda _: True, "is_nested_int": lambda _: False}
    known: dict[str, dict[str, Any]] = {
        "torch._dynamo": {"disable": lambda function, *_, **__: function},
        "torch.fx.experimental.symbolic_shapes": {
            **dict.fromkeys(conditions, bool),
            **dict.fromkeys(("size_hint", "guarding_hint_or_throw"), int),
            **hints,
            "sym_eq": operator.eq,
            "sym_and": lambda *conditions: all(conditions),
            "sym_or": lambda *conditions: any(conditions),
        },
        "sympy": {"Basic": type("Basic", (), {})},
    }
    deferred = [_Deferred(name, **known[name]) for name in known if name not in sys.modules]
    torch._dynamo = sys.modules["torch._dynamo"]
    return deferred


def main() -> int:
    """Rehearse the task on standard input; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    task: Task = pickle.load(sys.stdin.buffer)
    imported_s = time.time() - task.begun_s
    os.nice(19)  # the start is not to wait for a core
    torch.set_num_threads(1)
    deferred = spare_imports()
    workers = max(1, len(os.sched_getaffinity(0)) - 1) if task.workers is None else task.workers
    rehearsal = Rehearsal(Chip(*task.chip) if task.chip else this_chip(), workers)
    with rehearsal():
        if not rehearse(task.config, task.model_config) and deferred:
            for module in deferred:
                module.replace()
            rehearse(task.config, task.model_config)
        met_s = time.time() - task.begun_s
    took_s = time.time() - task.begun_s
    said = f"prepared {rehearsal.summary} in {took_s:.1f} s (imports {imported_s:.1f} s, all met after {met_s:.1f} s)"
    logger.info(said)
    task.stamp.parent.mkdir(parents=True, exist_ok=True)
    task.stamp.write_text(said + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
