"""Hopper products: the kernel's text run on the CPU, tiles that fit the chip, and which one is chosen where."""

from __future__ import annotations

import ctypes
import re
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import cuda_source, launch, linear
from kernels.hopper import KINDS, SHARED_BYTES, parse_kinds, why_not
from kernels.launch import Chip, rehearse_on
from kernels.linear_configs import linear_config
from kernels.linear_hopper import HopperConfig, Tile, choose, tile_kernel
from tests.kernels.hopper_on_cpu import late, needs_compiler, pointer, run, tensor_map

LLAMA_8B = {"gate_up": (28672, 4096), "qkv": (6144, 4096), "out": (4096, 4096), "down": (4096, 14336)}
TILES = [
    Tile(groups, width, *cluster, gated)
    for groups, width, cluster, gated in product((1, 2, 3), range(96, 257, 16), ((2, 1), (1, 2), (1, 1)), (False, True))
]


PARAMETERS = (
    "TensorMap*, TensorMap*, half_bits*, half_bits*, half_bits*, float4*, u32*, long long, long long, int, int, int, "
    "int, int, u64, u64, float*, int, int, float, half_bits*, half_bits*, float*, int"
)


def product_of(
    config: HopperConfig,
    x: Tensor,
    weight: Tensor,
    folder: Path,
    *,
    gated: bool = False,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    square_sums: Tensor | None = None,
    next_norm: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's result, it times next_norm, and its square sums; by fewer clusters than tiles where that can be.

    Behind a kernel that writes x, the residual and the square sums.
    """
    (x, residual, square_sums), last = late(x, residual, square_sums)
    tile = config.tile(x.shape[1], gated=gated, half=False, normed=square_sums is not None, norms=next_norm is not None)
    (rows, size), columns = x.shape, weight.shape[0] // (2 if gated else 1)
    out, scaled = (torch.full((rows + 1, columns), -7.0).bfloat16() for _ in range(2))
    tiles_m, tiles_n, steps = -(-rows // tile.rows), -(-columns // tile.columns), -(-size // 64)
    clusters = tiles_m * tiles_n * config.splits
    if config.splits == 1:
        clusters = max(1, clusters - 1)
    partial = torch.empty(clusters * tile.rows * tile.columns + 1)
    arrived = torch.zeros(64, dtype=torch.int32)
    sums = torch.full((tiles_n * config.cluster_n * config.splits, rows), -7.0)
    number, integer = ctypes.c_longlong, ctypes.c_int
    run(
        folder, tile.source(), "product", PARAMETERS,
        [
            tensor_map(x, 64 * config.groups // config.cluster_n),
            tensor_map(weight, config.width if config.cluster_m == 1 and not gated else config.width // 2),
            pointer(out), pointer(bias), pointer(residual), pointer(partial), pointer(arrived), number(columns),
            number(columns), *(integer(value) for value in (rows, columns, steps, tiles_m, tiles_n)),
            number(0), number(0), pointer(square_sums), integer(0 if square_sums is None else len(square_sums)),
            integer(size), ctypes.c_float(1e-5), pointer(next_norm), pointer(scaled), pointer(sums),
            integer(1),
        ],
        grid=clusters * tile.cluster_m * tile.cluster_n, cluster=tile.cluster_m * tile.cluster_n,
        threads=128 * (tile.groups + 1), last=last, gate=True,
    )  # fmt: skip
    assert (out[-1] == -7).all() and (scaled[-1] == -7).all(), "the row behind the last was written to"
    assert not arrived.any(), "counters are zero between launches"
    return out[:-1], scaled[:-1], sums


@needs_compiler
@pytest.mark.parametrize(
    ("config", "rows", "columns", "size", "gated"),
    [
        (HopperConfig(2, 96, 2, 1), 200, 104, 136, True),
        (HopperConfig(3, 64, 1, 2, 2), 150, 200, 264, False),
        (HopperConfig(1, 128, 1, 2, 4), 40, 520, 320, False),
        (HopperConfig(2, 64, 2, 2), 300, 136, 200, False),
    ],
    ids=str,
)
def test_the_kernel_run_on_a_cpu(
    config: HopperConfig, rows: int, columns: int, size: int, gated: bool, tmp_path: Path
) -> None:  # fmt: skip
    """Bound: bfloat16's rounding of the result."""
    torch.manual_seed(0)
    x = torch.randn(rows, size).bfloat16()
    weight = (torch.randn(columns * (2 if gated else 1), size) / size**0.5).bfloat16()
    expected = x.float() @ weight.float().T
    if gated:
        found, _, _ = product_of(config, x, weight, tmp_path, gated=True)
        expected = F.silu(expected[:, :columns]) * expected[:, columns:]
    else:
        bias, residual = torch.randn(columns).bfloat16(), torch.randn(rows, columns).bfloat16()
        found, _, _ = product_of(config, x, weight, tmp_path, bias=bias, residual=residual)
        expected = expected + bias.float() + residual.float()
    assert (found.float() - expected).norm() / expected.norm() < 4e-3
    torch.testing.assert_close(found.float(), expected, atol=0.03, rtol=0.03)


@needs_compiler
@pytest.mark.parametrize(
    ("config", "behind", "rows"),
    [
        (HopperConfig(2, 64, 1, 2, 2), HopperConfig(2, 96, 2, 1), 140),
        (HopperConfig(3, 96, 2, 1), HopperConfig(3, 64, 1, 2, 2), 100),
    ],
    ids=str,
)
def test_a_norm_joins_the_products_around_it(
    config: HopperConfig, behind: HopperConfig, rows: int, tmp_path: Path
) -> None:  # fmt: skip
    """Bounds: the sums in float32 of what was written; the rounding of the stream times the norm's weight."""
    torch.manual_seed(0)
    columns, gated = 200, behind.splits == 1
    x, residual = torch.randn(rows, 136).bfloat16(), torch.randn(rows, columns).bfloat16()
    weight, norm = (torch.randn(columns, 136) / 12).bfloat16(), (torch.rand(columns) + 0.5).bfloat16()
    total, scaled, sums = product_of(config, x, weight, tmp_path, residual=residual, next_norm=norm)
    expected, _, _ = product_of(config, x, weight, tmp_path, residual=residual)
    assert torch.equal(total, expected) and torch.equal(scaled, (total.float() * norm.float()).bfloat16())
    torch.testing.assert_close(sums.sum(0), total.float().pow(2).sum(1))
    weight = (torch.randn(176, columns) / 14).bfloat16()
    found, _, _ = product_of(behind, scaled, weight, tmp_path, gated=gated, square_sums=sums)
    expected = F.rms_norm(total.float(), (columns,), norm.float(), 1e-5) @ weight.float().T
    if gated:
        expected = F.silu(expected[:, :88]) * expected[:, 88:]
    assert (found.float() - expected).norm() / expected.norm() < 5e-3


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
    assert "m64n128k16.f32.f16.f16" in text and len(re.findall(r'"\+f"', text.partition("typedef")[0])) == 64
    assert Tile(3, 256, 2, 1).source() != text


@pytest.mark.parametrize("name", LLAMA_8B)
def test_256_rows_are_one_or_two_full_waves(name: str) -> None:
    """Where a library's tiles of 128 x 256 leave up to 40 % of the multiprocessors idle."""
    columns, size = LLAMA_8B[name]
    gated = name == "gate_up"
    config = choose(256, columns, size, gated, 132)
    assert config is not None
    tile = config.tile(size, gated=gated, half=False)
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
        tile = config.tile(size, gated=gated, half=False)
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


def test_a_choice_of_kernels_is_read() -> None:
    assert parse_kinds("all") == set(KINDS) and parse_kinds("none") == frozenset()
    assert parse_kinds(" few, decode") == {"few", "decode"} and parse_kinds("") == frozenset()
    with pytest.raises(ValueError, match=r"MANTA_HOPPER: 'few,fast' is not all, none or a list of products, norms"):
        parse_kinds("few,fast")
