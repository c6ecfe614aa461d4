"""A whole decode step of Llama-3-8B's shape made of the kernels alone, in one CUDA graph, on random weights.

    python -m scripts.kernel_step --rows 1 256 --context 256 640

The floor for the engine's step: no runner, no host. Variants: the fused products or the library's, programmatic
dependent launch on or off, and each stage left out, which tells a stage's true cost.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.activation import silu_and_mul
from kernels.kv_cache import rotary_and_write_kv
from kernels.launch import dependent_launch, gate
from kernels.linear import linear, linear_add, linear_silu_and_mul, norm_linear, norm_linear_silu_and_mul
from kernels.linear_configs import ANY, TABLE, Row, linear_config
from kernels.linear_gemv import GemvConfig
from kernels.paged_attention import decode, plan_decode, rotary_decode
from kernels.registry import fits
from kernels.rms_norm import fused_add_rms_norm, rms_norm
from kernels.sampling import SamplingTensors, sample
from scripts.kernel_timing import paged_cache, time_us

LAYERS, HIDDEN, INTERMEDIATE, VOCAB = 32, 4096, 14336, 128256
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128


class Step:
    """Weights, caches and inputs of one decode step of `rows` sequences with `context` tokens each."""

    def __init__(self, rows: int, context: int) -> None:
        bf16 = {"device": "cuda", "dtype": torch.bfloat16}
        make = lambda *shape: torch.randn(*shape, **bf16) / shape[-1] ** 0.5
        self.qkv = [make((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN) for _ in range(LAYERS)]
        self.out = [make(HIDDEN, HIDDEN) for _ in range(LAYERS)]
        self.gate_up = [make(2 * INTERMEDIATE, HIDDEN) for _ in range(LAYERS)]
        self.down = [make(HIDDEN, INTERMEDIATE) for _ in range(LAYERS)]
        self.head, self.embedding = make(VOCAB, HIDDEN), make(VOCAB, HIDDEN)
        self.norm = torch.ones(HIDDEN, **bf16)
        self.tokens = torch.arange(rows, device="cuda") + 100
        self.set_batch(rows, context)

    def set_batch(self, rows: int, context: int) -> None:
        caches = [paged_cache([context] * rows, 16, KV_HEADS, HEAD_DIM, torch.bfloat16) for _ in range(LAYERS)]
        self.caches = [(k, v) for k, v, _ in caches]
        self.tables = caches[0][2]
        self.lens = torch.full((rows,), context, device="cuda", dtype=torch.int32)
        self.positions = torch.full((rows,), context - 1, device="cuda")
        last = (self.lens.long() - 1) // 16
        self.slots = self.tables.gather(1, last[:, None])[:, 0].long() * 16 + (context - 1) % 16
        self.cos_sin = torch.randn(context + 1, HEAD_DIM, device="cuda")
        self.tokens = torch.arange(rows, device="cuda") + 100
        self.greedy = SamplingTensors(self.tokens.float(), self.tokens, self.positions, all_greedy=True)

    def attention(self, qkv: Tensor, layer: int, plan: object, skip: str) -> Tensor:
        qkv = qkv.view(-1, HEADS + 2 * KV_HEADS, HEAD_DIM)
        q, k, v = qkv[:, :HEADS], qkv[:, HEADS : HEADS + KV_HEADS], qkv[:, HEADS + KV_HEADS :]
        caches = self.caches[layer]
        new = (q, k, v, self.cos_sin, *caches, self.tables, self.lens)
        if not skip and fits(rotary_decode, *new, plan=plan):
            return rotary_decode(*new, scale=0.088, plan=plan, behind_gate=True).view(-1, HEADS * HEAD_DIM)
        if skip != "rotary":
            q = rotary_and_write_kv(q, k, v, self.cos_sin, self.positions, *caches, self.slots, behind_gate=True)
        if skip != "attention":
            q = decode(q, *caches, self.tables, self.lens, scale=0.088, plan=plan, behind_gate=True)
        return q.reshape(-1, HEADS * HEAD_DIM)

    def run(self, fused: str, skip: str = "") -> Tensor:
        """One step: fused is "all" (norms too), "some" (residual, activation), "add" or "none"."""
        x = F.embedding(self.tokens, self.embedding)
        plan = plan_decode(self.caches[0][0], self.tables, self.lens)
        norm, eps = self.norm, 1e-5
        if fused == "all":
            for i in range(LAYERS):
                with gate():
                    qkv = norm_linear(x, norm, eps, self.qkv[i])
                x = linear_add(self.attention(qkv, i, plan, skip), self.out[i], x)
                if skip != "mlp":
                    x = linear_add(norm_linear_silu_and_mul(x, norm, eps, self.gate_up[i]), self.down[i], x)
            logits = norm_linear(x, norm, eps, self.head)
        elif fused == "some":
            for i in range(LAYERS):
                y = rms_norm(x, norm, eps)
                with gate():
                    qkv = linear(y, self.qkv[i])
                x = linear_add(self.attention(qkv, i, plan, skip), self.out[i], x)
                if skip != "mlp":
                    x = linear_add(linear_silu_and_mul(rms_norm(x, norm, eps), self.gate_up[i]), self.down[i], x)
            logits = linear(rms_norm(x, norm, eps), self.head)
        elif fused == "add":
            for i in range(LAYERS):
                qkv = F.linear(rms_norm(x, norm, eps), self.qkv[i])
                x = linear_add(self.attention(qkv, i, plan, skip), self.out[i], x)
                if skip != "mlp":
                    y = silu_and_mul(F.linear(rms_norm(x, norm, eps), self.gate_up[i]))
                    x = linear_add(y, self.down[i], x)
            logits = F.linear(rms_norm(x, norm, eps), self.head)
        else:
            y = rms_norm(x, norm, eps)
            for i in range(LAYERS):
                y = F.linear(self.attention(F.linear(y, self.qkv[i]), i, plan, skip), self.out[i])
                y, x = fused_add_rms_norm(y, x, norm, eps)
                if skip != "mlp":
                    y = F.linear(silu_and_mul(F.linear(y, self.gate_up[i])), self.down[i])
                    y, x = fused_add_rms_norm(y, x, norm, eps)
            logits = F.linear(y, self.head)
        return logits if skip == "sample" else sample(logits, self.greedy)


def time_step(step: Step, fused: str, skip: str = "") -> float:
    """Milliseconds of one step in a graph."""
    return time_us([lambda: step.run(fused, skip)], 120) / 1e3


@contextmanager
def without_dependent_launch(names: list[str]) -> Iterator[None]:
    """Launch these modules' kernels plainly."""
    modules = [importlib.import_module(f"kernels.{name}") for name in names]
    for module in modules:
        module.dependent_launch = lambda _: {"PDL": False}
    try:
        yield
    finally:
        for module in modules:
            module.dependent_launch = dependent_launch


PLAIN: dict[str, list[str]] = {
    "nothing": [],
    "attention": ["paged_decode"],
    "attention, rotary": ["paged_decode", "kv_cache"],
    "norms, activation": ["rms_norm", "activation"],
    "products": ["linear_stream", "linear_gemv", "linear_few", "linear_hopper"],
    "everything": [
        "paged_decode", "kv_cache", "rms_norm", "activation", "linear_stream", "linear_gemv", "linear_few",
        "linear_hopper", "sampling_draw",
    ],
}  # fmt: skip


def measure(step: Step, rows: int, context: int) -> None:
    """Time the step's variants, then its stages by leaving each out."""
    kinds = ["none", "add"]
    if linear_config("linear_silu_and_mul", rows, 28672, 4096, hopper=True):
        kinds.append("some")
    if linear_config("norm_linear", rows, 6144, 4096, hopper=True):
        kinds.append("all")
    for fused in kinds:
        for label, names in PLAIN.items():
            with without_dependent_launch(names):
                ms = time_step(step, fused)
            print(
                f"step rows={rows} context={context} fused={fused}: {ms:.3f} ms, launched plainly: {label}", flush=True
            )
    for skip in ("attention", "rotary", "mlp", "sample"):
        print(f"   {kinds[-1]}: without {skip:10s} {time_step(step, kinds[-1], skip):.3f} ms", flush=True)


# (operation, max_size of its row) -> configs to try at one row.
TRIALS: dict[tuple[str, int], list[GemvConfig]] = {
    (operation, size): [
        GemvConfig(bn, bk, warps)
        for bn, bk, warps in ((2, 2048, 4), (2, 4096, 4), (8, 2048, 8), (4, 4096, 8), (4, 2048, 4), (8, 1024, 4))
        if not ("silu" in operation and bn * bk > 8192)
    ]
    for operation, size in (("linear_add", ANY), ("norm_linear", ANY),
                            ("norm_linear_silu_and_mul", ANY))
}  # fmt: skip


def tune(step: Step) -> None:
    """At one row, in the step itself: change one product's config at a time and keep the fastest."""
    for (operation, size), configs in TRIALS.items():
        place = next(i for i, row in enumerate(TABLE[operation]) if row.max_rows == 1 and row.max_size == size)
        trials = [TABLE[operation][place].config, *configs]
        timed = []
        for config in trials:
            TABLE[operation][place] = Row(1, size, config)
            timed.append((time_step(step, "all"), config))
        timed.sort(key=lambda pair: pair[0])
        TABLE[operation][place] = Row(1, size, timed[0][1])
        for ms, config in timed[:4]:
            print(f"tune {operation} K<={size}: {ms:.3f} ms {config}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 256])
    parser.add_argument("--context", type=int, nargs="*", default=[256, 640])
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--zero-weights", action="store_true", help="what the step takes where power does not limit it")
    args = parser.parse_args()
    torch.manual_seed(0)
    step = Step(1, 16)
    if args.zero_weights:
        for weight in chain(step.qkv, step.out, step.gate_up, step.down):
            weight.zero_()
    for rows, context in zip(args.rows, args.context, strict=True):
        step.caches = []
        step.set_batch(rows, context)
        if rows == 1 and args.tune:
            tune(step)
        measure(step, rows, context)


if __name__ == "__main__":
    main()
