"""ResidualStream: the sum that runs through a transformer's layers, and the norms and products next to it.

What a layer adds may wait until the next norm needs the sum: then both are one kernel. Where a product can add to the
stream itself, or normalise what it reads, that is one kernel instead; with several ranks the sum over them joins in.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from engine.layers.linear import ColumnParallelLinear, RowParallelLinear
from engine.layers.norm import RMSNorm
from kernels.launch import gate
from kernels.linear import (
    linear_add,
    linear_add_for_norm,
    norm_linear,
    norm_linear_silu_and_mul,
    scaled_linear,
    scaled_linear_silu_and_mul,
)
from kernels.registry import Kernel, fits


class ResidualStream:
    """Of T tokens, [T, hidden_size], whole on every rank; of fewer once `keep` has chosen."""

    def __init__(self, x: Tensor) -> None:
        self._total = x
        self._pending: Tensor | None = None
        """To be added to the total."""
        self._source: RowParallelLinear | None = None
        """Whose ranks' partial sums are pending; None where they are summed already."""
        self._product: tuple[Tensor, Tensor] | None = None
        """A product, x and weight, to be added to the total: once the norm behind it is known, which may join in."""

    def normed(self, norm: RMSNorm) -> Tensor:
        """norm(stream)."""
        self._add_product()
        if self._pending is None:
            return norm(self._total)
        pending, source, self._pending = self._pending, self._source, None
        if source is not None:
            communicator = source.place.communicator
            together = communicator.all_reduce_add_norm(pending, self._total, norm.weight, norm.eps)
            if together is not None:
                out, self._total = together
                return out
            pending = communicator.all_reduce(pending)
        out, self._total = norm.add(pending, self._total)
        return out

    def into(self, norm: RMSNorm, linear: ColumnParallelLinear) -> Tensor:
        """linear(norm(stream)), the product a kernels.launch.gate()."""
        behind = (norm.eps, linear.weight, linear.bias)
        if self._joins(norm, scaled_linear, *behind):
            unscaled = self._unscaled(norm)
            with gate():
                return scaled_linear(*unscaled, *behind)  # type: ignore[no-any-return]
        self._add_product()
        if self._pending is None and fits(norm_linear, self._total, norm.weight, *behind):
            with gate():
                return norm_linear(self._total, norm.weight, *behind)  # type: ignore[no-any-return]
        normed = self.normed(norm)
        with gate():
            return linear(normed)

    def into_gated(self, norm: RMSNorm, linear: ColumnParallelLinear) -> Tensor:
        """silu(gate) * up, where gate and up are the halves of linear(norm(stream))."""
        if linear.bias is None:
            behind = (norm.eps, linear.weight)
            if self._joins(norm, scaled_linear_silu_and_mul, *behind):
                return scaled_linear_silu_and_mul(*self._unscaled(norm), *behind)  # type: ignore[no-any-return]
            self._add_product()
            if self._pending is None and fits(norm_linear_silu_and_mul, self._total, norm.weight, *behind):
                return norm_linear_silu_and_mul(self._total, norm.weight, *behind)  # type: ignore[no-any-return]
        return linear.gated(self.normed(norm))

    def add(self, linear: RowParallelLinear, x: Tensor) -> None:
        """stream += linear(x)."""
        assert self._pending is None and self._product is None
        if linear.place.size == 1 and linear.bias is None and fits(linear_add, x, linear.weight, self._total):
            self._product = x, linear.weight
        else:
            self._pending = linear.partial(x)
            self._source = linear if linear.place.size > 1 else None

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, [R] int64, in their order. Comes after `into` or `normed`, before the next `add`."""
        assert self._pending is None and self._product is None, "what waits to be added has all rows"
        self._total = self._total.index_select(0, rows)

    def _add_product(self) -> None:
        if self._product is not None:
            self._total = linear_add(*self._product, self._total)
            self._product = None

    def _joins(self, norm: RMSNorm, product: Kernel, *behind: Any) -> bool:
        """Whether the norm joins in with the product in front of it and with the one behind."""
        if self._product is None or not fits(linear_add_for_norm, *self._product, self._total, norm.weight):
            return False
        # Of the shape that the normalised stream will have.
        both: bool = fits(product, self._total, None, *behind)
        return both

    def _unscaled(self, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        """Add the product; the stream times the norm's weight, and its square sums."""
        assert self._product is not None
        self._total, scaled, square_sums = linear_add_for_norm(*self._product, self._total, norm.weight)
        self._product = None
        return scaled, square_sums
