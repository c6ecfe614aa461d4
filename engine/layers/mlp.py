"""The gated MLP of Llama and its kin: down(silu(gate(x)) * up(x))."""

from __future__ import annotations

from torch import Tensor

from engine.layers.linear import ColumnParallelLinear, RowParallelLinear
from engine.layers.place import NamedWeights, Place
from kernels.activation import silu_and_mul


class GatedMLP:
    """[T, hidden_size] -> [T, hidden_size]; gate and up are one product."""

    def __init__(self, place: Place, hidden_size: int, intermediate_size: int, *, bias: bool = False) -> None:
        parts = {"gate_proj": intermediate_size, "up_proj": intermediate_size}
        self.gate_up = ColumnParallelLinear(place, hidden_size, parts, bias=bias)
        self.down = RowParallelLinear(place, intermediate_size, hidden_size, "down_proj", bias=bias)

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(silu_and_mul(self.gate_up(x)))

    def weights(self) -> NamedWeights:
        yield from self.gate_up.weights()
        yield from self.down.weights()
