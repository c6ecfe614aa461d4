"""CUDA C++ kernels: compiled at run time by NVRTC, kept on disk, loaded and launched through the driver.

Everything goes through ctypes: NVRTC comes with torch's CUDA wheels (or a CUDA toolkit), the driver's library with the
driver. Compiled kernels are kept in Triton's cache folder (TRITON_CACHE_DIR, else ~/.triton/cache), in manta/cubins,
named by the hash of all that went into them.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HOPPER = "sm_90a"
_OPTIONS = ("--std=c++17", "--device-as-default-execution-space")


class CudaError(RuntimeError):
    """NVRTC or the driver refused a call."""


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    return Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache") / "manta" / "cubins"


@cache
def nvrtc() -> ctypes.CDLL | None:
    """NVRTC's library: on the loader's path, from torch's wheels or from a toolkit; None where there is none."""
    names = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    found = [str(path) for folder in folders for path in sorted(folder.glob("*/lib/libnvrtc.so.*"))]
    toolkits = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    found += [str(Path(home, "lib64", names[-1])) for home in toolkits if home]
    for name in [*names, *found]:
        try:
            if name in found:  # its builtins it looks for by name, on the loader's path only
                for builtins in sorted(Path(name).parent.glob("libnvrtc-builtins.so.*")):
                    ctypes.CDLL(str(builtins))
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


@cache
def nvrtc_version() -> tuple[int, int]:
    """(0, 0) where there is none."""
    library, major, minor = nvrtc(), ctypes.c_int(), ctypes.c_int()
    if library is None:
        return 0, 0
    _check_nvrtc(library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


def compile_cubin(source: str, architecture: str = HOPPER) -> bytes:
    """The machine code of a source, from the cache or compiled now and put there. Needs no GPU; safe in threads.

    Raises CudaError with the compiler's log.
    """
    options = (f"--gpu-architecture={architecture}", *_OPTIONS)
    key = hashlib.sha256("\n".join((*options, source)).encode()).hexdigest()[:32]
    path = cache_folder() / f"{key}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        cubin = _compile(source, options)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(cubin)
        os.replace(file.name, path)
    except OSError:
        pass  # the next process compiles again
    return cubin


def _compile(source: str, options: Sequence[str]) -> bytes:
    library = nvrtc()
    if library is None:
        raise CudaError("libnvrtc was not found: install nvidia-cuda-nvrtc, or set CUDA_HOME")
    program = ctypes.c_void_p()
    _check_nvrtc(library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None))
    try:
        texts = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        failed = library.nvrtcCompileProgram(program, len(options), texts)
        size = ctypes.c_size_t()
        if failed:
            library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            library.nvrtcGetProgramLog(program, log)
            raise CudaError(f"NVRTC: {log.value.decode(errors='replace')}")
        _check_nvrtc(library.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        cubin = ctypes.create_string_buffer(size.value)
        _check_nvrtc(library.nvrtcGetCUBIN(program, cubin))
        return cubin.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _check_nvrtc(code: int) -> None:
    if code:
        raise CudaError(f"NVRTC: error {code}")


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(code: int) -> None:
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        raise CudaError(f"CUDA: {(text.value or b'unknown error').decode()} ({code})")


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16)]


class _LaunchConfig(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    ]


_CLUSTER_DIMENSION, _PROGRAMMATIC_STREAM_SERIALIZATION = 4, 6
_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8


class TensorMap(ctypes.Structure):
    """A CUtensorMap: where the bulk copy engine finds a tensor, and the boxes it takes from it. Passed by value."""

    _fields_ = [("words", ctypes.c_uint64 * 16)]


@lru_cache(maxsize=8192)
def _tensor_map(
    address: int, half: bool, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]
) -> TensorMap:  # fmt: skip
    """Sizes, strides (all but the first's, in bytes) and the box are listed from the dimension that is contiguous."""
    raw = ctypes.create_string_buffer(128 + 64)  # the driver wants 64-byte alignment
    place = (ctypes.addressof(raw) + 63) // 64 * 64
    rank, u64, u32 = len(sizes), ctypes.c_uint64, ctypes.c_uint32
    type_, none, swizzle_128, promote_256 = (6 if half else 9), 0, 3, 3
    _check(
        _driver().cuTensorMapEncodeTiled(
            ctypes.c_void_p(place), type_, rank, ctypes.c_void_p(address), (u64 * rank)(*sizes),
            (u64 * (rank - 1))(*strides), (u32 * rank)(*box), (u32 * rank)(*[1] * rank), none, swizzle_128,
            promote_256, none,
        )
    )  # fmt: skip
    return TensorMap.from_buffer_copy(ctypes.string_at(place, 128))


def tensor_map(x: Tensor, box_rows: int) -> TensorMap:
    """The map of a float16 or bfloat16 matrix [rows, K] for boxes of `box_rows` rows by 64 columns, 128-byte swizzle.

    Rows start at multiples of 16 bytes. What a box has outside of the matrix reads as zero.
    """
    assert x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0 and x.stride(1) == 1 and 0 < box_rows <= 256
    sizes, strides = (x.shape[1], x.shape[0]), (2 * x.stride(0),)
    return _tensor_map(x.data_ptr(), x.dtype == torch.float16, sizes, strides, (64, box_rows))


def halves_map(x: Tensor, box_runs: int) -> TensorMap:
    """The same of a matrix of two halves [2R, K], R a multiple of 8: a box has `box_runs` times 8 rows of each.

    In shared memory 8 rows of the first half are followed by the same 8 of the second, and so on. Coordinates: K, row
    of 8, half, run of 8 rows.
    """
    rows, stride = x.shape[0] // 2, 2 * x.stride(0)
    assert x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0 and x.stride(1) == 1 and x.shape[0] % 16 == 0
    sizes, strides = (x.shape[1], 8, 2, rows // 8), (stride, rows * stride, 8 * stride)
    return _tensor_map(x.data_ptr(), x.dtype == torch.float16, sizes, strides, (64, 8, 2, box_runs))


class CudaKernel:
    """One function of a source, for the devices it is launched on."""

    def __init__(
        self, source: str, name: str, *, threads: int, shared_bytes: int, cluster: int = 1, architecture: str = HOPPER
    ) -> None:  # fmt: skip
        self.source, self.name, self.architecture = source, name, architecture
        self.threads, self.shared_bytes, self.cluster = threads, shared_bytes, cluster
        self._functions: dict[int, ctypes.c_void_p] = {}

    def compile(self) -> bytes:
        """See that the machine code is in the cache; for threads at start, or processes without a GPU."""
        return compile_cubin(self.source, self.architecture)

    def _function(self, device: int) -> ctypes.c_void_p:
        if device not in self._functions:
            module, function = ctypes.c_void_p(), ctypes.c_void_p()
            driver = _driver()
            with torch.cuda.device(device):  # whose context the module is loaded into
                _check(driver.cuModuleLoadData(ctypes.byref(module), self.compile()))
                _check(driver.cuModuleGetFunction(ctypes.byref(function), module, self.name.encode()))
                _check(driver.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED_SIZE_BYTES, self.shared_bytes))
            self._functions[device] = function
        return self._functions[device]

    def max_clusters(self, device: torch.device) -> int:
        """How many clusters of blocks the device runs at one time."""
        function = self._function(device.index or 0)
        config, attributes = self._config(self.cluster, None, dependent=False)
        attributes[0].id, config.num_attributes = _CLUSTER_DIMENSION, 1
        attributes[0].value[0] = self.cluster
        attributes[0].value[1] = attributes[0].value[2] = 1
        count = ctypes.c_int()
        _check(_driver().cuOccupancyMaxActiveClusters(ctypes.byref(count), function, ctypes.byref(config)))
        return count.value

    def launch(self, device: torch.device, blocks: int, arguments: Sequence[Any], *, dependent: bool) -> None:
        """Queue `blocks` blocks on the device's current stream; arguments are ctypes values.

        dependent: they may start before the kernel in front has ended (kernels.launch has the rule).
        """
        function = self._function(device.index or 0)
        stream = torch.cuda.current_stream(device).cuda_stream
        config, _keep = self._config(blocks, stream, dependent=dependent)
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        _check(_driver().cuLaunchKernelEx(ctypes.byref(config), function, pointers, None))

    def _config(self, blocks: int, stream: int | None, *, dependent: bool) -> tuple[_LaunchConfig, Any]:
        attributes = (_Attribute * 1)()
        attributes[0].id, attributes[0].value[0] = _PROGRAMMATIC_STREAM_SERIALIZATION, 1
        config = _LaunchConfig(
            (blocks, 1, 1), (self.threads, 1, 1), self.shared_bytes, stream, attributes, 1 if dependent else 0
        )
        return config, attributes
