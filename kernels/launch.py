"""What launches on this device look like: multiprocessors, and programmatic dependent launch.

With programmatic dependent launch (compute capability 9.0) a kernel may start while the one before it is still
running. The rule for every kernel here that is launched so: read nothing another kernel writes, and write nothing,
before `gdc_wait`, and always reach it. Weights may be read before.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chip:
    """What kernels have to know of a GPU to be compiled for it."""

    capability: tuple[int, int]
    num_multiprocessors: int


class _Rehearsed:
    """The GPU that the device "meta" stands for (kernels.rehearsal), one a process."""

    chip: Chip | None = None


def rehearse_on(chip: Chip) -> None:
    """Let tensors on the device "meta" stand for tensors on such a GPU, in this process."""
    _Rehearsed.chip = chip
    num_multiprocessors.cache_clear()
    _has_dependent_launch.cache_clear()


@cache
def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 4 for the CPU, where the interpreter runs one program after another."""
    if device.type == "meta" and _Rehearsed.chip is not None:
        return _Rehearsed.chip.num_multiprocessors
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@cache
def _has_dependent_launch(device: torch.device) -> bool:
    if os.environ.get("MANTA_PDL", "1") == "0":
        return False
    if device.type == "meta" and _Rehearsed.chip is not None:
        return _Rehearsed.chip.capability >= (9, 0)
    if device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0) and torch.version.hip is None


class _Switch:
    """The process-wide choice of dependent_launches()."""

    on = True


@contextmanager
def dependent_launches(on: bool) -> Iterator[None]:
    """Whether kernels may start early while the context is open.

    It hides the gaps of a step of small kernels. Where kernels fill the GPU it costs: a program that waits early holds
    its place, and those of the kernel before are no longer spread evenly.
    """
    before, _Switch.on = _Switch.on, on
    try:
        yield
    finally:
        _Switch.on = before


def dependent_launch(x: Tensor) -> dict[str, Any]:
    """Launch options for x's device: PDL (the kernel's constexpr) and, where it is on, launch_pdl. MANTA_PDL=0: off."""
    if _Switch.on and _has_dependent_launch(x.device):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n (n >= 1)."""
    return 1 << (n - 1).bit_length()
