"""Which product runs at which number of rows: the measured table behind kernels.linear.

Measured on an NVIDIA H200 by `python -m scripts.check_kernels --tune` (see BENCHMARKS.md). A row holds up to its number
of rows M; past the last one the library's product is faster.
"""

from __future__ import annotations

from kernels.linear_stream import LinearConfig

# operation -> [(largest M, config)], in order of M.
TABLE: dict[str, list[tuple[int, LinearConfig]]] = {
    "linear": [
        (16, LinearConfig(16, 32, 256, 4, 4, 2, prefetch=256)),
        (32, LinearConfig(32, 64, 128, 4, 4, 2, swap=True)),
        (64, LinearConfig(64, 64, 128, 4, 4, 1)),
    ],
    "linear_add": [
        (16, LinearConfig(16, 32, 256, 4, 4, 2, prefetch=256)),
        (32, LinearConfig(32, 64, 128, 4, 4, 2, swap=True)),
        (64, LinearConfig(64, 64, 128, 4, 4, 1)),
    ],
    "norm_linear": [(16, LinearConfig(16, 32, 256, 4, 4, 2, prefetch=256))],
    "norm_linear_silu_and_mul": [(16, LinearConfig(16, 32, 256, 4, 3, 2, prefetch=256))],
    "linear_silu_and_mul": [
        (16, LinearConfig(16, 32, 256, 4, 3, 2, prefetch=256)),
        (64, LinearConfig(64, 64, 128, 4, 3, 1)),
    ],
}


def linear_config(operation: str, rows: int, num_columns: int, size: int) -> LinearConfig | None:
    """The config of a product of `rows` rows, weight [num_columns, size]; None where the library is faster."""
    if size % 8 or num_columns < 16:
        return None
    for largest, config in TABLE[operation]:
        if rows <= largest:
            return config
    return None
