"""What launches on this device look like: multiprocessors, and programmatic dependent launch.

With programmatic dependent launch (compute capability 9.0) a kernel may start while the one before it is still
running. The rule for every kernel here that is launched so: read nothing another kernel writes, and write nothing,
before `gdc_wait`, and always reach it. Weights may be read before.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 4 for the CPU, where the interpreter runs one program after another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@cache
def _has_dependent_launch(device: torch.device) -> bool:
    if device.type != "cuda" or os.environ.get("MANTA_PDL", "1") == "0":
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0) and torch.version.hip is None


def dependent_launch(x: Tensor) -> dict[str, Any]:
    """Launch options for x's device: PDL (the kernel's constexpr) and, where it is on, launch_pdl. MANTA_PDL=0: off."""
    if _has_dependent_launch(x.device):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n (n >= 1)."""
    return 1 << (n - 1).bit_length()
