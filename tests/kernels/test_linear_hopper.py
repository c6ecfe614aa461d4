"""Hopper products, as far as no GPU is needed: tiles that fit the chip, and which one is chosen where."""

from __future__ import annotations

import re
from itertools import product

import pytest
import torch

from kernels import cuda_source, launch, linear
from kernels.launch import Chip, rehearse_on
from kernels.linear_configs import linear_config
from kernels.linear_hopper import SHARED_BYTES, HopperConfig, Tile, choose, tile_kernel, why_not

LLAMA_8B = {"gate_up": (28672, 4096), "qkv": (6144, 4096), "out": (4096, 4096), "down": (4096, 14336)}
TILES = [
    Tile(groups, width, *cluster, gated)
    for groups, width, cluster, gated in product((1, 2, 3), range(96, 257, 16), ((2, 1), (1, 2), (1, 1)), (False, True))
]


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_tiles_fit_the_chip(tile: Tile) -> None:
    kernel = tile_kernel(tile)
    assert tile.stages >= 3 and kernel.shared_bytes <= SHARED_BYTES
    # The swizzle's pattern repeats every 8 rows of 128 bytes; each stage and each half of it start with it.
    assert tile.stage_bytes % 1024 == 0 and (tile.width // 2 * 128) % 1024 == 0
    # A warpgroup's accumulators are 64 * width floats; the instruction takes its registers out of a thread's share.
    width = tile.width // tile.parts
    share = 65536 // kernel.threads // 8 * 8
    assert width % 8 == 0 and width // 2 + 26 <= min(share, 255)
    accumulators = 128 * tile.groups * tile.width // 2
    assert accumulators <= 65536 - 128 * 32


def test_the_source_says_its_tile() -> None:
    text = Tile(3, 256, 2, 1, half=True).source()
    assert "#define GROUPS 3" in text and "#define PARTS 2" in text and "#define HALF 1" in text
    assert "m64n128k16.f32.f16.f16" in text and len(re.findall(r'"\+f"', text)) == 64
    assert Tile(3, 256, 2, 1).source() != text


@pytest.mark.parametrize("name", LLAMA_8B)
def test_256_rows_are_one_or_two_full_waves(name: str) -> None:
    """Where a library's tiles of 128 x 256 leave up to 40 % of the multiprocessors idle."""
    columns, size = LLAMA_8B[name]
    gated = name == "gate_up"
    config = choose(256, columns, size, gated, 132)
    assert config is not None
    tile = config.tile(gated=gated, half=False)
    clusters = -(-256 // tile.rows) * -(-(columns // 2 if gated else columns) // tile.columns) * config.splits
    waves = clusters / (132 // (config.cluster_m * config.cluster_n))
    assert -(-waves // 1) / waves < 1.04


@pytest.mark.parametrize("multiprocessors", [78, 114, 132])
def test_what_is_chosen_can_run(multiprocessors: int) -> None:
    many_rows, many_columns = (17, 64, 65, 200, 256, 257, 320, 448, 640, 1024, 8192), (512, 5120, 28672, 128256)
    for rows, columns, size, gated in product(many_rows, many_columns, (64, 1032, 14336), (False, True)):
        config = choose(rows, columns, size, gated, multiprocessors)
        if config is None:
            continue
        tile = config.tile(gated=gated, half=False)
        assert config.splits == 1 or (tile.can_split and config.splits in (2, 4))
        assert tile.groups <= 3 and tile.width <= 256 and tile.width % 16 == 0
        clusters = -(-rows // tile.rows) * -(-(columns // 2 if gated else columns) // tile.columns) * config.splits
        room = multiprocessors // (config.cluster_m * config.cluster_n)
        assert config.splits == 1 or clusters <= room, "splits wait for each other"
        if not gated:
            assert clusters <= room and rows <= 256


def test_few_columns_and_odd_ones_are_the_librarys() -> None:
    assert choose(256, 512, 512, False, 132) is None
    assert linear_config("linear_silu_and_mul", 256, 28672 + 8, 4096) is None
    assert linear_config("linear_silu_and_mul", 256, 28672, 4096 + 4) is None
    assert isinstance(linear_config("linear_silu_and_mul", 256, 28672, 4096), HopperConfig)
    assert linear_config("norm_linear", 256, 6144, 4096) is None


def test_only_hopper_runs_it() -> None:
    assert "compute capability 9.0" in str(why_not(torch.device("cpu")))
    x, weight = torch.empty(256, 4096).bfloat16(), torch.empty(28672, 4096).bfloat16()
    assert linear.linear_silu_and_mul.supports is not None
    assert "compute capability 9.0" in str(linear.linear_silu_and_mul.supports(x, weight))
    odd = torch.empty(256, 4097).bfloat16()[:, 1:]
    assert "16 bytes" in str(linear.linear_silu_and_mul.supports(odd, weight))


def test_a_rehearsal_meets_each_tile_once_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on the device "meta" launch nothing: they name what must be compiled."""
    met: list[tuple[str, str]] = []
    monkeypatch.setattr(launch._Rehearsed, "chip", None)
    monkeypatch.setattr(launch._Rehearsed, "met", None)
    rehearse_on(Chip((9, 0), 132), lambda *what: met.append(what[:2]))
    try:
        x = torch.empty(256, 4096, dtype=torch.bfloat16, device="meta")
        out = HopperConfig(2, 224).product(x, torch.empty(28672, 4096, dtype=torch.bfloat16, device="meta"), act="silu")
    finally:
        launch.capability.cache_clear()
        launch.num_multiprocessors.cache_clear()
    assert out.shape == (256, 14336) and out.is_meta
    assert met == [("kernels.linear_hopper.product", repr(Tile(2, 224, 2, 1, True)))]


def test_machine_code_is_kept(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    source = 'extern "C" __global__ void nothing() {}'
    if cuda_source.nvrtc() is None:
        with pytest.raises(cuda_source.CudaError, match="libnvrtc was not found"):
            cuda_source.compile_cubin(source)
        return
    cubin = cuda_source.compile_cubin(source)
    kept = list(cuda_source.cache_folder().iterdir())
    assert [path.read_bytes() for path in kept] == [cubin]
    kept[0].write_bytes(b"kept")
    assert cuda_source.compile_cubin(source) == b"kept"
    with pytest.raises(cuda_source.CudaError, match="error"):
        cuda_source.compile_cubin("nonsense")
