"""What grammar-bound requests add to a step: the masks, and how much of them the ranks wait for.

The driver computes a step's masks while the ranks compute the step; the ranks need them only to draw. On a CPU the
ranks are simulated: a step takes as long as a GPU's would, then they wait for the masks, then they draw a token that
is allowed. With `gpu` they are a real model of dummy weights.

The vocabulary is Mistral NeMo's, 131,072 tokens, which the package mistral-common brings
(`pip install --no-deps mistral-common`).
"""

from __future__ import annotations

import base64
import json
import queue
import random
import statistics
import tempfile
import threading
import time
from concurrent.futures import Future
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.config import EngineConfig
from engine.executor import CacheCapacity, Executor
from engine.grammar import Grammar
from engine.llm_engine import LLMEngine
from engine.request import Request
from engine.sampling_params import SamplingParams
from engine.step import StepMasks, StepPlan, StepResult, pack, unpack
from scripts.bench_report import Row
from scripts.model_shapes import SHAPES

NUM_REQUESTS = 64
PROMPT_TOKENS = 128
WARM_STEPS = 30
_EOS = 2


def tekken() -> list[str]:
    """The vocabulary's tokens, spelled in GPT-2's byte letters, by id. Raises SystemExit without mistral-common."""
    spec = find_spec("mistral_common")
    if spec is None or spec.origin is None:
        raise SystemExit("grammar: its vocabulary is in a package: pip install --no-deps mistral-common")
    content = json.loads((Path(spec.origin).parent / "data" / "tekken_240911.json").read_text())
    size, specials = content["config"]["default_vocab_size"], content["config"]["default_num_special_tokens"]
    letters = _byte_letters()
    spelled = ["".join(letters[b] for b in base64.b64decode(e["token_bytes"])) for e in content["vocab"]]
    return [f"<special_{i}>" for i in range(specials)] + spelled[: size - specials]


def _byte_letters() -> list[str]:
    """GPT-2's letter of each byte: itself where it can be seen, else one from 256 on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in seen else next(others)) for byte in range(256)]


def write_model(folder: Path, shape: str) -> int:
    """A model of `shape` with this vocabulary: config.json, no weights, tokenizer.json. Its vocabulary's size."""
    tokens = tekken()
    config = {**SHAPES[shape], "vocab_size": len(tokens), "bos_token_id": 1, "eos_token_id": _EOS}
    (folder / "config.json").write_text(json.dumps(config))
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    names = [token for token in tokens if token.startswith("<special_")]
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": name, **special} for i, name in enumerate(names)],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return len(tokens)


def schemas(count: int) -> list[Grammar]:
    """Different ones, of the kinds that tools and records have, each for a list that does not end by itself."""
    text, short = {"type": "string"}, {"type": "string", "maxLength": 40}
    kinds: list[dict[str, Any]] = [
        {"name": short, "age": {"type": "integer"}, "email": text},
        {"city": short, "unit": {"enum": ["celsius", "fahrenheit"]}, "days": {"type": "integer", "maximum": 14}},
        {"title": text, "tags": {"type": "array", "items": short}, "score": {"type": "number"}},
        {"id": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"}, "open": {"type": "boolean"}, "note": short},
    ]
    out = []
    for number in range(count):
        properties = {**kinds[number % len(kinds)], f"field_{number}": short}
        item: dict[str, Any] = {"type": "object", "properties": properties, "required": list(properties)}
        item["additionalProperties"] = False
        out.append(Grammar("json_schema", json.dumps({"type": "array", "minItems": 200, "items": item})))
    return out


class SimulatedRanks:
    """An Executor whose steps take `step_s`, and then as long as the masks take to come."""

    def __init__(self, step_s: float, vocab_size: int, block_size: int) -> None:
        self.step_s, self._vocab_size, self._block_size = step_s, vocab_size, block_size
        self.waited_s: list[float] = []
        """For each step with masks: how long it was ready to draw and they were not there."""
        self.drew_s: list[float] = []
        """For each of them: how long drawing took here, which a GPU has done in microseconds."""
        self._random = random.Random(0)
        self._plans: queue.SimpleQueue[tuple[StepPlan, Future[StepResult]] | None] = queue.SimpleQueue()
        self._masks: queue.SimpleQueue[StepMasks] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> CacheCapacity:
        self._thread.start()
        return CacheCapacity(num_blocks=8192, block_size=self._block_size)

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        future: Future[StepResult] = Future()
        self._plans.put((plan, future))
        return future

    def send_masks(self, masks: StepMasks) -> None:
        self._masks.put(masks)

    def check(self) -> None:
        """Nothing can die."""

    def restart(self) -> CacheCapacity:
        raise AssertionError("nothing dies here")

    def shutdown(self) -> None:
        self._plans.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._plans.get()) is not None:
            plan, future = job
            time.sleep(self.step_s)
            tokens = np.full(len(plan.sample_seqs) // 4, 2000, np.int32)
            if plan.masked:
                began_s = time.perf_counter()
                masks = self._masks.get()
                self.waited_s.append(time.perf_counter() - began_s)
                began_s = time.perf_counter()
                rows = np.frombuffer(masks.bits, "<u4").reshape(len(plan.masked) // 4, -1)
                for index, row in zip(unpack(plan.masked).tolist(), rows):
                    tokens[index] = self._allowed(row)
                self.drew_s.append(time.perf_counter() - began_s)
            future.set_result(StepResult(plan.epoch, plan.step, pack(tokens)))

    def _allowed(self, row: npt.NDArray[np.uint32]) -> int:
        """A token that the mask allows: every second one the first after a random place, so that strings end too."""
        start = self._random.randrange(len(row)) if self._random.random() < 0.5 else 0
        words = np.concatenate([row[start:], row[:start]])
        word = int(np.flatnonzero(words)[0])
        bits = int(words[word])
        return min(((word + start) % len(row)) * 32 + (bits & -bits).bit_length() - 1, self._vocab_size - 1)


def step_times(engine: LLMEngine, grammars: list[Grammar | None], steps: int, name: str) -> list[float]:
    """Seconds of each of `steps` steps in which every request decodes."""
    for number, grammar in enumerate(grammars):
        params = SamplingParams(
            temperature=1.0, seed=number, max_tokens=WARM_STEPS + steps + 8, ignore_eos=grammar is None, grammar=grammar
        )
        prompt = [1000 + (7 * number + place) % 5000 for place in range(PROMPT_TOKENS)]
        engine.add_request(Request.create(f"{name}-{number}", prompt, params))
    times, ended = [], 0
    for _ in range(WARM_STEPS + steps):
        began_s = time.perf_counter()
        outputs = engine.step()
        times.append(time.perf_counter() - began_s)
        ended += sum(output.finish_reason is not None for output in outputs)
    assert not ended, f"{ended} requests ended while they were measured"
    for number in range(len(grammars)):
        engine.abort(f"{name}-{number}")
    while engine.num_in_flight:
        engine.finish_step()
    return times[WARM_STEPS:]


def compare(engine: LLMEngine, steps: int) -> tuple[float, float, float]:
    """(ms of a step of plain requests, of grammar-bound ones, ms that the masks of one step take), medians."""
    plain = step_times(engine, [None] * NUM_REQUESTS, steps, "plain")
    before_s, before = engine.metrics.mask_s.sum, engine.metrics.mask_s.count
    bound = step_times(engine, list(schemas(NUM_REQUESTS)), steps, "bound")
    masks_s = (engine.metrics.mask_s.sum - before_s) / (engine.metrics.mask_s.count - before)
    return statistics.median(plain) * 1e3, statistics.median(bound) * 1e3, masks_s * 1e3


def measure_grammar(steps: int, *, gpu: bool = False) -> list[Row]:
    """Rows of 64 plain and 64 grammar-bound requests; on simulated ranks of 4 and 8 ms a step, or on a GPU."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as root:
        shape = "llama3-8b" if gpu else "micro"
        vocab_size = write_model(Path(root), shape)

        def add(name: str, config: EngineConfig, executor: Executor) -> None:
            engine = LLMEngine(config, executor, vocab_size=vocab_size, eos_token_ids=(_EOS,))
            engine.start()
            plain, bound, masks = compare(engine, steps)
            engine.shutdown()
            note = f"masks {masks:.2f} ms"
            if isinstance(executor, SimulatedRanks):
                bound -= statistics.median(executor.drew_s[WARM_STEPS:]) * 1e3
                note += f", waited for {statistics.mean(executor.waited_s[WARM_STEPS:]) * 1e3:.3f} ms of them"
            note = f"plain {plain:.2f} ms, bound {bound:.2f} ms a step; {note}"
            rows.append(Row(f"grammar-{NUM_REQUESTS}-{name}", shape, 1, bound - plain, "ms added", note=note))

        settings: dict[str, Any] = {"model": root, "max_model_len": 4096, "enable_prefix_caching": False}
        if gpu:
            from engine.local_executor import LocalExecutor
            from engine.model_config import ModelConfig, resolve

            config = EngineConfig.from_args(**settings, load_format="dummy", device="cuda")
            model_config = ModelConfig.load(config)
            config = resolve(config, model_config)
            add("gpu", config, LocalExecutor(config, model_config))
            return rows
        for step_ms in (4, 8):
            ranks = SimulatedRanks(step_ms / 1e3, vocab_size, 16)
            add(f"{step_ms}-ms", EngineConfig.from_args(**settings), ranks)
    return rows
