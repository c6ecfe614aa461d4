"""Peers: a rank's communicator as the model keeps it, through changes of the group, counting its collectives."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

    from engine.parallel.communicator import Communicator

Result = TypeVar("Result")


class Peers:
    """A Communicator that can be replaced by one with other peers while the model keeps hold of this."""

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self.entered = self.left = 0
        """Collectives since `restart_count`."""

    @property
    def rank(self) -> int:
        return self._communicator.rank

    @property
    def size(self) -> int:
        return self._communicator.size

    @property
    def meeting(self) -> bool:
        """Whether this rank is in a collective now."""
        return self.entered > self.left

    def restart_count(self) -> None:
        """Count from 0, as every other rank of the group does now."""
        self.entered = self.left = 0

    def reconnect(self, connect: Callable[[], Communicator]) -> None:
        """Leave the group, so that whoever waits in it is told, and join the one that `connect` gives."""
        self._communicator.close()
        self._communicator = connect()

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return self._counted(lambda: self._communicator.all_reduce(tensor))

    def all_reduce_add_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor] | None:
        return self._communicator.all_reduce_add_norm(x, residual, weight, eps)

    def all_gather(self, tensor: Tensor, dim: int = -1) -> Tensor:
        return self._counted(lambda: self._communicator.all_gather(tensor, dim))

    def barrier(self) -> None:
        self._counted(self._communicator.barrier)

    def close(self) -> None:
        self._communicator.close()

    def _counted(self, collective: Callable[[], Result]) -> Result:
        self.entered += 1
        try:
            return collective()
        finally:
            self.left += 1
