"""Backend: what differs between kinds of devices. CpuBackend: the CPU's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

import torch

from engine.config import EngineConfig

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Backend(Protocol):
    """One rank's device."""

    device: torch.device
    dtype: torch.dtype

    def kv_cache_bytes(self) -> int:
        """Memory the KV cache may take, measured once the weights are loaded."""
        ...


def make_backend(config: EngineConfig, rank: int) -> Backend:  # noqa: ARG001 - a GPU's device index
    """The backend of the resolved config's device."""
    if config.device == "cpu":
        return CpuBackend(config)
    raise ValueError(f"no backend for device {config.device!r}")


class CpuBackend:
    """This machine's processors and memory."""

    def __init__(self, config: EngineConfig) -> None:
        self.device = torch.device("cpu")
        self.dtype = _DTYPES[config.dtype]
        self._limit = int(config.cpu_kv_cache_gib * 2**30)
        self._ranks = config.tensor_parallel_size

    def kv_cache_bytes(self) -> int:
        """The configured size, at most half of the memory that is free, shared by the ranks of this machine."""
        return min(self._limit, free_memory_bytes() // 2 // self._ranks)


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
