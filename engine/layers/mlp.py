"""The gated MLP of Llama and its kin: down(silu(gate(x)) * up(x))."""

from __future__ import annotations

from engine.layers.linear import ColumnParallelLinear, RowParallelLinear
from engine.layers.norm import RMSNorm
from engine.layers.place import NamedWeights, Place
from engine.layers.residual import ResidualStream


class GatedMLP:
    """stream += down(silu(gate(n)) * up(n)) with n = norm(stream); gate and up are one product."""

    def __init__(self, place: Place, hidden_size: int, intermediate_size: int, *, bias: bool = False) -> None:
        parts = {"gate_proj": intermediate_size, "up_proj": intermediate_size}
        self.gate_up = ColumnParallelLinear(place, hidden_size, parts, bias=bias)
        self.down = RowParallelLinear(place, intermediate_size, hidden_size, "down_proj", bias=bias)

    def __call__(self, stream: ResidualStream, norm: RMSNorm) -> None:
        stream.add(self.down, stream.into_gated(norm, self.gate_up))

    def weights(self) -> NamedWeights:
        yield from self.gate_up.weights()
        yield from self.down.weights()
