"""Communicator: what one rank can ask of the others. Solo is the rank that has no others; Gloo runs on CPUs."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor

from engine.errors import ExecutorDied
from engine.parallel.meeting import address_towards, meet


class Communicator(Protocol):
    """Collectives over a fixed group of ranks. Every rank calls the same ones in the same order."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, the same bits on each; `tensor` (contiguous) may be overwritten by it."""
        ...

    def all_reduce_add_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor] | None:
        """total = (the sum of x over all ranks) + residual: (RMSNorm(total) * weight, total), in one kernel.

        None where there is no such kernel for this message; nothing was done then, on any rank.
        """
        ...

    def all_gather(self, tensor: Tensor, dim: int = -1) -> Tensor:
        """Every rank's `tensor` (of one shape), in rank order along `dim`; a new tensor unless there is one rank."""
        ...

    def barrier(self) -> None:
        """Return once every rank has called it."""
        ...

    def close(self) -> None:
        """Leave the group. Idempotent."""
        ...


class Solo:
    """The only rank: collectives give back what they get."""

    rank = 0
    size = 1

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor

    def all_reduce_add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:  # noqa: ARG002
        return None

    def all_gather(self, tensor: Tensor, dim: int = -1) -> Tensor:  # noqa: ARG002
        return tensor

    def barrier(self) -> None:
        pass

    def close(self) -> None:
        pass


class Gloo:
    """Ranks on CPUs, over TCP. Its own process group: nothing global, several may live in one process.

    Rank 0 serves the meeting place at `address`. Raises ExecutorDied when the ranks do not meet within `timeout_s`, or
    when a collective fails or takes longer: the others are gone.
    """

    def __init__(self, rank: int, size: int, address: str, timeout_s: float) -> None:
        self.rank = rank
        self.size = size
        dist: Any = torch.distributed  # its stubs leave out what is used here
        try:
            self._store: Any = meet(rank, size, address, timeout_s)
            options = dist.ProcessGroupGloo._Options()
            options._timeout = timedelta(seconds=timeout_s)
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=address_towards(address))]
            self._group: Any = dist.ProcessGroupGloo(self._store, rank, size, options)
            # One that has all its connections, and leaves, would cut those that others are still making.
            self._group.barrier().wait()
        except (RuntimeError, OSError, ValueError) as error:
            raise ExecutorDied(
                f"rank {rank} of {size} did not meet the others at {address} within {timeout_s:g} s: {error}",
                ranks=(rank,),
            ) from error

    def all_reduce(self, tensor: Tensor) -> Tensor:
        self._wait(self._group.allreduce([tensor]))
        return tensor

    def all_reduce_add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:  # noqa: ARG002
        return None

    def all_gather(self, tensor: Tensor, dim: int = -1) -> Tensor:
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        self._wait(self._group.allgather([parts], [tensor]))
        return torch.cat(parts, dim=dim)

    def barrier(self) -> None:
        self._wait(self._group.barrier())

    def close(self) -> None:
        self._group = self._store = None

    def _wait(self, work: Any) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise ExecutorDied(f"rank {self.rank}: a collective failed: {error}") from error
