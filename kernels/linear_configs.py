"""Which product runs at which shape: the measured table behind kernels.linear.

Measured on an NVIDIA H200 at Llama-3-8B's shapes (`python -m scripts.tune_kernels`, `python -m scripts.kernel_step
--tune`; see BENCHMARKS.md). Where no row holds, kernels.linear_hopper chooses; where that has none, or a row says None,
the library's product is faster.
"""

from __future__ import annotations

from dataclasses import dataclass

from kernels import linear_few
from kernels.hopper import uses
from kernels.linear_few import FewConfig
from kernels.linear_gemv import GemvConfig
from kernels.linear_hopper import HopperConfig, choose
from kernels.linear_stream import LinearConfig

ANY = 1 << 30
LEAST_HOPPER_ROWS = 17


@dataclass(frozen=True)
class Row:
    """Holds for up to this many rows of x and this K."""

    max_rows: int
    max_size: int
    config: GemvConfig | LinearConfig | None


_FEW = LinearConfig(16, 64, 256, 4, 4, 1, swap=True, prefetch=256)

# operation -> rows; the first that holds decides.
TABLE: dict[str, list[Row]] = {
    "linear": [Row(1, ANY, GemvConfig(2, 2048)), Row(16, ANY, _FEW)],
    "linear_add": [Row(1, ANY, GemvConfig(2, 2048)), Row(16, ANY, _FEW)],
    "norm_linear": [Row(1, ANY, GemvConfig(4, 4096, num_warps=8)), Row(16, ANY, _FEW)],
    "linear_silu_and_mul": [Row(1, ANY, GemvConfig(2, 4096))],
    "norm_linear_silu_and_mul": [Row(1, ANY, GemvConfig(2, 4096))],
}


Config = GemvConfig | LinearConfig | HopperConfig | FewConfig


def linear_config(
    operation: str, rows: int, num_columns: int, size: int, multiprocessors: int = 132, *, hopper: bool = False
) -> Config | None:  # fmt: skip
    """The config of a product of `rows` rows, weight [num_columns, size]; None where the library is faster.

    hopper: kernels.hopper.why_not has nothing against the device.
    """
    if size % 8 or num_columns < 16:
        return None
    if hopper and uses("few") and 1 < rows <= linear_few.MAX_ROWS:
        if operation.startswith("norm"):
            return None  # the norm by itself, then the product, is as fast or faster
        return linear_few.choose(rows, num_columns, size, "silu" in operation, multiprocessors)
    for row in TABLE[operation]:
        if rows <= row.max_rows and size <= row.max_size:
            return row.config
    if operation.startswith("norm") or rows < LEAST_HOPPER_ROWS or num_columns % 16:
        return None
    return choose(rows, num_columns, size, "silu" in operation, multiprocessors) if uses("products") else None
