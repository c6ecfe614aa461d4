"""Place: where a rank's layers live, and how they share the work with the other ranks'."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.parallel.communicator import Communicator


@dataclass(frozen=True)
class Place:
    """Given to every layer when it is made."""

    device: torch.device
    dtype: torch.dtype
    communicator: Communicator

    @property
    def rank(self) -> int:
        return self.communicator.rank

    @property
    def size(self) -> int:
        return self.communicator.size

    def empty(self, *shape: int) -> Tensor:
        """An uninitialised weight."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class WeightSlice:
    """Where a tensor of the checkpoint goes: this rank's slice [start, start + n) of dimension `dim` fills `target`.

    `target` has the slice's shape or more rows along `dim` (the vocabulary is padded): the rest becomes zeros.
    """

    target: Tensor
    shape: tuple[int, ...]
    """Of the whole tensor in the checkpoint."""
    dim: int = 0
    start: int = 0

    @property
    def count(self) -> int:
        """Length of the slice along `dim`; less than target's where the checkpoint's tensor ends."""
        return max(0, min(self.target.shape[self.dim], self.shape[self.dim] - self.start))


NamedWeights = Iterator[tuple[str, WeightSlice]]


def under(prefix: str, weights: Iterable[tuple[str, WeightSlice]]) -> NamedWeights:
    """The same weights, their names below `prefix`."""
    for name, weight in weights:
        yield f"{prefix}.{name}", weight
