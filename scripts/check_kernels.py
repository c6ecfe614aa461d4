"""Every Triton kernel against its definition on this GPU, and its time against the machine's limits.

    python -m scripts.check_kernels --out DIR              parity in every dtype, then the roofline table
    python -m scripts.check_kernels --out DIR --sanitize   small shapes once, for compute-sanitizer

Parity is ‖triton - definition‖ / ‖definition‖, the definition evaluated in float32 on the same inputs (and rounded once
at its end); the bounds are those of TOLERANCE. The allocator's memory is filled with NaN before each check. Times are
medians of CUDA graph replays over rotating inputs. Exit code 1 when a check fails.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels import (
    activation,
    embedding,
    kv_cache,
    linear,
    paged_attention,
    registry,
    rms_norm,
    rotary,
    watermark,
)  # fmt: skip
from kernels.launch import num_multiprocessors
from scripts import hopper_checks, prefill_checks, sampling_checks
from scripts.kernel_timing import copy_bandwidth, matmul_rate, paged_cache, poison, relative_error, time_us

TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

Case = tuple[str, Callable[[], list[Tensor]], Callable[[], list[Tensor]], torch.dtype]


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def case(name: str, dtype: torch.dtype, op: Any, *args: Any, **kwargs: Any) -> Case:
    """One check of an operation that returns its result: Triton on these inputs, the definition on float32 copies."""

    def up(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    def expected() -> list[Tensor]:
        with registry.force("torch"):
            return tensors(op(*map(up, args), **{key: up(value) for key, value in kwargs.items()}))

    def actual() -> list[Tensor]:
        with registry.force("triton"):
            return tensors(op(*args, **kwargs))

    return name, actual, expected, dtype


def small_cases(dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """Norms, activations, rotary, cache writes, embedding, over odd shapes and strides."""
    for rows, size in ((1, 64), (7, 300), (5, 4096)) if small else ((1, 64), (7, 300), (260, 4096), (3, 8192)):
        x = rand(rows, 3, size, dtype=dtype)[:, 1]
        weight = rand(size, dtype=dtype)
        yield case(f"rms_norm {rows}x{size}", dtype, rms_norm.rms_norm, x, weight, 1e-5)
        residual = rand(rows, size, dtype=dtype)
        yield case(f"add_rms_norm {rows}x{size}", dtype, rms_norm.fused_add_rms_norm, x, residual, weight, 1e-5)
    for op in (activation.silu_and_mul, activation.gelu_and_mul, activation.gelu_tanh_and_mul):
        yield case(op.name, dtype, op, rand(9, 2 * 1500, dtype=dtype))
    table = rand(100, 520, dtype=dtype)
    yield case("embedding", dtype, embedding.embedding, torch.tensor([5, 104, 50, 3], device="cuda"), table, 5)
    previous = torch.tensor([0, 7, -1, 999, 3], device="cuda")
    yield case("add_watermark", dtype, watermark.add_watermark, rand(5, 1000, dtype=dtype), previous)
    for head_dim, rotary_dim, heads, kv_heads in ((128, 128, 32, 8), (80, 80, 5, 5), (64, 32, 9, 3), (256, 256, 4, 1)):
        num_tokens = 5 if small else 67
        qkv = rand(num_tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
        q, k, v = (
            part.view(num_tokens, -1, head_dim)
            for part in qkv.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], 1)
        )
        cos_sin = rand(300, rotary_dim)
        positions = torch.randint(0, 300, (num_tokens,), device="cuda")
        yield case(f"rotary {head_dim}/{rotary_dim}", dtype, rotary.apply_rotary, q, k, cos_sin, positions)
        slots = torch.randperm(20 * 16, device="cuda")[:num_tokens]
        slots[1] = -1
        norm = rand(head_dim, dtype=dtype)
        before = rand(2, 20, 16, kv_heads, head_dim, dtype=dtype)

        def write(
            choice: registry.Choice, up: torch.dtype, q: Tensor = q, k: Tensor = k, v: Tensor = v, c: Tensor = cos_sin,
            p: Tensor = positions, s: Tensor = slots, n: Tensor = norm, before: Tensor = before,
        ) -> list[Tensor]:  # fmt: skip
            caches = before.to(up, copy=True)
            with registry.force(choice):
                arguments = (q.to(up), k.to(up), v.to(up), c, p, caches[0], caches[1], s)
                return [kv_cache.rotary_and_write_kv(*arguments, q_norm=n.to(up), k_norm=n.to(up)), caches]

        name = f"rotary_and_write_kv {head_dim}/{rotary_dim}"
        yield name, partial(write, "triton", dtype), partial(write, "torch", torch.float32), dtype
    caches = [rand(9, 16, 2, 24, dtype=dtype) for _ in range(3)]
    pairs = torch.tensor([[0, 5], [-1, 7], [2, 8]], device="cuda")

    def copy(choice: registry.Choice) -> list[Tensor]:
        copies = [cache.clone() for cache in caches]
        with registry.force(choice):
            kv_cache.copy_blocks(copies, pairs)
        return copies

    yield "copy_blocks", partial(copy, "triton"), partial(copy, "torch"), dtype


def _gated_decode(q: Tensor, k: Tensor, *args: Tensor, sliding_window: int, **options: float) -> Tensor:
    """Where the plan was made long before, and may be read early."""
    plan = paged_attention.plan_decode(k, *args[1:], sliding_window=sliding_window)
    torch.cuda.synchronize()
    options |= {"sliding_window": sliding_window}
    found: Tensor = paged_attention.decode(q, k, *args, plan=plan, behind_gate=True, **options)
    return found


def attention_cases(dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """Decode and ragged prefill over head sizes, groups, windows, soft-caps, lengths (0 and long ones included)."""
    lengths = [1, 37, 0, 130, 16] if small else [1, 513, 0, 3000, 64, 65, 63, 1024, 128, 17, 900]
    for head_dim in (64, 80, 96, 128, 256):
        for heads, kv_heads, window, softcap in ((32, 8, 0, 0.0), (4, 4, 100, 0.0), (6, 1, 0, 30.0), (6, 2, 70, 20.0)):
            k, v, tables = paged_cache(lengths, 16, kv_heads, head_dim, dtype, spare=2)
            lens = torch.tensor(lengths, device="cuda", dtype=torch.int32)
            options = {"scale": head_dim**-0.5, "sliding_window": window, "softcap": softcap}
            label = f"{head_dim} {heads}/{kv_heads} w{window} c{softcap:g}"
            q = rand(len(lengths), heads, head_dim, dtype=dtype)
            yield case(f"decode {label}", dtype, paged_attention.decode, q, k, v, tables, lens, **options)
            yield case(f"decode {label}, behind a gate", dtype, _gated_decode, q, k, v, tables, lens, **options)
            new = [min(length, limit) for length, limit in zip(lengths, [9, 40, 3, 200, 1] * 3, strict=False)]
            cu = torch.tensor([0, *accumulate(new)], device="cuda", dtype=torch.int32)
            q = rand(sum(new) + 2, heads, head_dim, dtype=dtype)
            arguments = (q, k, v, tables, lens, cu, max(new))
            yield case(f"prefill {label}", dtype, paged_attention.prefill, *arguments, **options)
            if small and head_dim != 128:
                break


def linear_cases(dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """The products with few rows, at the configs their table chooses."""
    if dtype == torch.float32:
        return
    for rows in (1, 5) if small else (1, 2, 16, 17, 48, 64, 128, 200, 256, 300):
        for columns, size in ((320, 264),) if small else ((6144, 4096), (4096, 14336), (1000, 1032)):
            x, weight = rand(rows, size, dtype=dtype), rand(columns, size, dtype=dtype) / size**0.5
            bias, residual = rand(columns, dtype=dtype), rand(rows, columns, dtype=dtype)
            norm = rand(size, dtype=dtype)
            for op, args in (
                (linear.linear, (x, weight, bias)),
                (linear.linear_add, (x, weight, residual)),
                (linear.norm_linear, (x, norm, 1e-5, weight)),
                (linear.linear_silu_and_mul, (x, weight)),
                (linear.norm_linear_silu_and_mul, (x, norm, 1e-5, weight)),
            ):
                if op.supports(*args) is None:
                    yield case(f"{op.name} {rows}x{columns}x{size}", dtype, op, *args)


CASES = {
    "small": small_cases,
    "attention": attention_cases,
    "linear": linear_cases,
    "hopper": hopper_checks.cases,
    "prefill": prefill_checks.cases,
}


def check_part(part: int, parts: int, small: bool, kinds: list[str]) -> list[dict[str, Any]]:
    """Every parts-th parity case, from the part-th on; prints what cannot run."""
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    results = []
    cases = (c for dtype in DTYPES for kind in kinds for c in CASES[kind](dtype, small))
    for name, actual, expected, dtype in islice(cases, part, None, parts):
        poison()
        try:
            error = max(relative_error(a, b) for a, b in zip(actual(), expected(), strict=True))
        except Exception as problem:
            print(f"FAILED {name} {dtype}: {type(problem).__name__}: {str(problem)[:300]}")
            error = float("nan")
        results.append({"check": f"{name} {dtype}", "error": error, "passed": error < TOLERANCE[dtype]})
    return results + (sampling_checks.check(small) if part == 0 and "small" in kinds else [])


def check(small: bool, workers: int, kinds: list[str]) -> list[dict[str, Any]]:
    """Run every parity case, in `workers` processes (compiling takes longer than running); prints what fails."""
    if workers == 1:
        results = check_part(0, 1, small, kinds)
    else:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            parts = pool.starmap(check_part, [(i, workers, small, kinds) for i in range(workers)])
            results = list(chain.from_iterable(parts))
    for row in results:
        if not row["passed"]:
            print("FAILED", row)
    print(f"parity: {sum(row['passed'] for row in results)} of {len(results)} checks passed")
    return results


@dataclass(frozen=True)
class Timing:
    """A kernel's time beside the bytes it must move and the operations it must do."""

    kernel: str
    us: float
    num_bytes: float = 0.0
    flop: float = 0.0


def time_small() -> Iterator[Timing]:
    """Norms, activations, rotary and cache writes at Llama-3-8B's shapes."""
    for m in (1, 256, 8192):
        xs = [(rand(m, 4096, dtype=torch.bfloat16), rand(m, 4096, dtype=torch.bfloat16)) for _ in range(8)]
        weight = rand(4096, dtype=torch.bfloat16)
        us = time_us([partial(rms_norm.fused_add_rms_norm, x, r, weight, 1e-5) for x, r in xs])
        yield Timing(f"fused_add_rms_norm M={m}", us, m * 4096 * 2 * 4)
        gates = [rand(m, 28672, dtype=torch.bfloat16) for _ in range(4)]
        yield Timing(
            f"silu_and_mul M={m}", time_us([partial(activation.silu_and_mul, g) for g in gates]), m * 14336 * 2 * 3
        )
        qkvs = [rand(m, 48, 128, dtype=torch.bfloat16) for _ in range(8)]
        caches = rand(2, 1024, 16, 8, 128, dtype=torch.bfloat16)
        cos_sin, where = rand(8192, 128), torch.arange(m, device="cuda")
        calls = [
            partial(kv_cache.rotary_and_write_kv, x[:, :32], x[:, 32:40], x[:, 40:], cos_sin, where, *caches, where)
            for x in qkvs
        ]
        yield Timing(f"rotary_and_write_kv M={m}", time_us(calls), m * 48 * 128 * 2 * 2)


def time_attention() -> Iterator[Timing]:
    """Attention of Llama-3-8B's heads."""
    for name, lens in (("1 x 256", [256]), ("1 x 8192", [8192]), ("64 x 600", [600] * 64), ("256 x 640", [640] * 256)):
        copies = max(2, min(16, (2 << 30) // (sum(lens) * 4096)))
        layers = [paged_cache(lens, 16, 8, 128, torch.bfloat16) for _ in range(copies)]
        contexts = torch.tensor(lens, device="cuda", dtype=torch.int32)
        q = rand(len(lens), 32, 128, dtype=torch.bfloat16)
        plan = paged_attention.plan_decode(layers[0][0], layers[0][2], contexts)
        us = time_us([partial(paged_attention.decode, q, *c, contexts, scale=0.09, plan=plan) for c in layers])
        yield Timing(f"decode attention {name}", us, sum(lens) * 4096)
    for name, contexts_list, queries in (("2 x 4096", [4096] * 2, [4096] * 2), ("1 x 512 of 8704", [8704], [512])):
        cache = paged_cache(contexts_list, 16, 8, 128, torch.bfloat16)
        contexts = torch.tensor(contexts_list, device="cuda", dtype=torch.int32)
        cu = torch.tensor([0, *accumulate(queries)], device="cuda", dtype=torch.int32)
        q = rand(sum(queries), 32, 128, dtype=torch.bfloat16)
        us = time_us([partial(paged_attention.prefill, q, *cache, contexts, cu, max(queries), scale=0.09)])
        pairs = sum(n * (c - n) + n * (n + 1) / 2 for c, n in zip(contexts_list, queries, strict=True))
        yield Timing(f"prefill attention {name}", us, flop=pairs * 32 * 128 * 4)


def time_prefill() -> Iterator[Timing]:
    """Prefill attention of Llama-3-8B's heads, in Triton and on Hopper's matrix units."""
    for name, us, num_bytes in hopper_checks.decode_timings():
        yield Timing(name, us, num_bytes)
    for name, us, flop in prefill_checks.timings():
        yield Timing(f"prefill {name}", us, flop=flop)


def time_products() -> Iterator[Timing]:
    """Linear layers with few rows, Llama-3-8B's shapes."""
    for m in (1, 16, 64, 128, 256):
        for name, columns, size in (("qkv", 6144, 4096), ("out", 4096, 4096), ("down", 4096, 14336)):
            x = rand(m, size, dtype=torch.bfloat16)
            weights = [
                rand(columns, size, dtype=torch.bfloat16) for _ in range(max(2, (400 << 20) // (columns * size * 2)))
            ]
            us = time_us([partial(linear.linear, x, w) for w in weights])
            yield Timing(f"linear {name} M={m}", us, columns * size * 2, 2 * m * columns * size)
        x, weights = rand(m, 4096, dtype=torch.bfloat16), [rand(28672, 4096, dtype=torch.bfloat16) for _ in range(3)]
        us = time_us([partial(linear.linear_silu_and_mul, x, w) for w in weights])
        yield Timing(f"linear gate_up+silu M={m}", us, 28672 * 8192, 2 * m * 28672 * 4096)


def time_sampling() -> Iterator[Timing]:
    for name, us, num_bytes in sampling_checks.timings():
        yield Timing(name, us, num_bytes)


GROUPS = {
    "small": time_small,
    "attention": time_attention,
    "prefill": time_prefill,
    "products": time_products,
    "sampling": time_sampling,
}


def roofline(bandwidth: float, rate: float, groups: list[str]) -> list[dict[str, Any]]:
    """Times beside the limits that this GPU's copy bandwidth and matrix rate set."""
    rows = []
    for timing in chain.from_iterable(GROUPS[group]() for group in groups):
        limit = max(timing.num_bytes / bandwidth, timing.flop / rate) * 1e6
        rows.append({"kernel": timing.kernel, "us": timing.us, "limit_us": limit, "share": limit / timing.us})
        rate_text = f"  {timing.flop / timing.us * 1e-6:6.1f} TFLOP/s" if timing.flop else ""
        line = f"{timing.kernel:36s} {timing.us:9.2f} us  limit {limit:8.2f} us  {limit / timing.us:6.1%}{rate_text}"
        print(line, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sanitize", action="store_true")
    parser.add_argument("--parity-only", action="store_true")
    parser.add_argument("--time", nargs="*", default=list(GROUPS), choices=list(GROUPS))
    parser.add_argument("--check", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--workers", type=int, default=12)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    report["triton"] = registry.triton.__version__
    report["multiprocessors"] = num_multiprocessors(torch.device("cuda", 0))
    report["parity"] = check(args.sanitize, 1 if args.sanitize else args.workers, args.check)
    if not (args.sanitize or args.parity_only):
        report["copy_bytes_per_s"], report["matmul_flop_per_s"] = copy_bandwidth(), matmul_rate()
        report["roofline"] = roofline(report["copy_bytes_per_s"], report["matmul_flop_per_s"], args.time)
    (args.out / "check_kernels.json").write_text(json.dumps(report, indent=1))
    sys.exit(0 if all(row["passed"] for row in report["parity"]) else 1)


if __name__ == "__main__":
    main()
