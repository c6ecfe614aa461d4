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


def blocks_map(cache: Tensor, box_tokens: int) -> TensorMap:
    """As kernels.cuda_source.blocks_map."""
    blocks, block_size, heads, head_dim = cache.shape
    runs = heads * head_dim // 64
    strides = (2 * cache.stride(1), 128, 2 * cache.stride(0))
    return _map(cache, (64, block_size, runs, blocks), strides, (64, box_tokens, runs, 1))


def pointer(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def run(folder: Path, source: str, name: str, parameters: str, arguments: Sequence[Any], **launch: int) -> None:
    """Launch kernel `name` of a source as kernels.hopper.kernel_text makes it; launch: grid, cluster, threads.

    parameters: the C types of the arguments; tensor maps go by pointer. A deadlock, or a place outside of shared
    memory, fails the test.
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
    function = ctypes.CDLL(str(library)).run
    function.restype = ctypes.c_char_p
    failure = function(*sizes, *passed_maps)
    if failure:
        pytest.fail(f"{name}: {failure.decode()}")
