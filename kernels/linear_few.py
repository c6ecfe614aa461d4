"""Matrix products with 2 to 64 rows on Hopper (compute capability 9.0): every multiprocessor streams its weights.

The kernel is linear_few.cu; here are its tiles and its launch. A product is cut so that all of it runs at one time,
one block a multiprocessor: into tiles of weight rows and, where those would be low, into parts of K, whose sums a
cluster of blocks adds up. A gated activation, a bias and a residual behind it join in.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from kernels.cuda_source import CudaKernel, halves_map, tensor_map
from kernels.hopper import DEPTH, FIRST_OUT, KEPT, kernel_text
from kernels.launch import compile_in_rehearsal, dependent_launch, gating, next_power_of_2

MAX_ROWS = 64
MAX_HEIGHT = 128
"""Of a tile; higher ones, of which half as many cover a weight, were slower."""
SHARED_BYTES = 113 * 1024
"""Of shared memory a block may have so that two fit on a multiprocessor."""
MAX_STAGES = 16
MANY_WAVES = 4
"""Of blocks, after which they no longer begin and end together."""
# Fitted to an H200, in elements that could be loaded meanwhile: a block's start and end, if it is a multiprocessor's
# only one, one of two, which hide each other's, or one of more; what a split costs, and more for each row.
ALONE_COST, PAIR_COST, BLOCK_COST = 15 * 4096, 4 * 4096, 9 * 4096
SPLIT_COST, SPLIT_ROW_COST = 6000, 570


@dataclass(frozen=True)
class FewTile:
    """What one kernel is compiled for: `height` weight rows by `rows` rows of x, K in `splits` parts."""

    height: int
    rows: int
    splits: int = 1
    gated: bool = False
    half: bool = False

    @property
    def groups(self) -> int:
        """Warpgroups that multiply."""
        return 2 if self.height > 64 else 1

    @property
    def stage_bytes(self) -> int:
        return (self.height + self.rows) * DEPTH * 2

    @property
    def slack_bytes(self) -> int:
        """What the last 64 weight rows of the last stage reach past it."""
        return max(0, self.groups * 64 * DEPTH * 2 - self.stage_bytes)

    @property
    def stages(self) -> int:
        """As many as the share of shared memory holds, beside the barriers and the alignment."""
        return min(MAX_STAGES, (SHARED_BYTES - 1024 - 16 * MAX_STAGES - self.slack_bytes) // self.stage_bytes)

    @property
    def shared_bytes(self) -> int:
        return self.stages * (self.stage_bytes + 16) + self.slack_bytes + 1024

    @property
    def fits(self) -> bool:
        """Whether the kernel can be compiled: enough stages, and runs of 8 results for each split."""
        sums = self.rows * (self.height + 4) * 4
        run = 16 if self.gated else 8
        return (
            self.height % 16 == 0 and 0 < self.height <= MAX_HEIGHT and self.height % (run * self.splits) == 0
            and self.rows % 8 == 0 and 0 < self.rows <= MAX_ROWS
            and self.stages >= 3 and sums <= self.stages * self.stage_bytes
        )  # fmt: skip

    def source(self) -> str:
        """The kernel's text, whole."""
        values = {
            "HEIGHT": self.height, "ROWS": self.rows, "STAGES": self.stages, "SPLITS": self.splits,
            "GATED": int(self.gated), "HALF": int(self.half),
        }  # fmt: skip
        return kernel_text("linear_few", values, self.rows)


@cache
def tile_kernel(tile: FewTile) -> CudaKernel:
    threads = 128 * tile.groups + 32
    return CudaKernel(tile.source(), "few", threads=threads, shared_bytes=tile.shared_bytes, cluster=tile.splits)


@dataclass(frozen=True)
class FewConfig:
    """How a product is cut: weight rows a block, and parts of K."""

    height: int
    splits: int = 1

    def tile(self, rows: int, *, gated: bool, half: bool) -> FewTile:
        return FewTile(self.height, padded_rows(rows), self.splits, gated, half)

    def product(
        self,
        x: Tensor,
        weight: Tensor,
        *,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        act: str = "",
    ) -> Tensor:
        """x [M, K] times weight [N, K] transposed, with what is asked for around it; with act, weight is [2N, K]."""
        gated = act == "silu"
        assert act in ("", "silu") and not (gated and (bias is not None or residual is not None))
        rows, size = x.shape
        tile = self.tile(max(rows, 1), gated=gated, half=x.dtype == torch.float16)
        kernel = tile_kernel(tile)
        columns = weight.shape[0] // (2 if gated else 1)
        out = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
        if x.is_meta:
            compile_in_rehearsal("kernels.linear_few.few", repr(tile), kernel.compile)
        if x.is_meta or rows == 0:
            return out
        steps = -(-size // DEPTH)
        assert tile.fits and self.splits <= steps and columns % 8 == 0
        pointer, integer = ctypes.c_void_p, ctypes.c_int
        arguments = [
            tensor_map(x, tile.rows),
            halves_map(weight, self.height // 16) if gated else tensor_map(weight, self.height),
            *(pointer(tensor.data_ptr() if tensor is not None else None) for tensor in (out, bias, residual)),
            ctypes.c_longlong(columns),
            ctypes.c_longlong(residual.stride(0) if residual is not None else 0),
            *(integer(value) for value in (rows, columns, steps)),
            ctypes.c_uint64(KEPT),
            ctypes.c_uint64(FIRST_OUT),
            integer(gating()),
        ]
        blocks = -(-weight.shape[0] // self.height) * self.splits
        kernel.launch(x.device, blocks, arguments, dependent=bool(dependent_launch(x)["PDL"]))
        return out


def padded_rows(rows: int) -> int:
    """Rows a kernel is compiled for: 16, 32 or 64. Rows of zeros are not loaded."""
    return max(16, next_power_of_2(rows))


@lru_cache(maxsize=4096)
def choose(rows: int, weight_rows: int, size: int, gated: bool, multiprocessors: int) -> FewConfig | None:
    """The config that leaves the busiest multiprocessor the least to load; None above MAX_ROWS rows.

    x comes out of the L2 cache, at about four times the rate of memory.
    """
    if rows > MAX_ROWS:
        return None
    padded, steps = padded_rows(rows), -(-size // DEPTH)
    found: list[tuple[float, FewConfig]] = []
    for splits, height in itertools.product((1, 2, 4), range(16, MAX_HEIGHT + 1, 16)):
        if splits > steps or not FewTile(height, padded, splits, gated).fits:
            continue
        share = -(-weight_rows // height) * splits / multiprocessors
        waves = share if share > MANY_WAVES else math.ceil(share)
        cost = waves * (height + padded / 4) * size / splits
        cost += ALONE_COST if waves == 1 else PAIR_COST if waves == 2 else waves * BLOCK_COST
        cost += (splits - 1) * (SPLIT_COST + SPLIT_ROW_COST * padded)
        found.append((cost, FewConfig(height, splits)))
    return min(found, key=lambda pair: (pair[0], pair[1].splits))[1]


def unsupported(x: Tensor, weight: Tensor, *others: Tensor | None, gated: bool = False) -> str | None:
    """Why the kernel cannot take these operands; others: bias, residual. None when it can."""
    columns = weight.shape[0] // (2 if gated else 1)
    if columns % 8 or x.shape[1] % 8:
        return "the columns, or K, are no multiple of 8"
    for tensor in (x, weight, *others):
        if tensor is not None and ((tensor.dim() > 1 and tensor.stride(0) % 8) or tensor.storage_offset() % 8):
            return "rows do not start at multiples of 16 bytes"
    return None
