"""What launches on this device look like: multiprocessors, and programmatic dependent launch.

With programmatic dependent launch (compute capability 9.0) a kernel may start while the one before it is still
running. The rule for every kernel here that is launched so: read nothing another kernel writes, and write nothing,
before `gdc_wait`, and always reach it. Weights may be read before. Behind a gate() more may be.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
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
    met: Callable[[str, str, Callable[[], object]], None] | None = None


def rehearse_on(chip: Chip, met: Callable[[str, str, Callable[[], object]], None] | None = None) -> None:
    """Let tensors on the device "meta" stand for tensors on such a GPU, in this process.

    met: called for each kernel that is not Triton's, with its name, what tells its variants apart and what compiles it.
    """
    _Rehearsed.chip, _Rehearsed.met = chip, met
    num_multiprocessors.cache_clear()
    capability.cache_clear()


def compile_in_rehearsal(name: str, variant: str, job: Callable[[], object]) -> None:
    """Of a kernel whose tensors are on the device "meta": compile it in place of launching it."""
    if _Rehearsed.met is not None:
        _Rehearsed.met(name, variant, job)


@cache
def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 4 for the CPU, where the interpreter runs one program after another."""
    if device.type == "meta" and _Rehearsed.chip is not None:
        return _Rehearsed.chip.num_multiprocessors
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """An NVIDIA GPU's compute capability; (0, 0) for any other device."""
    if device.type == "meta" and _Rehearsed.chip is not None:
        return _Rehearsed.chip.capability
    if device.type != "cuda" or torch.version.hip is not None:
        return 0, 0
    return torch.cuda.get_device_capability(device)


def _has_dependent_launch(device: torch.device) -> bool:
    return capability(device) >= (9, 0) and os.environ.get("MANTA_PDL", "1") != "0"


class _Switch:
    """The process-wide choices of dependent_launches() and gate()."""

    on = True
    gate = False


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


@contextmanager
def gate() -> Iterator[None]:
    """Have the product launched in the context let the next kernel start only once it has waited itself.

    All that ran in front of it has ended then, so that whoever starts behind it, however early, may read what was
    written before the product without waiting: through L2, for nothing tells L1 of it.
    """
    before, _Switch.gate = _Switch.gate, True
    try:
        yield
    finally:
        _Switch.gate = before


def gating() -> bool:
    """Whether a product that is launched now is a gate. Library products always are: they start late."""
    return _Switch.gate


def dependent_launch(x: Tensor) -> dict[str, Any]:
    """Launch options for x's device: PDL (the kernel's constexpr) and, where it is on, launch_pdl. MANTA_PDL=0: off."""
    if _Switch.on and _has_dependent_launch(x.device):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n (n >= 1)."""
    return 1 << (n - 1).bit_length()
