"""Backend: what differs between kinds of devices. CpuBackend: the CPU's. CudaBackend: one NVIDIA GPU's."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Protocol

import torch

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.step import StepResult

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class PendingStep(Protocol):
    """A step under way."""

    @property
    def done(self) -> bool:
        """Whether wait() returns at once."""
        ...

    def wait(self) -> StepResult | None:
        """Block until the step is done: its result on rank 0, None on the others."""
        ...


class Timer(Protocol):
    """Made before a step is queued."""

    def pending(self, finish: Callable[[], StepResult] | None) -> PendingStep:
        """The step queued since; `finish` makes its result once the device is done, None where nobody asks for it."""
        ...


class Backend(Protocol):
    """One rank's device."""

    device: torch.device
    dtype: torch.dtype
    graphs: bool
    """Whether decode steps are recorded and replayed."""

    def kv_cache_bytes(self, largest_step: Callable[[], None]) -> int:
        """Memory the KV cache may take, measured once the weights are loaded. Raises ConfigError if there is none."""
        ...

    def has_room(self) -> bool:
        """Whether more memory is free than the largest step takes, as kv_cache_bytes measured it."""
        ...

    def timer(self) -> Timer:
        """Begin to time a step, on the thread that queues it."""
        ...


def make_backend(config: EngineConfig) -> Backend:
    """The backend of the resolved config's device."""
    return CpuBackend(config) if config.device == "cpu" else CudaBackend(config)


class CpuBackend:
    """This machine's processors and memory."""

    graphs = False

    def __init__(self, config: EngineConfig) -> None:
        self.device = torch.device("cpu")
        self.dtype = DTYPES[config.dtype]
        self._limit = int(config.cpu_kv_cache_gib * 2**30)
        self._ranks = config.tensor_parallel_size

    def kv_cache_bytes(self, largest_step: Callable[[], None]) -> int:  # noqa: ARG002 - a CPU's memory can be shared
        """The configured size, at most half of the memory that is free, shared by the ranks of this machine."""
        return min(self._limit, free_memory_bytes() // 2 // self._ranks)

    def has_room(self) -> bool:
        return True

    def timer(self) -> Timer:
        return _CpuTimer()


class _CpuTimer:
    def __init__(self) -> None:
        self._started_s = perf_counter()

    def pending(self, finish: Callable[[], StepResult] | None) -> PendingStep:
        result = finish() if finish is not None else None
        if result is not None:
            result.device_s = perf_counter() - self._started_s
        return DoneStep(result)


class DoneStep:
    """A step that was over when submit returned."""

    done = True

    def __init__(self, result: StepResult | None) -> None:
        self._result = result

    def wait(self) -> StepResult | None:
        return self._result


# Beside the weights, a step's tensors and the cache: the CUDA graphs' own memory and what the libraries take later.
GRAPH_BYTES = 1 << 30
# What CUDA and its libraries hold outside torch's allocator, where the driver does not tell.
CONTEXT_BYTES = 1 << 30


class CudaBackend:
    """The current GPU of the thread that makes it; steps are queued on its default stream and waited for on events."""

    def __init__(self, config: EngineConfig) -> None:
        if not torch.cuda.is_available():
            raise ConfigError("device", "cuda", "torch finds no GPU here; use cpu")
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.dtype = DTYPES[config.dtype]
        self.graphs = not config.enforce_eager
        self._share = config.gpu_memory_utilization
        self._last: _QueuedStep | None = None
        self._largest_step_bytes = 0
        # float32 means float32: no TF32 in matrix products.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False

    def kv_cache_bytes(self, largest_step: Callable[[], None]) -> int:
        """What is left of this process's share of the device's memory after the weights and the largest step.

        Only what this process takes is counted against its share; what others hold cannot be had either.
        """
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        largest_step()
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        held = torch.cuda.memory_reserved(self.device)
        activations = self._largest_step_bytes = peak - torch.cuda.memory_allocated(self.device)
        extra = activations + GRAPH_BYTES if self.graphs else activations
        allowed = min(int(total * self._share) - held - CONTEXT_BYTES, free) - extra
        if allowed <= 0:
            raise ConfigError(
                "gpu_memory_utilization",
                self._share,
                f"no memory is left for the KV cache: of {total / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free, the "
                f"weights take {held / 2**30:.1f} GiB and the largest step {extra / 2**30:.1f} GiB more; raise it, or "
                "lower max_num_batched_tokens, or use more GPUs (tensor_parallel_size)",
            )
        return allowed

    def has_room(self) -> bool:
        """What torch has taken from the device and does not use is not counted: pieces of it may be too small."""
        return torch.cuda.mem_get_info(self.device)[0] > self._largest_step_bytes

    def timer(self) -> Timer:
        return _CudaTimer(self)

    def queue(self, started: torch.cuda.Event, finish: Callable[[], StepResult] | None) -> _QueuedStep:
        """The step whose work was queued since `started`."""
        late = self._last is None or self._last.done
        self._last = _QueuedStep(started, finish, late)
        return self._last


class _CudaTimer:
    def __init__(self, backend: CudaBackend) -> None:
        self._backend, self._started = backend, torch.cuda.Event(enable_timing=True)
        self._started.record()

    def pending(self, finish: Callable[[], StepResult] | None) -> PendingStep:
        return self._backend.queue(self._started, finish)


class _QueuedStep:
    """A step on the device's stream."""

    def __init__(self, started: torch.cuda.Event, finish: Callable[[], StepResult] | None, late: bool) -> None:
        self._started, self._finish, self._late = started, finish, late
        self._over = torch.cuda.Event(enable_timing=True)
        self._over.record()

    @property
    def done(self) -> bool:
        over: bool = self._over.query()
        return over

    def wait(self) -> StepResult | None:
        self._over.synchronize()
        if self._finish is None:
            return None
        result = self._finish()
        result.device_s, result.late = self._started.elapsed_time(self._over) / 1e3, self._late
        return result


def free_memory_bytes() -> int:
    """Memory this process may still take: of the machine, and of the control groups it is in."""
    free = _machine_free_bytes()
    for limit_file, used_file in _CGROUP_FILES:
        limit, used = _read_number(limit_file), _read_number(used_file)
        if limit is not None and used is not None:
            free = min(free, max(0, limit - used))
    return free


_CGROUP_FILES = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


def _machine_free_bytes() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _read_number(path: Path) -> int | None:
    """The file's number; None when there is no such file, or it says "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
