"""RMSNorm, alone or with the residual stream's addition in front."""

from __future__ import annotations

from torch import Tensor

from engine.layers.place import NamedWeights, Place, WeightSlice
from kernels.rms_norm import fused_add_rms_norm, rms_norm


class RMSNorm:
    """x / rms(x) * weight over the last dimension."""

    def __init__(self, place: Place, size: int, eps: float) -> None:
        self.weight, self.eps = place.empty(size), eps

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = rms_norm(x, self.weight, self.eps)
        return out

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of x + residual, x + residual)."""
        normed, total = fused_add_rms_norm(x, residual, self.weight, self.eps)
        return normed, total

    def weights(self) -> NamedWeights:
        yield "weight", WeightSlice(self.weight, tuple(self.weight.shape))
