"""All-reduce over peer memory for small messages, NCCL for the rest: between GPUs of one host, captured in CUDA graphs.

Buffers are shared through torch's symmetric memory (plain peer mappings, no multicast); the kernels are peer_kernels'.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch._C._distributed_c10d import Store

from engine.errors import ConfigError
from engine.parallel.nccl import Nccl
from engine.parallel.peer_kernels import SOURCE
from kernels.cuda_source import CudaKernel
from kernels.launch import capability, dependent_launch

Method = Literal["packets", "one_shot", "two_shot", "nccl"]

THREADS = 512
BLOCKS = 128
ROW_VECTORS = 4  # 16-byte vectors of a row that one thread of the fused kernels holds
PACKET_BYTES = 256 << 10  # room for packets of half as many bytes of data
DATA_BYTES = 16 << 20
FLAG_BYTES = 2 * BLOCKS * 8 * 4
MAX_RANKS = 8

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True)
class Limits:
    """The largest message, in bytes, that each method is the fastest for; above them NCCL is."""

    packets: int
    one_shot: int
    two_shot: int

    def __post_init__(self) -> None:
        assert self.packets * 2 <= PACKET_BYTES
        assert max(self.one_shot, self.two_shot) <= DATA_BYTES


# Measured on H200s with `python -m scripts.bench_collectives`, see BENCHMARKS.md.
_LIMITS = {2: Limits(128 << 10, 16 << 20, 16 << 20)}
_MORE_RANKS = Limits(64 << 10, 256 << 10, 8 << 20)


def choose(num_bytes: int, size: int) -> Method:
    """The fastest all-reduce of a message of `num_bytes` between `size` ranks."""
    limits = _LIMITS.get(size, _MORE_RANKS)
    if num_bytes <= limits.packets:
        return "packets"
    if num_bytes <= limits.one_shot:
        return "one_shot"
    if num_bytes <= limits.two_shot:
        return "two_shot"
    return "nccl"


def forced_method() -> Method | None:
    """MANTA_ALL_REDUCE, which overrules choose(). Raises ConfigError for a name that is not a method."""
    name = os.environ.get("MANTA_ALL_REDUCE") or None
    if name is not None and name not in get_args(Method):
        raise ConfigError("MANTA_ALL_REDUCE", name, f"allowed: {', '.join(get_args(Method))}")
    return name  # type: ignore[return-value]


class PeerMemory:
    """A Communicator that sums small messages itself and leaves the rest to `nccl`."""

    def __init__(self, nccl: Nccl, store: Store, method: Method | None = None) -> None:
        """Share the buffers; collective. `method`: use it for every message it can carry, whatever its size.

        Raises RuntimeError where the GPUs cannot map each other's memory, on every rank alike.
        """
        self.rank, self.size, self.device = nccl.rank, nccl.size, nccl.device
        self._nccl = nccl
        self._method = method
        if self.size > MAX_RANKS:
            raise RuntimeError(f"peer memory serves at most {MAX_RANKS} ranks, not {self.size}")
        self._buffer, pointers = self._share(store)
        self._peers = (pointers + [0] * MAX_RANKS)[:MAX_RANKS]
        self._state = torch.zeros(2, dtype=torch.int32, device=self.device)
        nccl.barrier()  # nobody sends before every buffer is zero

    def _share(self, store: Store) -> tuple[Any, list[int]]:
        """Allocate this rank's buffer and map the others'. Returns what keeps it alive, and every rank's address."""
        import torch.distributed._symmetric_memory as symmetric_memory

        num_bytes = FLAG_BYTES + 2 * self.size * PACKET_BYTES + 4 * DATA_BYTES
        buffer = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=self.device)
        buffer.zero_()
        torch.cuda.synchronize(self.device)
        handle = symmetric_memory.rendezvous(buffer, _world(store, self.rank, self.size))
        return (buffer, handle), list(handle.buffer_ptrs)

    def method(self, num_bytes: int) -> Method:
        """How a message of `num_bytes` is summed."""
        if num_bytes % 16 or num_bytes == 0:
            return "nccl"
        if self._method is None:
            return choose(num_bytes, self.size)
        room = {"packets": PACKET_BYTES // 2, "one_shot": DATA_BYTES, "two_shot": DATA_BYTES, "nccl": 0}
        return self._method if num_bytes <= room[self._method] else "nccl"

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over the ranks, in place; returns it. It must be contiguous."""
        num_bytes = tensor.numel() * tensor.element_size()
        method = self.method(num_bytes)
        if method == "nccl" or tensor.dtype not in _DTYPES or tensor.data_ptr() % 16:
            return self._nccl.all_reduce(tensor)
        assert tensor.is_contiguous()
        vectors = num_bytes // 16
        pointer = tensor.data_ptr()
        shared = -(-vectors // self.size) if method == "two_shot" else vectors
        blocks = min(BLOCKS, -(-shared // THREADS))
        self._launch(tensor.dtype, method, blocks, (pointer, pointer, vectors, self._state.data_ptr(), *self._peers))
        return tensor

    def all_reduce_add_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor] | None:
        """In one kernel, total = (sum of x over the ranks) + residual and RMSNorm(total) * weight.

        x, residual [T, H]; weight [H], all of one dtype. Returns (normalised, total), new tensors; None where the
        message is too large or the row too wide, and nothing was done.
        """
        rows, width = x.shape
        method = self.method(x.numel() * x.element_size())
        vectors, odd = divmod(width * x.element_size(), 16)
        if method not in ("packets", "one_shot") or odd or vectors > ROW_VECTORS * THREADS or x.dtype not in _DTYPES:
            return None
        assert x.is_contiguous() and residual.is_contiguous() and x.dtype == residual.dtype == weight.dtype
        normalised, total = torch.empty_like(x), torch.empty_like(x)
        pointers = (t.data_ptr() for t in (x, residual, weight, normalised, total))
        args = (*pointers, rows, vectors, eps, self._state.data_ptr(), *self._peers)
        self._launch(x.dtype, f"{method}_add_norm", min(BLOCKS, rows), args)
        return normalised, total

    def all_gather(self, tensor: Tensor, dim: int = -1) -> Tensor:
        """Concatenate the ranks' equally shaped tensors along `dim`, in rank order. Returns a new tensor."""
        return self._nccl.all_gather(tensor, dim)

    def barrier(self) -> None:
        """Wait, on the host, until every rank's earlier GPU work is done."""
        self._nccl.barrier()

    def close(self) -> None:
        """Leave the group without waiting for the others. Idempotent."""
        self._nccl.close()

    def _launch(self, dtype: torch.dtype, name: str, blocks: int, args: tuple[Any, ...]) -> None:
        kernel = peer_kernel(dtype, name, self.rank, self.size, capability(self.device))
        arguments = [ctypes.c_float(arg) if isinstance(arg, float) else ctypes.c_longlong(arg) for arg in args]
        kernel.launch(self.device, blocks, arguments, dependent=bool(dependent_launch(self._state)["PDL"]))


@cache
def peer_kernel(dtype: torch.dtype, name: str, rank: int, size: int, capability: tuple[int, int]) -> CudaKernel:
    """One of peer_kernels' functions, for rank `rank` of `size`, on GPUs of this compute capability."""
    values = {
        "DTYPE": _DTYPES[dtype],
        "RANK": rank,
        "SIZE": size,
        "THREADS": THREADS,
        "BLOCKS": BLOCKS,
        "ROW_VECTORS": ROW_VECTORS,
        "PACKET_BYTES": PACKET_BYTES,
        "DATA_BYTES": DATA_BYTES,
    }
    macros = "".join(f"#define {macro} {value}\n" for macro, value in values.items())
    machine = f"sm_{capability[0]}{capability[1]}"
    return CudaKernel(macros + SOURCE, name, threads=THREADS, shared_bytes=0, architecture=machine)


def _world(store: Store, rank: int, size: int) -> Any:
    """This process's world of torch.distributed, which symmetric memory looks for; one rank a process."""
    world: Any = torch.distributed
    if not world.is_initialized():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this host
        world.init_process_group("gloo", store=world.PrefixStore("world", store), rank=rank, world_size=size)
    return world.group.WORLD

