"""Speed of the engine on GPUs, through the offline engine and through the Ray driver, beside recorded anchors.

    python -m scripts.bench gpu --model llama3-8b
    python -m scripts.bench gpu --model llama3-70b --tp 2 --engines ray --cases decode-1,decode-256,chat-greedy
    python -m scripts.bench gpu --model micro --device cpu          a dry run

Weights are dummies, output lengths forced. Every result is printed, with its ratios, and merged into the JSON
file as it comes: a list of {case, model, tp, value, unit, anchor, limit, …}.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from engine.config import EngineConfig
from engine.model_config import ModelConfig, resolve
from engine.request import Request
from engine.worker.tracing import kernel_times
from scripts import workload
from scripts.bench_gpu_cases import ANCHORS, CASES, PROFILES, SAMPLED, START, make_requests
from scripts.bench_gpu_engines import ENGINES, Run
from scripts.bench_report import Row, host_kind, merge, versions
from scripts.model_shapes import SHAPES, model_folder

RECORDING_LIMIT_S = 30.0
"""An engine is not left alone for longer before the first case."""
LOOK_EVERY_S = 0.1


@dataclass
class Report:
    """Results as they come: printed with their ratios, and merged into a file each time.

    A case through the Ray driver has its plain name; what an engine in this process reaches is marked.
    """

    path: Path | None
    model: str
    tp: int
    rows: list[Row] = field(default_factory=list)

    def start(self, engine: str, seconds: float, note: str) -> None:
        """Add what a start took."""
        self.add(START, engine, seconds, "s", note)

    def add(self, case: str, engine: str, value: float, unit: str, note: str = "") -> None:
        """Add a figure of an engine."""
        anchor, limit = ANCHORS.get((self.model, self.tp, case), (None, None))
        name = case if engine == "ray" else f"{case} ({engine})"
        lower = unit.startswith(("ms", "s"))
        row = Row(name, self.model, self.tp, round(value, 3), unit, anchor, limit, lower_is_better=lower, note=note)
        self.rows.append(row)
        print(line_of(row), flush=True)
        if self.path is not None:
            merge([row], self.path)


def line_of(row: Row) -> str:
    """One figure beside what vLLM 0.24 reaches and what is physically possible; above 1 is better than vLLM."""

    def ratio(other: float) -> float:
        return other / row.value if row.lower_is_better else row.value / other

    line = f"{row.model} tp={row.tp} {row.case:26} {row.value:12,.2f} {row.unit:16}"
    if row.anchor and row.value:
        line += f" {ratio(row.anchor):5.2f} x vLLM 0.24 ({row.anchor:,})"
    if row.limit and row.value:
        line += f", {ratio(row.limit):.0%} of the limit ({row.limit:,})"
    return f"{line}  {row.note}".rstrip()


def make_config(args: argparse.Namespace) -> tuple[EngineConfig, ModelConfig]:
    config = EngineConfig.from_args(
        model=model_folder(args.model, Path(tempfile.gettempdir()) / "manta-shapes"),
        load_format="dummy",
        device=args.device,
        tensor_parallel_size=args.tp,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        enable_prefix_caching=False,
        enforce_eager=args.enforce_eager,
        steps_ahead=args.steps_ahead,
        gpu_memory_utilization=args.gpu_memory_utilization,
    )
    model_config = ModelConfig.load(config)
    return resolve(config, model_config), model_config


def run_case(name: str, engine: str, run: Run, vocab_size: int, report: Report, compiled: Compiled) -> None:
    case = CASES[name]
    before = len(compiled.names)
    workload_ = case.requests(vocab_size)
    requests = list(make_requests(name, workload_, case.params))
    timeline = run(requests)
    expected = sum(length for _, length in workload_)
    assert timeline.num_tokens == expected, f"{name}: {timeline.num_tokens} tokens instead of {expected}"
    note = f"{timeline.wall_s:.2f} s in all"
    if compiled.names[before:]:
        note += f"; {compiled.since(before)}"
    report.add(name, engine, case.measure(workload_, timeline), case.unit, note)


def warm_up(run: Run, vocab_size: int) -> str:
    """Batches of every size, so that what is compiled or recorded once is not in the figures. Says how long it took."""
    began_s = time.perf_counter()
    for params in ({}, SAMPLED):
        run(list(make_requests("warm-up", workload.chat(290, vocab_size, seed=99, hi=80), params)))
    return f"{time.perf_counter() - began_s:.1f} s, {await_recordings(run)}"


def await_recordings(run: Run) -> str:
    """Leave the engine alone until it has recorded its CUDA graphs. Says how long that took."""
    began_s = time.perf_counter()
    left = before = run.unrecorded()
    while left and time.perf_counter() - began_s < RECORDING_LIMIT_S:
        time.sleep(LOOK_EVERY_S)
        left = run.unrecorded()
    return f"{before - left} of {before} graphs then recorded in {time.perf_counter() - began_s:.1f} s"


@dataclass
class Compiled:
    """Triton kernels compiled, or loaded from its cache, in this process: none should be once the engine is warm."""

    names: list[str] = field(default_factory=list)

    def watch(self) -> None:
        import triton

        def note(*_: Any, **given: Any) -> None:
            self.names.append(str(given.get("fn") and given["fn"].name))

        triton.knobs.runtime.jit_post_compile_hook = note

    def since(self, before: int) -> str:
        new = self.names[before:]
        return f"{len(new)} kernels compiled" + (f": {', '.join(sorted(set(new)))}" if new else "")


def profile(run: Run, requests: list[Request], first_step: int, num_steps: int, name: str, report: Report) -> None:
    """Where the time of some steps goes, and the share of it in which the GPU is busy (offline engine only)."""
    import torch
    from torch.profiler import ProfilerActivity

    traced = torch.profiler.profile(activities=[ProfilerActivity.CUDA])
    window: list[float] = []

    def at_step(step: int) -> None:
        if step == first_step:
            traced.start()
            window.append(time.perf_counter())
        elif step == first_step + num_steps:
            torch.cuda.synchronize()
            window.append(time.perf_counter())
            traced.stop()

    run(requests, at_step)
    share, totals = kernel_times(traced)
    top = list(totals.items())[:22]
    for kernel, total_us in top:
        print(f"    {total_us / num_steps / 1e3:8.3f} ms/step  {kernel[:100]}", flush=True)
    step_ms = (window[1] - window[0]) / num_steps * 1e3
    report.add(f"busy, {name}", "offline", share * 100, "%", f"{step_ms:.3f} ms a step")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts.bench gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=sorted(SHAPES), default="llama3-8b")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--engines", default="offline,ray")
    parser.add_argument("--cases", help="comma-separated; default: all those that have an anchor")
    parser.add_argument("--profile", default="", help=f"of {','.join(PROFILES)}; through the offline engine only")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--steps-ahead", type=int, default=2)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--limit-s", type=float, default=1e9, help="begin no case after so many seconds")
    parser.add_argument("--out", type=Path, help="JSON; default scripts/results/<host>-<date>.json")
    args = parser.parse_args(argv)
    args.engines = args.engines.split(",")
    args.profile = [name for name in args.profile.split(",") if name]
    anchored = [case for model, tp, case in ANCHORS if (model, tp) == (args.model, args.tp) and case in CASES]
    args.cases = args.cases.split(",") if args.cases else anchored or ["decode-8", "chat20-greedy", "chat20-sampled"]
    unknown = set(args.cases) - set(CASES)
    if unknown:
        parser.error(f"unknown cases: {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    if args.out is None:
        results = Path(__file__).parent / "results"
        results.mkdir(exist_ok=True)
        args.out = results / f"{host_kind()}-{date.today().isoformat()}.json"
    return args


def main(argv: list[str]) -> int:
    """Run the cases asked for; returns the exit code."""
    began_s = time.perf_counter()
    args = parse(argv)
    report = Report(args.out, args.model, args.tp)
    config, model_config = make_config(args)
    compiled = Compiled()
    if args.device == "cuda":
        compiled.watch()
    for engine in args.engines:
        with ENGINES[engine](config, model_config, partial(report.start, engine)) as run:
            took = warm_up(run, model_config.vocab_size)
            print(f"warm-up: {took}, {compiled.since(0)}", flush=True)
            for case in args.cases:
                if time.perf_counter() - began_s > args.limit_s:
                    print(f"{case}: left out, the time is up", flush=True)
                    continue
                run_case(case, engine, run, model_config.vocab_size, report, compiled)
            for name in args.profile if engine == "offline" else ():
                if time.perf_counter() - began_s < args.limit_s:
                    make, first_step = PROFILES[name]
                    requests = list(make_requests(name, make(model_config.vocab_size), {}))
                    profile(run, requests, first_step, 4 if name == "prefill" else 30, name, report)
    print(f"\n{', '.join(f'{name} {value}' for name, value in versions().items())}")
    print("\n".join(line_of(row) for row in report.rows), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
