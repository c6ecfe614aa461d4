"""Kernels in CUDA C++ for Hopper, run on the CPU by hopper_on_cpu.h: indices, barriers and pipelines, not speed."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import cuda_source

HEADER = Path(__file__).with_suffix(".h")
INSTRUCTIONS = Path(cuda_source.__file__).with_name("hopper.cu")
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="no g++ to compile the kernels' text for the CPU"
)


class TensorMap(ctypes.Structure):
    """hopper_on_cpu.h's."""

    _fields_ = [("base", ctypes.c_void_p), ("rank", ctypes.c_long)] + [
        (name, ctypes.c_long * 4) for name in ("sizes", "strides", "box")
    ]


def _map(x: Tensor, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int]) -> TensorMap:
    four = lambda values: (ctypes.c_long * 4)(*values)
    return TensorMap(x.data_ptr(), len(sizes), four(sizes), four([0, *strides]), four(box))


def tensor_map(x: Tensor, box_rows: int) -> TensorMap:
    """As kernels.cuda_source.tensor_map."""
    return _map(x, (x.shape[1], x.shape[0]), (2 * x.stride(0),), (64, box_rows))


def halves_map(x: Tensor, box_runs: int) -> TensorMap:
    """As kernels.cuda_source.halves_map."""
    rows, stride = x.shape[0] // 2, 2 * x.stride(0)
    return _map(x, (x.shape[1], 8, 2, rows // 8), (stride, rows * stride, 8 * stride), (64, 8, 2, box_runs))


def pointer(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


class _Write(ctypes.Structure):
    """hopper_on_cpu.h's."""

    _fields_ = [("to", ctypes.c_void_p), ("from", ctypes.c_void_p), ("bytes", ctypes.c_long)]


def late(*values: Tensor | None) -> tuple[list[Tensor | None], list[tuple[Tensor, Tensor]]]:
    """Places of the tensors that the kernel in front writes, NaN until then; and run()'s `last`. Views stay as is."""
    places, last = list(values), []
    for i, value in enumerate(values):
        if value is not None and value.is_contiguous():
            places[i] = torch.full_like(value, float("nan"))
            last.append((places[i], value))
    return places, last


def run(
    folder: Path, source: str, name: str, parameters: str, arguments: Sequence[Any], *,
    last: Sequence[tuple[Tensor, Tensor]] = (), gate: bool = False, **launch: int,
) -> None:  # fmt: skip
    """Launch kernel `name` of a source as kernels.hopper.kernel_text makes it; launch: grid, cluster, threads.

    parameters: the C types of the arguments; tensor maps go by pointer. last: what the kernel in front, which ends some
    time later, makes of the first of each two tensors. gate: the next kernel must not start before that, as
    kernels.launch says. A deadlock, or a place outside of shared memory, fails the test.
    """
    macros = "".join(re.findall(r"^#define .*\n", source, re.MULTILINE))
    find = lambda product: re.search(rf"void {product}\(.*?m64n(\d+)k16", source, re.DOTALL)
    columns, value_columns = (width[1] if width else 8 for width in map(find, ("wgmma", "wgmma_values")))
    instructions = INSTRUCTIONS.read_text(encoding="utf-8")
    kernel = instructions.partition("the same on a CPU:\n")[2] + source.partition(instructions)[2]
    kernel = kernel.replace("extern __shared__ char memory[];", "char* memory = dynamic_shared();")
    types = [text.strip() for text in parameters.split(",")]
    declared = ", ".join(f"{text} a{i}" for i, text in enumerate(types))
    passed = ", ".join(f"*a{i}" if text == "TensorMap*" else f"a{i}" for i, text in enumerate(types))
    main = f"""
extern "C" const char* run(int grid, int cluster, int threads, {declared}) {{
  return launch(grid, cluster, threads, [=] {{ {name}({passed}); }});
}}
extern "C" void last_kernel(int count, const Write* writes) {{ last_writes.assign(writes, writes + count); }}
extern "C" bool early() {{ return next_started_early; }}
"""
    macros += f"#define COLUMNS {columns}\n#define VALUE_COLUMNS {value_columns}\n"
    text = f'{macros}#include "{HEADER}"\n{kernel}\n{main}'
    path = folder / f"{abs(hash(text)):x}.cpp"
    library = path.with_suffix(".so")
    if not library.exists():
        path.write_text(text)
        command = ["g++", "-O1", "-std=c++17", "-shared", "-fPIC", "-w", "-o", str(library), str(path)]
        subprocess.run(command, check=True, timeout=120)
    sizes = [ctypes.c_int(launch[key]) for key in ("grid", "cluster", "threads")]
    passed_maps = [ctypes.byref(value) if isinstance(value, TensorMap) else value for value in arguments]
    compiled = ctypes.CDLL(str(library))
    assert all(to.is_contiguous() and value.is_contiguous() and to.nbytes == value.nbytes for to, value in last)
    writes = [_Write(to.data_ptr(), value.data_ptr(), to.nbytes) for to, value in last]
    compiled.last_kernel(len(writes), (_Write * len(writes))(*writes))
    compiled.run.restype, compiled.early.restype = ctypes.c_char_p, ctypes.c_bool
    failure = compiled.run(*sizes, *passed_maps)
    if failure:
        pytest.fail(f"{name}: {failure.decode()}")
    if gate and compiled.early():
        pytest.fail(f"{name} let the next kernel start before it had waited for the one in front")
