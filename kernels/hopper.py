"""What the CUDA C++ kernels for Hopper (compute capability 9.0) have in common: their text, the chip's limits.

MANTA_HOPPER overrules which of them the engine uses: a list of KINDS, or "all", or "none".
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch

from kernels.cuda_source import nvrtc_version
from kernels.launch import capability

KINDS = ("products", "norms", "few", "decode", "prefill")
"""Of kernels: large products, norms that join in with them, products of few rows, attention."""


def parse_kinds(text: str) -> frozenset[str]:
    """Read MANTA_HOPPER. Raises ValueError."""
    if text in ("all", "none"):
        return frozenset(KINDS if text == "all" else ())
    kinds = frozenset(filter(None, (part.strip() for part in text.split(","))))
    if not kinds <= set(KINDS):
        raise ValueError(f"MANTA_HOPPER: {text!r} is not all, none or a list of {', '.join(KINDS)}")
    return kinds


USED = parse_kinds(os.environ.get("MANTA_HOPPER", "all"))
"""By the engine, in this process."""
DEPTH = 64
"""Of K a stage: 128 bytes, the width of the swizzle."""
SHARED_BYTES = 227 * 1024
"""Of shared memory a block can have."""
# Cache policies of the bulk copies: keep as usual, or give up first what is read once.
KEPT, FIRST_OUT = 0x1000000000000000, 0x12F0000000000000


def uses(kind: str) -> bool:
    """Whether the engine uses the kernels of a kind, where they can run."""
    return kind in USED


def kernel_text(name: str, values: dict[str, int], width: int = 0, values_width: int = 0) -> str:
    """The whole source of `name`.cu, compiled with these macros, HALF among them.

    width, values_width: with wgmma(), and wgmma_values(), of so many columns.
    """
    macros = "".join(f"#define {macro} {value}\n" for macro, value in values.items())
    texts = [Path(__file__).with_name(f"{file}.cu").read_text(encoding="utf-8") for file in ("hopper", name)]
    half = bool(values["HALF"])
    products = (_wgmma(width, half) if width else "") + (_wgmma_values(values_width, half) if values_width else "")
    return macros + products + "".join(texts)


def _operands(width: int, half: bool) -> tuple[int, str, str, str]:
    """Of a product: how many registers a thread has of d, their numbers, what they are, and the inputs' type."""
    count = width // 2
    registers = ", ".join(f"%{i}" for i in range(count))
    return count, registers, ", ".join(f'"+f"(d[{i}])' for i in range(count)), "f16" if half else "bf16"


def _wgmma(width: int, half: bool) -> str:
    """A device function: d [64, width] of a warpgroup plus or equals a [64, 16] times b [width, 16] transposed."""
    count, registers, operands, kind = _operands(width, half)
    return f"""
__device__ __forceinline__ void wgmma(float* d, unsigned long long a, unsigned long long b, int add) {{
  asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{count + 2}, 0;\\n"
    "wgmma.mma_async.sync.aligned.m64n{width}k16.f32.{kind}.{kind} {{{registers}}}, %{count}, %{count + 1}, "
    "p, 1, 1, 0, 0;\\n}}" : {operands} : "l"(a), "l"(b), "r"(add));
}}
"""


def _wgmma_values(width: int, half: bool) -> str:
    """A device function: d [64, width] of a warpgroup plus a [64, 16], in registers, times b [16, width]."""
    count, registers, operands, kind = _operands(width, half)
    a = ", ".join(f"%{count + i}" for i in range(4))
    return f"""
__device__ __forceinline__ void wgmma_values(float* d, const unsigned int* a, unsigned long long b) {{
  asm volatile("{{\\n.reg .pred p;\\nsetp.eq.b32 p, 0, 0;\\n"
    "wgmma.mma_async.sync.aligned.m64n{width}k16.f32.{kind}.{kind} {{{registers}}}, {{{a}}}, %{count + 4}, "
    "p, 1, 1, 1;\\n}}" : {operands} : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}}
"""


@cache
def why_not(device: torch.device) -> str | None:
    """Why this device cannot run the kernels; None where it can."""
    if capability(device) != (9, 0):
        return "the Hopper kernel is for compute capability 9.0"
    return None if nvrtc_version() >= (12, 4) else "libnvrtc 12.4 or later was not found"
