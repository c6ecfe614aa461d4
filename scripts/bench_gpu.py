"""Speed of the engine on GPUs, through the offline engine and through the Ray driver, beside recorded anchors.

    python -m scripts.bench gpu --model llama3-8b
    python -m scripts.bench gpu --model llama3-70b --tp 2 --engines ray --cases decode-1,decode-256,chat-greedy
    python -m scripts.bench gpu --model micro --device cpu          a dry run

Weights are dummies, output lengths forced. Every result is printed, with its ratios, and merged into the JSON
file as it comes: a list of {case, model, tp, value, unit, anchor, limit, …}.
"""

from __future__ import annotations

import argparse
import asyncio
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Protocol

from engine.config import EngineConfig
from engine.model_config import ModelConfig, resolve
from engine.request import Request, SequenceOutput
from engine.sampling_params import SamplingParams
from engine.worker.preparation import Preparation
from engine.worker.start_log import StartLog
from engine.worker.tracing import kernel_times
from scripts import workload
from scripts.bench_report import Row, host_kind, merge
from scripts.model_shapes import SHAPES, model_folder

Workload = list[tuple[list[int], int]]


@dataclass
class Timeline:
    """What came back, a step at a time."""

    started_s: float
    steps: list[tuple[float, int, int]] = field(default_factory=list)
    """(when, tokens, requests whose first token was among them)."""
    _seen: set[str] = field(default_factory=set)
    finished: int = 0

    def note(self, outputs: list[SequenceOutput]) -> None:
        tokens = first = 0
        for output in outputs:
            tokens += len(output.token_ids)
            if output.request_id not in self._seen:
                self._seen.add(output.request_id)
                first += 1
            self.finished += output.finish_reason is not None
            assert output.finish_reason in (None, "length"), output
        self.steps.append((time.perf_counter(), tokens, first))

    @property
    def num_tokens(self) -> int:
        return sum(tokens for _, tokens, _ in self.steps)

    @property
    def wall_s(self) -> float:
        return self.steps[-1][0] - self.started_s

    def step_ms(self, num_seqs: int) -> float:
        """Mean time between steps in which each of `num_seqs` sequences drew a token and none its first."""
        times = [when for when, tokens, first in self.steps if tokens == num_seqs and not first]
        return (times[-1] - times[0]) / (len(times) - 1) * 1e3


@dataclass(frozen=True)
class Case:
    """One workload and the figure taken from it."""

    unit: str
    requests: Callable[[int], Workload]
    measure: Callable[[Workload, Timeline], float]
    params: dict[str, Any] = field(default_factory=dict)
    lower_is_better: bool = False


def _output_rate(_: Workload, timeline: Timeline) -> float:
    return timeline.num_tokens / timeline.wall_s


def _prompt_rate(requests: Workload, timeline: Timeline) -> float:
    return sum(len(prompt) for prompt, _ in requests) / timeline.wall_s


SAMPLED = {"temperature": 0.8, "top_p": 0.95}
CASES: dict[str, Case] = {
    "decode-1": Case("ms/token", lambda v: workload.fixed(1, v, 128, 257), lambda _, t: t.step_ms(1), {}, True),
    "decode-256": Case("ms/step", lambda v: workload.fixed(256, v, 512, 257), lambda _, t: t.step_ms(256), {}, True),
    "chat-greedy": Case("tokens/s", lambda v: workload.chat(1000, v), _output_rate),
    "chat-sampled": Case("tokens/s", lambda v: workload.chat(1000, v), _output_rate, SAMPLED),
    "chat500-greedy": Case("tokens/s", lambda v: workload.chat(500, v), _output_rate),
    "prefill-32x4096": Case("prompt tokens/s", lambda v: workload.fixed(32, v, 4096, 1), _prompt_rate),
    # Small ones, for dry runs and traces.
    "decode-256-short": Case(
        "ms/step", lambda v: workload.fixed(256, v, 64, 90), lambda _, t: t.step_ms(256), {}, True
    ),
    "decode-8": Case("ms/step", lambda v: workload.fixed(8, v, 32, 33), lambda _, t: t.step_ms(8), {}, True),
    "chat20-greedy": Case("tokens/s", lambda v: workload.chat(20, v, hi=64), _output_rate),
    "chat20-sampled": Case("tokens/s", lambda v: workload.chat(20, v, hi=64), _output_rate, SAMPLED),
}
START = "start"

# vLLM 0.24 on one H200 (TP=2: two), max_num_seqs 256, no prefix cache, 2026-11-21; and the physical limits.
ANCHORS: dict[tuple[str, int, str], tuple[float, float | None]] = {
    ("llama3-8b", 1, "decode-1"): (4.90, 3.5),
    ("llama3-8b", 1, "decode-256"): (14.36, 11.0),
    ("llama3-8b", 1, "chat-greedy"): (10569, None),
    ("llama3-8b", 1, "chat-sampled"): (10459, None),
    ("llama3-8b", 1, "prefill-32x4096"): (41372, 49000),
    ("llama3-8b", 1, START): (80.3, None),
    ("llama3-70b", 2, "decode-1"): (20.93, 16.2),
    ("llama3-70b", 2, "decode-256"): (45.6, None),
    ("llama3-70b", 2, "chat500-greedy"): (2154, None),
    ("llama3-70b", 2, "prefill-32x4096"): (8226, None),
    ("llama3-70b", 2, START): (139, None),
}


@dataclass
class Report:
    """Results as they come: printed with their ratios, and merged into a file each time.

    A case through the Ray driver has its plain name; what an engine in this process reaches is marked.
    """

    path: Path | None
    model: str
    tp: int
    rows: list[Row] = field(default_factory=list)

    def add(self, case: str, engine: str, value: float, unit: str, note: str = "") -> None:
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


def versions() -> dict[str, str]:
    """What the figures were taken with."""
    import torch

    found = {"python": platform.python_version(), "torch": torch.__version__, "date": date.today().isoformat()}
    if torch.cuda.is_available():
        found["gpu"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
        found["cuda"] = str(torch.version.cuda)
    for module in ("triton", "cupy", "ray"):
        if module in sys.modules:
            found[module] = str(sys.modules[module].__version__)
    return found


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


def make_requests(case: str, requests: Workload, params: dict[str, Any]) -> Iterator[Request]:
    for number, (prompt, length) in enumerate(requests):
        sampling = SamplingParams(**{"temperature": 0.0, "seed": number, **params}, max_tokens=length, ignore_eos=True)
        yield Request.create(f"{case}-{number}-{time.monotonic_ns()}", prompt, sampling, arrival_s=time.time())


class Run(Protocol):
    """Runs requests to their end. `at_step` is called before each step, where the steps are taken here."""

    def __call__(self, requests: list[Request], at_step: Callable[[int], None] | None = None) -> Timeline: ...


@contextmanager
def offline(config: EngineConfig, model_config: ModelConfig, report: Report) -> Iterator[Run]:
    """LLMEngine over ranks of this process (one GPU) or over Ray's, stepped here."""
    from engine.llm_engine import LLMEngine
    from engine.local_executor import LocalExecutor

    began_s = time.perf_counter()
    executor: Any
    if config.tensor_parallel_size == 1:
        executor = LocalExecutor(config, model_config)
    else:
        from cluster.ray_executor import RayExecutor

        executor = RayExecutor(config, model_config)
    engine = LLMEngine(config, executor, vocab_size=model_config.vocab_size, eos_token_ids=model_config.eos_token_ids)
    engine.start()
    report.add(START, "offline", time.perf_counter() - began_s, "s")

    def run(requests: list[Request], at_step: Callable[[int], None] | None = None) -> Timeline:
        timeline = Timeline(time.perf_counter())
        for request in requests:
            engine.add_request(request)
        while engine.has_unfinished:
            if at_step is not None:
                at_step(len(timeline.steps))
            timeline.note(engine.step())
        return timeline

    try:
        yield run
    finally:
        engine.shutdown()


@contextmanager
def through_ray(config: EngineConfig, model_config: ModelConfig, report: Report) -> Iterator[Run]:
    """A driver actor and its worker actors, over the driver's socket."""
    log = StartLog(fresh_s=0)
    began_s = time.perf_counter()
    Preparation(config, model_config).begin()
    import ray

    from cluster.driver import start_driver, stop_driver
    from cluster.driver_client import DriverClient
    from cluster.placement import bundles

    log.part("imports")
    if not ray.is_initialized():
        ray.init(address="local", include_dashboard=False, log_to_driver=True, logging_level="WARNING")
    log.part("Ray")
    group = ray.util.placement_group(bundles(config))  # as a replica of Serve has one
    driver = start_driver(config, model_config, name=f"bench-{report.model}", placement_group=group)
    log.part("driver and ranks")
    report.add(START, "ray", time.perf_counter() - began_s, "s", str(log))

    async def drive(requests: list[Request]) -> Timeline:
        done = asyncio.Event()
        timeline = Timeline(0)

        def note(outputs: list[SequenceOutput]) -> None:
            timeline.note(outputs)
            if timeline.finished == len(requests):
                done.set()

        client = await DriverClient.connect(driver, on_outputs=note)
        timeline.started_s = time.perf_counter()
        for request in requests:
            client.submit(request)
        await done.wait()
        await client.close()
        return timeline

    try:
        yield lambda requests, _=None: asyncio.run(drive(requests))
    finally:
        stop_driver(driver)
        ray.util.remove_placement_group(group)


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


def warm_up(run: Run, vocab_size: int) -> float:
    """Batches of every size, so that what is compiled or recorded once is not in the figures. Seconds it took."""
    began_s = time.perf_counter()
    for params in ({}, SAMPLED):
        run(list(make_requests("warm-up", workload.chat(290, vocab_size, seed=99, hi=80), params)))
    return time.perf_counter() - began_s


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


PROFILES: dict[str, tuple[Callable[[int], Workload], int]] = {
    "decode-1": (lambda v: workload.fixed(1, v, 128, 80), 20),
    "decode-16": (lambda v: workload.fixed(16, v, 128, 80), 20),
    "decode-64": (lambda v: workload.fixed(64, v, 512, 80), 30),
    "decode-256": (lambda v: workload.fixed(256, v, 512, 80), 40),
    "chat": (lambda v: workload.chat(400, v), 120),
    "prefill": (lambda v: workload.fixed(40, v, 4096, 1), 4),
}


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
    engines = {"offline": offline, "ray": through_ray}
    compiled = Compiled()
    if args.device == "cuda":
        compiled.watch()
    for engine in args.engines:
        with engines[engine](config, model_config, report) as run:
            seconds = warm_up(run, model_config.vocab_size)
            print(f"warm-up: {seconds:.1f} s, {compiled.since(0)}", flush=True)
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
