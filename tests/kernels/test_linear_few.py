"""Products of few rows: the kernel's text run on the CPU, tiles that fit the chip, and which one is chosen where."""

from __future__ import annotations

import ctypes
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import hopper, launch
from kernels.launch import Chip, rehearse_on
from kernels.linear_configs import linear_config
from kernels.linear_few import SHARED_BYTES, FewConfig, FewTile, choose, padded_rows, tile_kernel, unsupported
from kernels.linear_stream import LinearConfig
from tests.kernels.hopper_on_cpu import halves_map, late, needs_compiler, pointer, run, tensor_map

PARAMETERS = (
    "TensorMap*, TensorMap*, half_bits*, half_bits*, half_bits*, long long, long long, int, int, int, u64, u64, int"
)
SHAPES_8B = {"gate_up": (28672, 4096), "qkv": (6144, 4096), "out": (4096, 4096), "down": (4096, 14336)}
SHAPES_70B_OF_2 = {"gate_up": (28672, 8192), "qkv": (5120, 8192), "out": (8192, 4096), "down": (8192, 14336)}


def fews(x: Tensor, weight: Tensor, folder: Path, config: FewConfig, **around: Tensor | bool) -> Tensor:
    """The kernel's result, with bias, residual or gated around it, behind a kernel that writes x and the residual."""
    bias, residual = around.get("bias"), around.get("residual")
    (x, residual), last = late(x, residual)
    gated = bool(around.get("gated"))
    tile = config.tile(x.shape[0], gated=gated, half=False)
    assert tile.fits
    columns = weight.shape[0] // (2 if gated else 1)
    out = torch.full((x.shape[0] + 1, columns), -7.0).bfloat16()
    weight_map = halves_map(weight, tile.height // 16) if gated else tensor_map(weight, tile.height)
    number, integer = ctypes.c_longlong, ctypes.c_int
    run(
        folder, tile.source(), "few", PARAMETERS,
        [
            tensor_map(x, tile.rows), weight_map, pointer(out), pointer(bias), pointer(residual),
            number(columns), number(residual.stride(0) if residual is not None else 0), integer(x.shape[0]),
            integer(columns), integer(-(-x.shape[1] // 64)), number(0), number(0),
            integer(1),
        ],
        grid=-(-weight.shape[0] // tile.height) * tile.splits, cluster=tile.splits, threads=128 * tile.groups + 32,
        last=last, gate=True,
    )  # fmt: skip
    assert (out[-1] == -7).all(), "the row behind the last was written to"
    return out[:-1]


CASES = [
    # rows, weight rows, K, height, splits, what is around it
    (3, 200, 72, 64, 1, ""),
    (16, 128, 2000, 128, 4, "residual"),
    (9, 224, 1000, 112, 1, "gated"),
    (40, 136, 328, 48, 1, "bias residual"),
    (64, 200, 640, 96, 2, "bias"),
    (33, 96, 320, 64, 2, "gated"),
]


@needs_compiler
@pytest.mark.parametrize(("rows", "weight_rows", "size", "height", "splits", "around"), CASES, ids=str)
def test_the_kernel_run_on_a_cpu(
    rows: int, weight_rows: int, size: int, height: int, splits: int, around: str, tmp_path: Path
) -> None:
    """Bounds: bfloat16's rounding of the result."""
    torch.manual_seed(rows)
    gated = "gated" in around
    columns = weight_rows // 2 if gated else weight_rows
    x, weight = torch.randn(rows, size).bfloat16(), (torch.randn(weight_rows, size) / size**0.5).bfloat16()
    expected = x.float()
    extra: dict[str, Tensor | bool] = {"gated": gated}
    expected = expected @ weight.float().T
    if gated:
        expected = F.silu(expected[:, :columns]) * expected[:, columns:]
    if "bias" in around:
        extra["bias"] = torch.randn(columns).bfloat16()
        expected = expected + extra["bias"].float()
    if "residual" in around:
        extra["residual"] = torch.randn(rows, columns + 8).bfloat16()[:, :-8]
        expected = expected + extra["residual"].float()
    found = fews(x, weight, tmp_path, FewConfig(height, splits), **extra).float()
    assert (found - expected).norm() / expected.norm() < 4e-3
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0.03)


TILES = [
    FewTile(height, rows, splits, gated)
    for height, rows, splits, gated in product(range(16, 145, 16), (16, 32, 64), (1, 2, 4), (False, True))
]


def test_two_blocks_fit_a_multiprocessor() -> None:
    fitting = [tile for tile in TILES if tile.fits]
    assert len(fitting) > 80 and all(tile.height <= 128 for tile in fitting)
    for tile in fitting:
        kernel = tile_kernel(tile)
        assert kernel.shared_bytes <= SHARED_BYTES
        assert tile.stage_bytes % 1024 == 0, "the swizzle's pattern repeats every 8 rows of 128 bytes"
        assert tile.rows // 2 + 45 <= 65536 // (2 * kernel.threads) // 8 * 8
        assert f"#define HEIGHT {tile.height}\n" in kernel.source and f"m64n{tile.rows}k16" in kernel.source


@pytest.mark.parametrize("rows", [2, 16, 17, 64])
@pytest.mark.parametrize("shapes", [SHAPES_8B, SHAPES_70B_OF_2], ids=["8b", "70b"])
def test_a_product_fills_the_multiprocessors_once_or_twice(rows: int, shapes: dict[str, tuple[int, int]]) -> None:
    for name, (columns, size) in shapes.items():
        gated = name == "gate_up"
        config = choose(rows, columns, size, gated, 132)
        assert config is not None and config.tile(rows, gated=gated, half=False).fits
        blocks = -(-columns // config.height) * config.splits
        assert 0.9 * 132 < blocks <= 132 or 0.9 * 264 < blocks <= 264
        assert blocks * config.height <= 1.04 * columns * config.splits, "weights are loaded once"


@pytest.mark.parametrize("multiprocessors", [78, 132])
def test_what_is_chosen_can_run(multiprocessors: int) -> None:
    for rows, columns, size, gated in product((2, 40, 64), (16, 520, 4104, 128256), (8, 264, 14336), (False, True)):
        config = choose(rows, columns, size, gated, multiprocessors)
        assert config is not None and config.splits * 64 <= max(64, size + 63)
        assert config.tile(rows, gated=gated, half=False).fits
    assert choose(65, 4096, 4096, False, multiprocessors) is None


def test_what_it_cannot_take() -> None:
    x, weight = torch.empty(5, 64).bfloat16(), torch.empty(96, 64).bfloat16()
    assert unsupported(x, weight) is None and unsupported(x, weight, gated=True) is None
    assert "multiple of 8" in str(unsupported(x, weight[:88], gated=True))
    assert "16 bytes" in str(unsupported(x, weight, torch.empty(5, 97)[:, 1:]))


def test_it_is_taken_on_hopper_once_it_is_enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "USED", {"few"})
    for rows in (2, 64):
        assert isinstance(linear_config("linear", rows, 6144, 4096, hopper=True), FewConfig)
        assert linear_config("norm_linear", rows, 6144, 4096, hopper=True) is None, "the norm by itself is faster"
    assert isinstance(linear_config("norm_linear", 2, 6144, 4096), LinearConfig)
    assert linear_config("linear", 65, 6144, 4096, hopper=True) is None
    assert padded_rows(2) == 16 and padded_rows(17) == 32 and padded_rows(33) == 64


def test_a_rehearsal_meets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[tuple[str, str]] = []
    monkeypatch.setattr(launch._Rehearsed, "chip", None)
    monkeypatch.setattr(launch._Rehearsed, "met", None)
    rehearse_on(Chip((9, 0), 132), lambda *what: met.append(what[:2]))
    try:
        x = torch.empty(7, 4096, dtype=torch.bfloat16, device="meta")
        out = FewConfig(112).product(x, torch.empty(28672, 4096, dtype=torch.bfloat16, device="meta"), act="silu")
    finally:
        launch.capability.cache_clear()
        launch.num_multiprocessors.cache_clear()
    assert out.shape == (7, 14336) and out.is_meta
    assert met == [("kernels.linear_few.few", repr(FewTile(112, 16, 1, True)))]
