"""Benchmarks: `python -m scripts.bench` runs every part that needs no GPU and prints one table.

    python -m scripts.bench                      all of: scheduler, cache, dispatch, throughput
    python -m scripts.bench scheduler cache      some of them
    python -m scripts.bench grammar [--gpu]      grammar-bound requests (see scripts/bench_grammar.py)
    python -m scripts.bench gpu --help           the GPU path

Results are kept in scripts/results/<host kind>-<date>.json. The exit code is 1 when a limit is missed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from scripts.bench_report import Row, save, table

# Medians of a bare round trip over the same kind of channel, nothing scheduled: socket and actor call, µs.
_DISPATCH_ANCHORS = {("socket", 1): 47.0, ("socket", 2): 65.0, ("actor", 1): 650.0, ("actor", 2): 950.0}


def scheduler(args: argparse.Namespace) -> list[Row]:
    """The engine's bookkeeping a step, from 256 to 2,048 decoding sequences."""
    from scripts.bench_scheduler import measure_steps

    return measure_steps(steps=args.steps)


def cache(args: argparse.Namespace) -> list[Row]:  # noqa: ARG001
    """KV utilization while requests queue for a full cache."""
    from scripts.bench_scheduler import measure_cache

    return measure_cache()


def dispatch(args: argparse.Namespace) -> list[Row]:
    """A step's way to Ray's ranks and back, nothing computed."""
    import ray
    from tqdm import tqdm

    from cluster.measure import measure_dispatch

    rows = []
    ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="WARNING", log_to_driver=False)
    try:
        for (channel, ranks), anchor in tqdm(_DISPATCH_ANCHORS.items(), desc="dispatch", unit="channel"):
            times = measure_dispatch(ranks, "socket" if channel == "socket" else "actor", steps=args.steps)
            note = f"p99 {times.p99_us:,.0f} us; two in flight: {times.pipelined_steps_per_s:,.0f} steps/s"
            rows.append(Row(f"dispatch-{channel}", "none", ranks, times.median_us, "us", anchor, note=note))
    finally:
        ray.shutdown()
    return rows


def throughput(args: argparse.Namespace) -> list[Row]:
    """Offline chat throughput against Transformers' static batches of the same model."""
    from scripts.bench_throughput import measure_throughput

    return measure_throughput(
        args.model,
        num_requests=args.requests,
        batch_size=args.transformers_batch,
        dtype=args.dtype,
        threads=args.threads,
    )


def grammar(args: argparse.Namespace) -> list[Row]:
    """What 64 grammar-bound requests add to a step, on simulated ranks or on a GPU."""
    from scripts.bench_grammar import measure_grammar

    return measure_grammar(args.steps, gpu=args.gpu)


PARTS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "scheduler": scheduler,
    "cache": cache,
    "dispatch": dispatch,
    "throughput": throughput,
    "grammar": grammar,
}
ON_REQUEST = ("grammar",)
"""Not among `all`: what needs a package of its own."""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}, or gpu")
    parser.add_argument("--steps", type=int, default=500, help="steps a figure of scheduler and dispatch")
    parser.add_argument("--model", default="configs/tiny", help="throughput: a folder or a hub name")
    parser.add_argument("--requests", type=int, default=32, help="throughput: length of the trace")
    parser.add_argument("--transformers-batch", type=int, default=16, help="throughput: size of a static batch")
    parser.add_argument("--dtype", default="float32", help="throughput: of both (bfloat16 slows Transformers on a CPU)")
    parser.add_argument("--threads", type=int, default=1, help="throughput: of both, in torch on a CPU")
    parser.add_argument("--gpu", action="store_true", help="grammar: a model of dummy weights on a GPU")
    parser.add_argument("--no-save", action="store_true", help="write no file")
    args = parser.parse_args(argv)
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        parser.error(f"unknown parts: {', '.join(unknown)}; there are {', '.join(PARTS)} and gpu")
    return args


def main(argv: list[str]) -> int:
    """Run the parts asked for; returns the exit code."""
    if argv[:1] == ["gpu"]:
        from scripts import bench_gpu

        return bench_gpu.main(argv[1:])
    args = parse(argv)
    parts = args.parts or [part for part in PARTS if part not in ON_REQUEST]
    rows = [row for part in parts for row in PARTS[part](args)]
    print(table(rows))
    if not args.no_save:
        print(f"saved to {save(rows)}")
    return 1 if any(row.verdict == "MISSED" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
