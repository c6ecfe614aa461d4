"""Matrix products on Hopper's matrix units (compute capability 9.0), for the tens to thousands of rows of large steps.

The kernel is linear_hopper.cu; here are its tiles and its launch. A tile has 64, 128 or 192 rows of x and any multiple
of 16 up to 256 columns, so that the tiles of one product fill the multiprocessors once or twice with little left over,
where a library's tiles of 128 x 256 leave a sixth of them idle. Where there are too few tiles K is split. Gate and up
are loaded as the two halves of one tile: the activation is applied before anything is written.
"""

from __future__ import annotations

import ctypes
import itertools
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from kernels.cuda_source import CudaKernel, tensor_map
from kernels.hopper import DEPTH, FIRST_OUT, KEPT, SHARED_BYTES, kernel_text
from kernels.launch import compile_in_rehearsal, dependent_launch, gating, num_multiprocessors

MAX_TILES = 4096
LEAST_GATED_SHARE, LEAST_SHARE = 0.6, 0.35
"""Of the matrix units' time that a product must use, by the estimate of `_cycles`, to be worth it."""
LONG_K = 8192
MOST_GROUPS = 4
"""Of 64 rows, in products that are not gated; with more the library's are as fast."""


@dataclass(frozen=True)
class Tile:
    """What one kernel is compiled for. A block multiplies 64 * groups rows by `width` columns; clusters of blocks."""

    groups: int
    width: int
    cluster_m: int
    cluster_n: int
    gated: bool = False
    half: bool = False
    normed: bool = False
    norms: bool = False
    splits: int = 1

    @property
    def rows(self) -> int:
        """Rows of a cluster's tile."""
        return 64 * self.groups * self.cluster_m

    @property
    def columns(self) -> int:
        """Columns of the result that a cluster's tile has."""
        return self.width * self.cluster_n // (2 if self.gated else 1)

    @property
    def stage_bytes(self) -> int:
        return (64 * self.groups + self.width) * DEPTH * 2

    @property
    def stages(self) -> int:
        """As many as shared memory holds, beside the barriers and the alignment."""
        return min(8, (SHARED_BYTES - 1024 - 128 - 256 * self.groups * self.normed) // self.stage_bytes)

    @property
    def parts(self) -> int:
        """Products a step of 16: with 3 groups an instruction may not be wider than 192, or registers run out."""
        return 2 if self.groups == 3 and self.width > 192 else 1

    @property
    def can_split(self) -> bool:
        return not self.gated and self.width % 32 == 0

    def source(self) -> str:
        """The kernel's text, whole."""
        values = {
            "GROUPS": self.groups, "WIDTH": self.width, "PARTS": self.parts, "STAGES": self.stages,
            "CM": self.cluster_m, "CN": self.cluster_n, "GATED": int(self.gated), "HALF": int(self.half),
            "NORMED": int(self.normed), "NORMS": int(self.norms), "SPLITS": self.splits,
        }  # fmt: skip
        return kernel_text("linear_hopper", values, self.width // self.parts)


@cache
def tile_kernel(tile: Tile) -> CudaKernel:
    return CudaKernel(
        tile.source(),
        "product",
        threads=128 * (tile.groups + 1),
        shared_bytes=tile.stages * tile.stage_bytes + 1024 + 16 * tile.stages + 256 * tile.groups * tile.normed,
        cluster=tile.cluster_m * tile.cluster_n,
    )


@cache
def _max_clusters(tile: Tile, device: torch.device) -> int:
    return tile_kernel(tile).max_clusters(device)


@cache
def _workspace(device: torch.device) -> tuple[Tensor, Tensor]:
    """Partial sums of split products, and counters of arrived splits, zero between launches.

    Products of one device share one stream. The first one runs outside of a recording, which would not set them.
    """
    partial = torch.empty(num_multiprocessors(device) * 192 * 256, dtype=torch.float32, device=device)
    return partial, torch.zeros(MAX_TILES, dtype=torch.int32, device=device)


@dataclass(frozen=True)
class HopperConfig:
    """How a product is cut: tiles, and ranges of K."""

    groups: int
    width: int
    cluster_m: int = 2
    cluster_n: int = 1
    splits: int = 1

    def tile(self, size: int, *, gated: bool, half: bool, normed: bool = False, norms: bool = False) -> Tile:
        """Of a product of this K; one stage of it is not split."""
        splits = self.splits if self.splits <= -(-size // DEPTH) else 1
        return Tile(self.groups, self.width, self.cluster_m, self.cluster_n, gated, half, normed, norms, splits)

    def product(
        self,
        x: Tensor,
        weight: Tensor,
        *,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        act: str = "",
        square_sums: Tensor | None = None,
        eps: float = 0.0,
    ) -> Tensor:
        """x [M, K] times weight [N, K] transposed, plus bias and residual; with act "silu", weight is [2N, K].

        square_sums [parts, M] float32: x is a residual stream times an RMSNorm's weight, and these are its sums of
        squares, by parts: the norm's scale is applied to the result.
        """
        return self._launch(x, weight, bias, residual, act, square_sums, eps, None)[0]

    def product_for_norm(
        self, x: Tensor, weight: Tensor, residual: Tensor, norm_weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """The new residual stream, x times weight plus residual; it times norm_weight [N]; its sums [parts, M]."""
        out, scaled, square_sums = self._launch(x, weight, None, residual, "", None, 0.0, norm_weight)
        return out, scaled, square_sums

    def _launch(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, act: str,
        square_sums: Tensor | None, eps: float, next_norm: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        gated = act == "silu"
        assert act in ("", "silu") and not (gated and (bias is not None or residual is not None or self.splits > 1))
        (rows, size), half = x.shape, x.dtype == torch.float16
        tile = self.tile(size, gated=gated, half=half, normed=square_sums is not None, norms=next_norm is not None)
        assert tile.splits == 1 or tile.can_split
        kernel = tile_kernel(tile)
        columns = weight.shape[0] // (2 if gated else 1)
        out = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
        if x.is_meta:
            compile_in_rehearsal("kernels.linear_hopper.product", repr(tile), kernel.compile)
        tiles_m, tiles_n, steps = -(-rows // tile.rows), -(-columns // tile.columns), -(-size // DEPTH)
        results: tuple[Tensor, ...] = (out,)
        if next_norm is not None:
            sums = torch.empty(tiles_n * self.cluster_n * tile.splits, rows, dtype=torch.float32, device=x.device)
            results = (out, torch.empty_like(out), sums)
        if x.is_meta or rows == 0:
            return results
        items, clusters = tiles_m * tiles_n * tile.splits, _max_clusters(tile, x.device)
        partial = arrived = None
        if tile.splits > 1:
            # Splits of one tile wait for each other; neighbours in the order of the work, they are under way together.
            assert items <= clusters and items * tile.cluster_m * tile.cluster_n <= MAX_TILES
            partial, arrived = (buffer.data_ptr() for buffer in _workspace(x.device))
        pointer, integer = ctypes.c_void_p, ctypes.c_int
        arguments = [
            tensor_map(x, 64 * self.groups // self.cluster_n),
            tensor_map(weight, self.width if self.cluster_m == 1 and not gated else self.width // 2),
            pointer(out.data_ptr()),
            pointer(bias.data_ptr() if bias is not None else None),
            pointer(residual.data_ptr() if residual is not None else None),
            pointer(partial),
            pointer(arrived),
            ctypes.c_longlong(columns),
            ctypes.c_longlong(residual.stride(0) if residual is not None else 0),
            *(integer(value) for value in (rows, columns, steps, tiles_m, tiles_n)),
            ctypes.c_uint64(KEPT),
            ctypes.c_uint64(FIRST_OUT if tiles_m == 1 else KEPT),
            pointer(square_sums.data_ptr() if square_sums is not None else None),
            integer(square_sums.shape[0] if square_sums is not None else 0),
            integer(size),
            ctypes.c_float(eps),
            pointer(next_norm.data_ptr() if next_norm is not None else None),
            *([pointer(tensor.data_ptr()) for tensor in results[1:]] or [pointer(), pointer()]),
            integer(gating()),
        ]
        blocks = min(items, clusters) * kernel.cluster
        kernel.launch(x.device, blocks, arguments, dependent=bool(dependent_launch(x)["PDL"]))
        return results


# Blocks: groups, and how a cluster's lie along rows and columns. More rows than 192 share what they load of weights.
_BLOCKS = {1: [(1, 1, 2)], 2: [(2, 1, 2)], 3: [(3, 1, 2)]}
_BLOCKS_OF_MORE_ROWS = [(2, 2, 1), (3, 2, 1), (2, 1, 2)]
_WIDTHS = (256, 224, 192, 160, 128, 112, 96, 80, 64)


def _tiles(tile: Tile, rows: int, columns: int) -> int:
    return -(-rows // tile.rows) * -(-columns // tile.columns)


def _cycles(tile: Tile, rows: int, columns: int, size: int, splits: int, multiprocessors: int) -> float:
    """What a product takes, roughly; `columns` of the result.

    A stage takes the matrix units' time, or what shared memory needs to be filled and to feed them at 128 bytes a
    cycle. Fitted to an H200 under its power limit: a tile's end, what partial sums cost that are written and read, and
    weights that the blocks of a cluster do not share.
    """
    stage_reads = 4 * tile.groups * (2048 * tile.parts + 32 * tile.width)
    stage = max(2 * tile.groups * tile.width, (stage_reads + tile.stage_bytes) / 128)
    waves = -(-_tiles(tile, rows, columns) * splits // (multiprocessors // (tile.cluster_m * tile.cluster_n)))
    cycles = waves * (-(-size // DEPTH) / splits * stage * (1.0 if tile.cluster_m == 2 else 1.12) + 2000)
    return cycles if splits == 1 else 1.12 * (cycles + 2 * (1 - 1 / splits) * 256 * tile.groups * tile.width / 8)


@lru_cache(maxsize=4096)
def choose(rows: int, weight_rows: int, size: int, gated: bool, multiprocessors: int) -> HopperConfig | None:
    """The config of a product, None where the library's is as fast.

    Gated products gain the activation's own pass, and take the tiles that fill the GPU best. Others are taken up to 256
    rows, where one wave of tiles with K split holds them and the library's smallest good tiles, 128 x 128, would not
    fill the GPU; up to 128 rows, which are a read of the weights, only a long K leaves the library far enough behind.
    """
    groups = -(-rows // 64)
    columns = weight_rows // 2 if gated else weight_rows
    if not gated:
        fills_library = -(-rows // 128) * -(-columns // 128) >= 0.9 * multiprocessors
        if groups > MOST_GROUPS or fills_library or (groups <= 2 and size < LONG_K):
            return None
    found: list[tuple[float, HopperConfig]] = []
    blocks = _BLOCKS.get(groups, _BLOCKS_OF_MORE_ROWS if gated else [(2, 2, 1)])
    for (tile_groups, cluster_m, cluster_n), width, splits in itertools.product(blocks, _WIDTHS, (1, 2, 4)):
        if cluster_m == 2 and width < 96:
            continue  # as fast by itself, but it draws more power, which the rest of a step then lacks
        tile = Tile(tile_groups, width, cluster_m, cluster_n, gated)
        one_wave = _tiles(tile, rows, columns) * splits * cluster_m * cluster_n <= multiprocessors
        if (splits > 1 and not tile.can_split) or (not one_wave and not (gated and splits == 1)):
            continue
        if cluster_m == 1 and groups % tile_groups:
            continue  # seen to be slow: a block of fewer groups runs ahead of those that read the same weights
        cycles = _cycles(tile, rows, columns, size, splits, multiprocessors)
        found.append((cycles, HopperConfig(tile_groups, width, cluster_m, cluster_n, splits)))
    if not found:
        return None
    cycles, config = min(found, key=lambda pair: pair[0])
    least = groups * weight_rows * 2 * -(-size // DEPTH) / multiprocessors
    return config if least / cycles > (LEAST_GATED_SHARE if gated else LEAST_SHARE) else None
