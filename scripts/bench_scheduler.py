"""What the engine's own bookkeeping costs and wastes, on ranks that answer at once."""

from __future__ import annotations

import statistics
import time
from concurrent.futures import Future

from tqdm import tqdm

from engine.config import EngineConfig
from engine.executor import CacheCapacity
from engine.llm_engine import LLMEngine
from engine.request import Request
from engine.sampling_params import SamplingParams
from engine.step import StepMasks, StepPlan, StepResult, pack
from scripts import workload
from scripts.bench_report import Row

VOCAB_SIZE = 2048
BLOCK_SIZE = 16
_EOS, _TOKEN = 2, 5
STEP_LIMIT_MS = 0.5
UTILIZATION_LIMIT = 96.0


class InstantExecutor:
    """Ranks that draw the same token for every sequence in no time."""

    def __init__(self, num_blocks: int) -> None:
        self._capacity = CacheCapacity(num_blocks, BLOCK_SIZE)
        self._token = pack([_TOKEN])

    def start(self) -> CacheCapacity:
        return self._capacity

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        future: Future[StepResult] = Future()
        future.set_result(StepResult(plan.epoch, plan.step, self._token * (len(plan.sample_seqs) // 4)))
        return future

    def send_masks(self, masks: StepMasks) -> None:
        """No plan here awaits masks."""

    def check(self) -> None:
        """Nothing can die."""

    def restart(self) -> CacheCapacity:
        return self._capacity

    def shutdown(self) -> None:
        """Nothing runs."""


def make_engine(num_blocks: int, **arguments: int) -> LLMEngine:
    """A started engine over an InstantExecutor."""
    config = EngineConfig.from_args(model="none", max_model_len=4096, block_size=BLOCK_SIZE, **arguments)
    engine = LLMEngine(config, InstantExecutor(num_blocks), vocab_size=VOCAB_SIZE, eos_token_ids=(_EOS,))
    engine.start()
    return engine


def add(engine: LLMEngine, trace: workload.Trace) -> None:
    """Queue a trace, its output lengths forced."""
    for number, (prompt, length) in enumerate(trace):
        params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
        engine.add_request(Request.create(str(number), prompt, params))


def step_times_ms(num_sequences: int, steps: int) -> list[float]:
    """Time of each of `steps` engine steps (schedule, plan, read, outputs); each decodes `num_sequences` sequences."""
    engine = make_engine(
        num_sequences * 4096 // BLOCK_SIZE,
        max_num_seqs=num_sequences,
        max_num_batched_tokens=max(8192, num_sequences),
    )
    prompts = [prompt for prompt, _ in workload.chat(num_sequences, VOCAB_SIZE)]
    add(engine, [(prompt, 3000) for prompt in prompts])
    while min(len(engine.step()) for _ in range(20)) < num_sequences:
        pass  # prompts are still being computed
    times = []
    for _ in range(steps):
        began_s = time.perf_counter()
        outputs = engine.step()
        times.append((time.perf_counter() - began_s) * 1e3)
        assert len(outputs) == num_sequences
    return times


def measure_steps(sizes: tuple[int, ...] = (256, 512, 1024, 2048), steps: int = 500) -> list[Row]:
    """The scheduler's cost a step, and how it grows with the sequences that decode."""
    rows = []
    for size in tqdm(sizes, desc="scheduler", unit="size"):
        times = sorted(step_times_ms(size, steps))
        rows.append(
            Row(
                f"scheduler-step-{size}",
                "none",
                1,
                statistics.median(times),
                "ms",
                limit=STEP_LIMIT_MS if size == 256 else None,
                note=f"median of {steps} steps; p99 {times[int(steps * 0.99)]:.2f} ms",
            )
        )
    return rows


def measure_cache(num_requests: int = 600, num_blocks: int = 1024) -> list[Row]:
    """KV utilization while requests queue for a full cache: slots that hold a token, of the owned and of all."""
    engine = make_engine(num_blocks, max_num_seqs=256)
    trace = workload.chat(num_requests, VOCAB_SIZE)
    add(engine, trace)
    owned, whole, running = [], [], []
    with tqdm(total=sum(length for _, length in trace), desc="cache", unit="token", unit_scale=True) as bar:
        while engine.has_unfinished:
            bar.update(sum(len(output.token_ids) for output in engine.step()))
            stats = engine.stats()
            if stats.waiting:
                owned.append(100 * stats.kv_utilization)
                whole.append(100 * stats.kv_utilization * stats.used_blocks / stats.num_blocks)
                running.append(stats.running)
    stats = engine.stats()
    assert stats.used_blocks == 0, "blocks were lost"
    note = f"{len(owned)} saturated steps, {statistics.mean(running):.0f} running, {stats.preemptions} preemptions"
    mean = statistics.mean
    return [
        Row("kv-utilization", "none", 1, mean(owned), "%", limit=UTILIZATION_LIMIT, lower_is_better=False, note=note),
        Row(
            "kv-occupancy",
            "none",
            1,
            mean(whole),
            "%",
            lower_is_better=False,
            note="of the whole cache, free blocks included",
        ),
    ]
