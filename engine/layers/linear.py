"""Linear layers split over the ranks: by columns (outputs) going in, by rows (inputs) coming out."""

from __future__ import annotations

from torch import Tensor

from engine.layers.place import NamedWeights, Place, WeightSlice
from kernels.activation import silu_and_mul
from kernels.linear import linear, linear_silu_and_mul


class ColumnParallelLinear:
    """y = x Wᵀ + b, each rank computing its share of the outputs of several matrices stacked into one.

    x [T, in_size] -> [T, out_size], this rank's rows of the first part, then of the second, … `parts` gives each
    matrix of the checkpoint, by name, its whole number of outputs (a multiple of the ranks).
    """

    def __init__(self, place: Place, in_size: int, parts: dict[str, int], *, bias: bool = False) -> None:
        self.place, self.in_size, self.parts = place, in_size, parts
        self.sizes = [size // place.size for size in parts.values()]
        assert all(size % place.size == 0 for size in parts.values())
        self.weight = place.empty(sum(self.sizes), in_size)
        self.bias = place.empty(sum(self.sizes)) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = linear(x, self.weight, self.bias)
        return out

    def gated(self, x: Tensor) -> Tensor:
        """silu(gate) * up, for a layer whose two parts of one size are gate and up; [T, out_size / 2]."""
        out: Tensor = silu_and_mul(self(x)) if self.bias is not None else linear_silu_and_mul(x, self.weight)
        return out

    def weights(self) -> NamedWeights:
        row = 0
        for (name, whole), size in zip(self.parts.items(), self.sizes, strict=True):
            start = self.place.rank * size
            yield f"{name}.weight", WeightSlice(self.weight[row : row + size], (whole, self.in_size), 0, start)
            if self.bias is not None:
                yield f"{name}.bias", WeightSlice(self.bias[row : row + size], (whole,), 0, start)
            row += size


class RowParallelLinear:
    """y = x Wᵀ + b over inputs split as a column-parallel layer left them; the ranks' partial sums are added.

    x [T, in_size / ranks] -> [T, out_size], whole on every rank. The bias is rank 0's to add.
    """

    def __init__(self, place: Place, in_size: int, out_size: int, name: str, *, bias: bool = False) -> None:
        assert in_size % place.size == 0
        self.place, self.shape, self.name = place, (out_size, in_size), name
        self.weight = place.empty(out_size, in_size // place.size)
        self.bias = place.empty(out_size) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        return self.place.communicator.all_reduce(self.partial(x))

    def partial(self, x: Tensor) -> Tensor:
        """This rank's part of the sum."""
        out: Tensor = linear(x, self.weight, self.bias if self.place.rank == 0 else None)
        return out

    def weights(self) -> NamedWeights:
        start = self.place.rank * self.weight.shape[1]
        yield f"{self.name}.weight", WeightSlice(self.weight, self.shape, 1, start)
        if self.bias is not None:
            yield f"{self.name}.bias", WeightSlice(self.bias, self.shape[:1])
