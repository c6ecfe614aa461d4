"""Find the fastest configs of the products and of attention on this GPU: `python -m scripts.tune_kernels --out DIR`.

Compiles every candidate in parallel processes (each also checks it against cuBLAS or the definition), then times those
that passed, one after another, in CUDA graphs over rotating weights or caches. Writes DIR/tune.json and prints the best
of each case; kernels/linear_configs.py and the attention configs are filled in from it by hand.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import linear_few, paged_decode, paged_prefill
from kernels.activation import silu_and_mul
from kernels.launch import num_multiprocessors
from kernels.linear_configs import Config, linear_config
from kernels.linear_few import MAX_HEIGHT, FewConfig
from kernels.linear_gemv import GemvConfig
from kernels.linear_hopper import HopperConfig, Tile
from kernels.linear_stream import LinearConfig
from kernels.paged_decode import DecodeConfig
from kernels.paged_prefill import PrefillConfig
from kernels.rms_norm import rms_norm
from scripts.kernel_timing import copy_bandwidth, paged_cache, relative_error, sustained_us, time_us

# The products of Llama-3-8B, and of one of two ranks with 70B: name -> (columns, K, operation).
PRODUCTS = {
    "qkv": (6144, 4096, "linear"),
    "qkv_norm": (6144, 4096, "norm_linear"),
    "out": (4096, 4096, "linear_add"),
    "gate_up": (28672, 4096, "linear_silu_and_mul"),
    "gate_up_norm": (28672, 4096, "norm_linear_silu_and_mul"),
    "down": (4096, 14336, "linear_add"),
    "head": (128256, 4096, "linear"),
    "qkv_70b": (5120, 8192, "linear"),
    "out_70b": (8192, 4096, "linear"),
    "gate_up_70b": (28672, 8192, "linear_silu_and_mul"),
    "down_70b": (8192, 14336, "linear"),
}


GEMV = [
    (8, 1024, 4), (4, 1024, 4), (4, 2048, 4), (8, 2048, 8), (16, 1024, 8), (2, 4096, 4), (4, 4096, 8), (2, 2048, 4),
    (8, 512, 2), (16, 512, 2), (4, 512, 2), (16, 512, 4),
]  # fmt: skip


@dataclass(frozen=True)
class Product:
    """One candidate: a product of `rows` rows with a config."""

    name: str
    rows: int
    config: Config


def hopper_candidates(rows: int, operation: str, columns: int, size: int) -> list[Config]:
    """Tiles of every width, in the clusters that suit the rows; K split where all splits run at one time."""
    gated, groups = "silu" in operation, -(-rows // 64)
    blocks = [(groups, 1, 2)] if groups <= 3 else [(2, 2, 1), (3, 2, 1), (2, 1, 2)]
    found: list[Config] = []
    for (tile_groups, cluster_m, cluster_n), width, splits in itertools.product(blocks, range(64, 257, 32), (1, 2, 4)):
        tile = Tile(tile_groups, width, cluster_m, cluster_n, gated)
        clusters = -(-rows // tile.rows) * -(-columns // (2 if gated else 1) // tile.columns) * splits
        fits = clusters * cluster_m * cluster_n <= num_multiprocessors(torch.device("cuda", 0))
        if splits == 1 or (fits and tile.can_split and size >= 1024 * splits):
            found.append(HopperConfig(tile_groups, width, cluster_m, cluster_n, splits))
    return found


def few_candidates(rows: int, operation: str, columns: int, size: int) -> list[Config]:
    """Cuts of a product with 2 to 64 rows that nearly fill the multiprocessors once or twice, or many times."""
    if operation.startswith("norm"):
        return []
    gated = "silu" in operation
    multiprocessors = num_multiprocessors(torch.device("cuda", 0))
    found: list[Config] = []
    for splits, height in itertools.product((1, 2, 4, 8), range(16, MAX_HEIGHT + 1, 16)):
        waves = -(-columns // height) * splits / multiprocessors
        full = waves > 3 if columns > 64 * multiprocessors * 4 else waves / -(-waves // 1) > 0.9 and waves <= 2
        config = FewConfig(height, splits)
        if full and splits <= size // 256 and config.tile(rows, gated=gated, half=False).fits:
            found.append(config)
    return found


def candidates(rows: int, operation: str, columns: int, size: int) -> list[Config]:
    """Configs worth trying for this many rows: (BN, BK, warps, stages, programs a multiprocessor, swap)."""
    gated = "silu" in operation
    if rows <= 16:
        table = [
            (16, 256, 4, 4, 4, False), (16, 512, 4, 3, 3, False), (16, 256, 2, 5, 4, False), (16, 512, 4, 4, 2, False),
            (32, 128, 4, 5, 4, False), (32, 256, 4, 4, 2, False), (32, 256, 4, 3, 3, False), (32, 256, 8, 5, 2, False),
            (32, 512, 8, 3, 2, False), (64, 128, 4, 4, 2, False), (64, 128, 4, 4, 3, True), (64, 128, 4, 5, 2, True),
            (64, 64, 4, 6, 4, True), (64, 256, 4, 4, 1, True), (128, 64, 4, 5, 2, True), (128, 128, 8, 3, 2, True),
        ]  # fmt: skip
        tiles = [16]
    else:
        hopper = [] if operation.startswith("norm") else hopper_candidates(rows, operation, columns, size)
        return hopper + (few_candidates(rows, operation, columns, size) if rows <= linear_few.MAX_ROWS else [])
    out: list[Config] = few_candidates(rows, operation, columns, size) if rows > 1 else []
    if rows == 1:
        out += [GemvConfig(bn, bk, warps) for bn, bk, warps in GEMV if not (gated and bn * bk > 8192)]
    for (bn, bk, warps, stages, programs, swap), bm in itertools.product(table, tiles):
        width = bn
        bn = bn // 2 if gated else bn  # a gated tile has two halves
        if bm * width > warps * 32 * 160 or bn < 16:
            continue
        if (stages - 1) * (bm + width) * bk * 2 * programs > 225 * 1024:
            continue
        out.append(LinearConfig(bm, bn, bk, warps, stages, programs, swap))
    return out


def make_product(name: str, rows: int, copies: int) -> tuple[list[Tensor], dict[str, Any]]:
    """Random weights (several copies, to rotate) and the other inputs of a product."""
    columns, size, operation = PRODUCTS[name]
    weights = [torch.randn(columns, size, device="cuda", dtype=torch.bfloat16) / size**0.5 for _ in range(copies)]
    inputs: dict[str, Any] = {"x": torch.randn(rows, size, device="cuda", dtype=torch.bfloat16)}
    if operation.startswith("norm"):
        inputs |= {"norm_weight": torch.rand(size, device="cuda", dtype=torch.bfloat16) + 0.5, "eps": 1e-5}
    if operation == "linear_add":
        inputs["residual"] = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
    if "silu" in operation:
        inputs["act"] = "silu"
    return weights, inputs


def library_product(weight: Tensor, inputs: dict[str, Any]) -> Tensor:
    """cuBLAS, and the operations around it as kernels of their own (Triton's, and torch's addition)."""
    x = inputs["x"]
    if "norm_weight" in inputs:
        x = rms_norm(x, inputs["norm_weight"], inputs["eps"])
    y = F.linear(x, weight)
    if "act" in inputs:
        y = silu_and_mul(y)
    return y + inputs["residual"] if "residual" in inputs else y


def try_products(items: list[Product]) -> list[tuple[Product, float | str]]:
    """Compile and run each candidate once in this process: its error against the library, or what went wrong."""
    results: list[tuple[Product, float | str]] = []
    cache: dict[tuple[str, int], Any] = {}
    for item in items:
        key = item.name, item.rows
        if key not in cache:
            cache.clear()
            weights, inputs = make_product(item.name, item.rows, 1)
            cache[key] = weights, inputs, library_product(weights[0], inputs)
        weights, inputs, expected = cache[key]
        try:
            out = item.config.product(weight=weights[0], **inputs)
            results.append((item, relative_error(out, expected)))
        except Exception as error:
            results.append((item, f"{type(error).__name__}: {str(error)[:80]}"))
    return results


def try_attention(items: list[tuple[str, Any]]) -> list[str]:
    """Compile each attention config in this process; the kernels are checked by scripts.check_kernels."""
    problems = []
    k, v, tables = paged_cache([300, 40], 16, 8, 128, torch.bfloat16)
    lens = torch.tensor([300, 40], device="cuda", dtype=torch.int32)
    cu = torch.tensor([0, 200, 240], device="cuda", dtype=torch.int32)
    for kind, config in items:
        q = torch.randn(2 if kind == "decode" else 240, 32, 128, device="cuda", dtype=torch.bfloat16)
        try:
            if kind == "decode":
                work = paged_decode.make_work(k, lens, 0, config)
                paged_decode.decode(q, k, v, tables, lens, scale=0.1, softcap=0.0, work=work)
            else:
                paged_prefill.prefill(q, k, v, tables, lens, cu, 200, scale=0.1, config=config)
            torch.cuda.synchronize()
        except Exception as error:
            problems.append(f"{kind} {config}: {type(error).__name__}: {str(error)[:80]}")
    return problems


def spread(items: list[Any], workers: int) -> list[list[Any]]:
    return [items[i::workers] for i in range(workers) if items[i::workers]]


def tune_products(names: list[str], rows: list[int], workers: int, bandwidth: float, pool: Any) -> list[dict[str, Any]]:
    """Time every candidate of every product at these numbers of rows."""
    items = [
        Product(name, m, config)
        for name in names
        for m in rows
        for columns, size, operation in [PRODUCTS[name]]
        if not (operation.startswith("norm") and m > linear_few.MAX_ROWS) and not (name == "head" and 64 < m < 256)
        for config in candidates(m, operation, columns, size)
    ]
    start = time.time()
    tried = [pair for part in pool.map(try_products, spread(items, workers)) for pair in part]
    print(f"{len(items)} products compiled and checked in {time.time() - start:.0f} s")
    passed: dict[tuple[str, int], list[Config]] = defaultdict(list)
    for item, result in tried:
        if isinstance(result, float) and result < 1.2e-2:
            passed[item.name, item.rows].append(item.config)
        else:
            print("  refused:", item, result)
    return [row for (name, m), configs in sorted(passed.items()) for row in time_products(name, m, configs, bandwidth)]


def time_products(
    name: str, m: int, configs: list[Config], bandwidth: float
) -> list[dict[str, Any]]:
    """Time the configs of one product, then the best few with weights fetched early; prints the best three."""
    columns, size, _ = PRODUCTS[name]
    weight_bytes = columns * size * 2
    weights, inputs = make_product(name, m, max(2, min(16, (600 << 20) // weight_bytes)))
    library = time_us([partial(library_product, w, inputs) for w in weights])
    timed: list[tuple[float, Config]] = []

    def measure(config: Config) -> None:
        timed.append((time_us([partial(config.product, weight=w, **inputs) for w in weights]), config))

    for config in configs:
        measure(config)
    timed.sort(key=lambda pair: pair[0])
    for config in [config for _, config in timed[:3] if isinstance(config, LinearConfig)]:
        for prefetch in (256, 512, 2048, 4096):
            measure(replace(config, prefetch=prefetch))
    timed.sort(key=lambda pair: pair[0])
    us, best = timed[0]
    share = weight_bytes / (us * 1e-6) / bandwidth
    print(f"{name:13s} M={m:<4d} {us:8.2f} us  library {library:8.2f}  {share:5.1%} of copy  {best}", flush=True)
    for us, config in timed[1:3]:
        print(f"{'':20s} {us:8.2f} us {config}")
    return [{"product": name, "rows": m, "us": us, "library_us": library, "config": asdict(c)} for us, c in timed]


def sustain_products(names: list[str], rows: list[int]) -> list[dict[str, Any]]:
    """Each product as linear_configs chooses it, and the library's, for half a second each."""
    found = []
    for name, m in itertools.product(names, rows):
        columns, size, operation = PRODUCTS[name]
        config = linear_config(operation, m, columns, size, num_multiprocessors(torch.device("cuda", 0)), hopper=True)
        if config is None:
            continue
        weights, inputs = make_product(name, m, max(2, min(8, (500 << 20) // (columns * size * 2))))
        library = sustained_us([partial(library_product, w, inputs) for w in weights])
        us = sustained_us([partial(config.product, weight=w, **inputs) for w in weights])
        print(f"{name:13s} M={m:<4d} sustained {us:8.2f} us  library {library:8.2f}  {config}", flush=True)
        found.append({"product": name, "rows": m, "sustained_us": us, "library_us": library})
    return found


DECODE_CONFIGS = [
    DecodeConfig(tile, warps, stages, programs)
    for (tile, warps, stages), programs in itertools.product(
        [(32, 2, 4), (32, 2, 3), (32, 4, 4), (64, 4, 3), (64, 4, 4), (128, 4, 3)], (1, 2, 3, 4)
    )
] + [
    DecodeConfig(tile, warps, stages, programs, least)
    for (tile, warps, stages, programs), least in itertools.product(
        [(32, 2, 4, 4), (32, 2, 3, 4), (64, 4, 4, 2), (64, 4, 3, 3)], (2, 4, 8, 16)
    )
]
PREFILL_CONFIGS = [
    PrefillConfig(128, 64, 8, 3), PrefillConfig(128, 128, 8, 2), PrefillConfig(128, 64, 8, 4),
    PrefillConfig(128, 128, 8, 3), PrefillConfig(64, 64, 4, 3), PrefillConfig(64, 128, 4, 2),
    PrefillConfig(64, 64, 4, 2), PrefillConfig(128, 32, 8, 4),
]  # fmt: skip


def tune_decode(bandwidth: float) -> list[dict[str, Any]]:
    """Time decode attention of Llama-3-8B's heads over batches of different shapes."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randint(8, 1400, (256,), generator=generator).tolist()
    cases = {"1x256": [256], "1x8192": [8192], "16x1024": [1024] * 16, "64x600": [600] * 64, "256x640": [640] * 256,
             "256 mixed": mixed, "8: one long": [16000] + [300] * 7}  # fmt: skip
    return [row for name, lens in cases.items() for row in time_decode(name, lens, bandwidth)]


def time_decode(name: str, lens_list: list[int], bandwidth: float) -> list[dict[str, Any]]:
    """Time every decode config on one batch, over several layers' caches; prints the best three."""
    kv_bytes = sum(lens_list) * 8 * 128 * 2 * 2
    copies = max(2, min(24, (1600 << 20) // kv_bytes))
    caches = [paged_cache(lens_list, 16, 8, 128, torch.bfloat16) for _ in range(copies)]
    lens = torch.tensor(lens_list, device="cuda", dtype=torch.int32)
    q = torch.randn(len(lens_list), 32, 128, device="cuda", dtype=torch.bfloat16)
    timed: list[tuple[float, DecodeConfig]] = []
    for config in DECODE_CONFIGS:
        work = paged_decode.make_work(caches[0][0], lens, 0, config)
        options = {"scale": 0.088, "softcap": 0.0, "work": work}
        try:
            timed.append((time_us([partial(paged_decode.decode, q, *c, lens, **options) for c in caches]), config))
        except Exception as error:
            print("  refused:", config, str(error)[:80])
    timed.sort(key=lambda pair: pair[0])
    us, best = timed[0]
    print(f"decode {name:12s} {us:8.2f} us  {kv_bytes / (us * 1e-6) / bandwidth:5.1%} of copy  {best}", flush=True)
    for us, config in timed[1:3]:
        print(f"{'':20s} {us:8.2f} us {config}")
    return [{"decode": name, "us": us, "kv_bytes": kv_bytes, "config": asdict(c)} for us, c in timed]


def tune_prefill() -> list[dict[str, Any]]:
    """Time prefill attention of Llama-3-8B's heads over runs of different shapes."""
    cases = {"2x4096": ([4096] * 2, [4096] * 2), "1x8192": ([8192], [8192]), "40x200": ([200] * 40, [200] * 40),
             "512 after 8192": ([8704], [512])}  # fmt: skip
    return [row for name, (contexts, queries) in cases.items() for row in time_prefill(name, contexts, queries)]


def time_prefill(name: str, contexts: list[int], queries: list[int]) -> list[dict[str, Any]]:
    """Time every prefill config on one batch; the operations counted are those of the causal half."""
    k, v, tables = paged_cache(contexts, 16, 8, 128, torch.bfloat16)
    lens = torch.tensor(contexts, device="cuda", dtype=torch.int32)
    cu = torch.tensor([0, *itertools.accumulate(queries)], device="cuda", dtype=torch.int32)
    q = torch.randn(sum(queries), 32, 128, device="cuda", dtype=torch.bfloat16)
    flop = sum(n * (c - n) + n * (n + 1) / 2 for c, n in zip(contexts, queries, strict=True)) * 32 * 128 * 4
    timed: list[tuple[float, PrefillConfig]] = []
    for config in PREFILL_CONFIGS:
        arguments = (q, k, v, tables, lens, cu, max(queries))
        try:
            timed.append((time_us([partial(paged_prefill.prefill, *arguments, scale=0.1, config=config)]), config))
        except Exception as error:
            print("  refused:", config, str(error)[:80])
    timed.sort(key=lambda pair: pair[0])
    for us, config in timed[:3]:
        print(f"prefill {name:15s} {us:8.2f} us {flop / us / 1e6:6.1f} TFLOP/s {config}", flush=True)
    return [{"prefill": name, "us": us, "flop": flop, "config": asdict(c)} for us, c in timed]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 16, 64, 128, 256])
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--products", nargs="*", default=list(PRODUCTS))
    parser.add_argument("--only", choices=["products", "attention"])
    parser.add_argument("--sustained", action="store_true", help="time the chosen products under lasting load, no more")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    results: list[dict[str, Any]] = []
    if args.sustained:
        (args.out / "sustained.json").write_text(json.dumps(sustain_products(args.products, args.rows)))
        return
    bandwidth = copy_bandwidth()
    print(f"copy {bandwidth / 1e12:.2f} TB/s")
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        attention = [("decode", c) for c in DECODE_CONFIGS if c.programs_per_multiprocessor == 1 and c.min_tiles == 1]
        attention += [("prefill", c) for c in PREFILL_CONFIGS]
        pending = None
        if args.only != "products":
            pending = pool.map_async(try_attention, spread(attention, args.workers))
        if pending is not None:
            for problem in itertools.chain.from_iterable(pending.get()):
                print("  refused:", problem)
            results += tune_decode(bandwidth) + tune_prefill()
            (args.out / "tune.json").write_text(json.dumps(results))
        if args.only != "attention":
            results += tune_products(args.products, args.rows, args.workers, bandwidth, pool)
    (args.out / "tune.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
