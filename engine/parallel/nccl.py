"""NCCL collectives between one process a GPU, through CuPy, on torch's current stream; CUDA graphs capture them."""

from __future__ import annotations

import ast
import threading
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import Store

from engine.errors import ConfigError, ExecutorDied


def _cupy_nccl() -> Any:
    try:
        from cupy.cuda import nccl
    except ImportError as error:
        raise ConfigError(
            "tensor_parallel_size", "more than one GPU", f"needs CuPy with NCCL (pip install cupy-cuda13x): {error}"
        ) from error
    if not getattr(nccl, "available", False):
        raise ConfigError("tensor_parallel_size", "more than one GPU", "this CuPy was built without NCCL")
    return nccl


def _data_types(nccl: Any) -> dict[torch.dtype, int]:
    types = {
        torch.float32: nccl.NCCL_FLOAT32,
        torch.float16: nccl.NCCL_FLOAT16,
        torch.bfloat16: nccl.NCCL_BFLOAT16,
        torch.int32: nccl.NCCL_INT32,
        torch.int64: nccl.NCCL_INT64,
        torch.uint8: nccl.NCCL_UINT8,
    }
    return {dtype: int(code) for dtype, code in types.items()}


class Nccl:
    """A Communicator over one GPU a rank. Every call is queued on torch's current stream and returns at once."""

    def __init__(self, rank: int, size: int, store: Store, device: torch.device, timeout_s: float) -> None:
        """Join `size` ranks that share `store`; collective.

        The calling thread's current device becomes `device`. Raises ExecutorDied when a rank has not come after
        timeout_s.
        """
        nccl = _cupy_nccl()
        self.rank, self.size, self.device = rank, size, device
        self._types, self._sum = _data_types(nccl), int(nccl.NCCL_SUM)
        torch.cuda.set_device(device)
        key = "nccl/unique_id"
        if rank == 0:
            store.set(key, repr(nccl.get_unique_id()))
        # Bytes or a tuple of C chars, by CuPy's version: a literal either way.
        unique_id = ast.literal_eval(store.get(key).decode())
        self._comm: Any = _join(nccl, size, unique_id, rank, device, timeout_s)
        self._token = torch.zeros(1, dtype=torch.int32, device=device)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over the ranks, in place; returns it. It must be contiguous."""
        assert tensor.is_contiguous()
        pointer = tensor.data_ptr()
        self._comm.allReduce(pointer, pointer, tensor.numel(), self._types[tensor.dtype], self._sum, self._stream())
        return tensor

    def all_reduce_add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:  # noqa: ARG002
        return None

    def all_gather(self, tensor: Tensor, dim: int = -1) -> Tensor:
        """Concatenate the ranks' equally shaped tensors along `dim`, in rank order. Returns a new tensor."""
        tensor = tensor.contiguous()
        parts = torch.empty((self.size, *tensor.shape), dtype=tensor.dtype, device=tensor.device)
        self._comm.allGather(
            tensor.data_ptr(), parts.data_ptr(), tensor.numel(), self._types[tensor.dtype], self._stream()
        )
        dim %= tensor.dim()
        shape = list(tensor.shape)
        shape[dim] *= self.size
        return parts.movedim(0, dim).reshape(shape)

    def barrier(self) -> None:
        """Wait, on the host, until every rank's earlier GPU work is done."""
        self.all_reduce(self._token)
        torch.cuda.current_stream().synchronize()

    def close(self) -> None:
        """Leave the group without waiting for the others. Idempotent."""
        comm, self._comm = self._comm, None
        if comm is not None:
            comm.abort()

    @staticmethod
    def _stream() -> int:
        return int(torch.cuda.current_stream().cuda_stream)


def _join(
    nccl: Any, size: int, unique_id: bytes | tuple[int, ...], rank: int, device: torch.device, timeout_s: float
) -> Any:
    """ncclCommInitRank on a thread of its own, so that a missing rank cannot hold this one for ever."""
    outcome: list[Any] = []

    def join() -> None:
        try:
            torch.cuda.set_device(device)
            outcome.append(nccl.NcclCommunicator(size, unique_id, rank))
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=join, name="nccl-join", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if not outcome:
        raise ExecutorDied(f"rank {rank} of {size} waited {timeout_s:.0f} s for the other ranks to join NCCL")
    if isinstance(outcome[0], Exception):
        raise ExecutorDied(f"rank {rank} of {size} could not join NCCL: {outcome[0]}") from outcome[0]
    return outcome[0]
