"""CUDA kernels for Hopper, for scripts.check_kernels: parity of products and decode attention, and decode's times."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from kernels import activation, decode_hopper, hopper, paged_attention, paged_decode
from kernels.linear_few import FewConfig
from kernels.linear_hopper import HopperConfig
from kernels.paged_decode import DecodeConfig
from kernels.rms_norm import rms_norm
from scripts.kernel_timing import paged_cache, time_us

Case = tuple[str, Callable[[], list[Tensor]], Callable[[], list[Tensor]], torch.dtype]


def rand(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def cases(dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """Every tile, split and what joins in, at sizes that fill no tile; attention over cut and empty contexts."""
    if dtype == torch.float32 or hopper.why_not(torch.device("cuda", 0)) is not None:
        return
    yield from _products(dtype, small)
    yield from _norms(dtype, small)
    yield from _few_products(dtype, small)
    yield from _decodes(dtype, small)


def _products(dtype: torch.dtype, small: bool) -> Iterator[Case]:
    blocks = ((1, 96, 1, 2), (2, 224, 2, 1), (3, 256, 2, 1), (2, 128, 1, 2), (2, 256, 2, 2), (1, 160, 1, 1))
    sizes = ((200, 1000, 1032),) if small else ((1, 8, 8), (65, 520, 200), (257, 1000, 1032), (700, 4104, 4096))
    for (groups, width, cluster_m, cluster_n), (rows, columns, size) in product(blocks, sizes):
        x = rand(rows, 3, size, dtype=dtype)[:, 1]
        weight = rand(columns, size + 24, dtype=dtype)[:, 16 : size + 16] / size**0.5
        bias, residual = rand(columns, dtype=dtype), rand(rows, columns + 6, dtype=dtype)[:, 2:-4]
        for splits in (1, 2, 4):
            config = HopperConfig(groups, width, cluster_m, cluster_n, splits)
            if not _at_one_time(config, rows, columns):
                continue
            for after in ({}, {"bias": bias}, {"residual": residual}, {"bias": bias, "residual": residual}):
                yield _product(config, x, weight, **after)
        if columns % 16 == 0:
            yield _product(HopperConfig(groups, width, cluster_m, cluster_n), x, weight, act="silu")


def _at_one_time(config: HopperConfig, rows: int, columns: int) -> bool:
    """Whether the kernel may be split so: splits of a tile wait for each other."""
    tiles = -(-rows // (64 * config.groups * config.cluster_m)) * -(-columns // (config.width * config.cluster_n))
    blocks = tiles * config.splits * config.cluster_m * config.cluster_n
    return config.splits == 1 or (config.width % 32 == 0 and blocks <= 120)


def _norms(dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """A product, the norm that joins in behind it, and the next product, gated or not."""
    fronts = (HopperConfig(2, 128, 1, 2, 2), HopperConfig(3, 96, 1, 2), HopperConfig(2, 64, 2, 2, 4))
    behinds = (HopperConfig(2, 224, 2, 1), HopperConfig(3, 96, 1, 2, 2))
    sizes = ((200, 520, 264),) if small else ((65, 520, 200), (257, 1000, 1032))
    for front, behind, (rows, columns, size) in product(fronts, behinds, sizes):
        if not _at_one_time(front, rows, columns):
            continue
        x, residual = rand(rows, size, dtype=dtype), rand(rows, columns, dtype=dtype)
        weight, norm = rand(columns, size, dtype=dtype) / size**0.5, torch.rand(columns, device="cuda").to(dtype) + 0.5
        next_weight, act = rand(672, columns, dtype=dtype) / columns**0.5, "silu" if behind.splits == 1 else ""

        tensors = (x, weight, residual, norm, next_weight)
        actual, expected = partial(_around_norm, front, behind, act, *tensors), partial(_norm_definition, act, *tensors)
        yield f"{front}, norm, {behind} {rows}x{columns}x{size}", actual, expected, dtype


def _around_norm(
    front: HopperConfig, behind: HopperConfig, act: str,
    x: Tensor, weight: Tensor, residual: Tensor, norm: Tensor, next_weight: Tensor,
) -> list[Tensor]:  # fmt: skip
    total, scaled, sums = front.product_for_norm(x, weight, residual, norm)
    return [total, behind.product(scaled, next_weight, act=act, square_sums=sums, eps=1e-5)]


def _norm_definition(
    act: str, x: Tensor, weight: Tensor, residual: Tensor, norm: Tensor, next_weight: Tensor
) -> list[Tensor]:  # fmt: skip
    total = x.float() @ weight.float().T + residual.float()
    out = rms_norm.definition(total, norm.float(), 1e-5) @ next_weight.float().T
    return [total, activation.silu_and_mul.definition(out) if act else out]


def _few_products(dtype: torch.dtype, small: bool) -> Iterator[Case]:
    cuts = ((16, 1), (32, 2), (48, 1), (64, 2), (80, 2), (112, 1), (128, 4))
    sizes = (
        ((9, 208, 264),) if small else ((2, 16, 8), (5, 520, 200), (17, 1008, 1032), (33, 4112, 4096), (64, 336, 14336))
    )
    for (height, splits), (rows, columns, size) in product(cuts, sizes):
        config = FewConfig(height, splits)
        if splits > -(-size // 64) or not config.tile(rows, gated=False, half=False).fits:
            continue
        x = rand(rows, 3, size, dtype=dtype)[:, 1]
        weight = rand(columns, size + 24, dtype=dtype)[:, 16 : size + 16] / size**0.5
        bias, residual = rand(columns, dtype=dtype), rand(rows, columns + 16, dtype=dtype)[:, 8:-8]
        for after in ({}, {"bias": bias}, {"residual": residual}, {"bias": bias, "residual": residual}):
            yield _product(config, x, weight, **after)
        if columns % 16 == 0 and config.tile(rows, gated=True, half=False).fits:
            yield _product(config, x, weight, act="silu")


def _product(config: HopperConfig | FewConfig, x: Tensor, weight: Tensor, **around: Any) -> Case:
    def expected() -> list[Tensor]:
        out = x.float() @ weight.float().T
        if "act" in around:
            return [activation.silu_and_mul.definition(out)]
        return [out + sum(around[key].float() for key in ("bias", "residual") if key in around)]

    name = f"{config} {x.shape[0]}x{weight.shape[0]}x{x.shape[1]} {'+'.join(around)}"
    return name, lambda: [config.product(x, weight, **around)], expected, x.dtype


def _decodes(dtype: torch.dtype, small: bool) -> Iterator[Case]:
    batches = (
        [[40, 1, 0, 77, 16, 0, 0]]
        if small
        else [[1], [40, 1, 0, 77, 16], [3000, 17, *[0] * 14], [61 * i % 1500 for i in range(160)] + [0] * 32]
    )
    shapes = ((8, 4, 128), (4, 8, 128), (2, 7, 64), (1, 1, 128), (3, 2, 64))
    for (heads, group, head_dim), lens, window, block_size in product(shapes, batches, (0, 100), (16, 32)):
        k, v, tables = paged_cache([max(n, 1) for n in lens], block_size, heads, head_dim, dtype)
        contexts = torch.tensor(lens, device="cuda", dtype=torch.int32)
        q = rand(len(lens), heads * group + 2, head_dim, dtype=dtype)[:, : heads * group]
        work = paged_decode.make_work(k, contexts, window, hopper_cut(k))
        options = {"scale": head_dim**-0.5, "sliding_window": window}
        arguments = (q, k, v, tables, contexts)
        yield (
            f"decode hopper {heads}x{group}x{head_dim} blocks of {block_size}, {len(lens)} sequences, window {window}",
            partial(_twice, partial(paged_decode.decode, *arguments, scale=head_dim**-0.5, softcap=0.0, work=work)),
            partial(_definition, arguments, options),
            dtype,
        )
        name = f"{heads}x{group}x{head_dim} blocks of {block_size}, {len(lens)}, {window}"
        yield _rotary(name, arguments, options, work)


def _rotary(
    name: str, arguments: tuple[Tensor, ...], options: dict[str, Any], work: paged_decode.DecodeWork
) -> Case:  # fmt: skip
    """Decodes that are rotated and written by the same kernel, twice: their output, and the caches."""
    (q, k, v, *rest), dtype = arguments, arguments[0].dtype
    cos_sin, plan = torch.rand(4096, q.shape[2], device="cuda"), paged_attention.DecodePlan([], work)
    projected = rand(len(q), 2 * k.shape[2], q.shape[2], dtype=dtype)
    new = (q, projected[:, : k.shape[2]], projected[:, k.shape[2] :], cos_sin)

    def found() -> list[Tensor]:
        caches = k.clone(), v.clone()
        call = partial(paged_attention.rotary_decode, *new, *caches, *rest, plan=plan, **options)
        call()
        torch.cuda.synchronize()
        return [call(behind_gate=True), *caches]

    def expected() -> list[Tensor]:
        caches = k.clone(), v.clone()
        out = paged_attention.rotary_decode.definition(*new, *caches, *rest, **options)
        return [out, *caches]

    return f"rotary decode hopper {name}", found, expected, dtype


def _twice(call: Callable[..., Tensor]) -> list[Tensor]:
    """The second result: counters must be as they were before the first. All that it reads early is there."""
    call()
    torch.cuda.synchronize()
    return [call(behind_gate=True)]


def _definition(arguments: tuple[Tensor, ...], options: dict[str, Any]) -> list[Tensor]:
    q, k, v, *rest = arguments
    return [paged_attention.decode.definition(q.float(), k.float(), v.float(), *rest, **options)]


def hopper_cut(k_cache: Tensor) -> DecodeConfig:
    """The config with which kernels.decode_hopper runs, whatever the number of sequences."""
    config = paged_decode.hopper_config(k_cache, decode_hopper.LEAST_SEQUENCES)
    assert config is not None
    return config


def decode_timings() -> Iterator[tuple[str, float, int]]:
    """Decode attention of Llama-3-8B's heads, and of a rank of 70B's two: Triton's and ours, µs and bytes read."""
    mixed = [8 + 977 * i % 1400 for i in range(256)]
    batches = {"256 x 640": [640] * 256, "256 mixed": mixed, "128 x 600": [600] * 128, "64 x 600": [600] * 64,
               "32 x 600": [600] * 32, "16 x 1024": [1024] * 16, "4 x 1024": [1024] * 4}  # fmt: skip
    for (heads, group), (name, lens) in product(((8, 4), (4, 8)), batches.items()):
        bytes_read = sum(lens) * heads * 512
        layers = [
            paged_cache(lens, 16, heads, 128, torch.bfloat16) for _ in range(max(2, min(16, (2 << 30) // bytes_read)))
        ]
        contexts = torch.tensor(lens, device="cuda", dtype=torch.int32)
        q = rand(len(lens), heads * group, 128, dtype=torch.bfloat16)
        triton = paged_decode.decode_config(128, 2, len(lens))
        kinds = {"triton": triton}
        if hopper.why_not(q.device) is None:
            kinds["hopper"] = hopper_cut(layers[0][0])
        for kind, config in kinds.items():
            work = paged_decode.make_work(layers[0][0], contexts, 0, config)
            call = partial(paged_decode.decode, q, scale=0.09, softcap=0.0, work=work)
            calls = [partial(call, k_cache=k, v_cache=v, block_tables=t, context_lens=contexts) for k, v, t in layers]
            yield f"decode {heads}x{group} {name} {kind}", time_us(calls), bytes_read
