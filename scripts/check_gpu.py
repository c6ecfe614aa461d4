"""Does the GPU path compute what the CPU definition and Transformers compute? A table; exit code 1 on a miss.

    python -m scripts.check_gpu                     the embedded model, Qwen3-0.6B's and a Llama's shape, on one GPU
    python -m scripts.check_gpu --tp 2              the same, and two ranks against one
    python -m scripts.check_gpu --device cpu --small     a dry run of this script

float32: greedy tokens are equal, log-probabilities differ by rounding. bfloat16: log-probabilities are no further from
float32's than Transformers' own are, within a third.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.config import EngineConfig
from engine.llm_engine import LLMEngine
from engine.model_config import ModelConfig, resolve
from engine.request import Request, TokenLogprobs
from engine.sampling_params import SamplingParams
from scripts import workload
from scripts.model_shapes import SHAPES

TINY = Path(__file__).parent.parent / "configs" / "tiny"
FLOAT32_LOGPROBS = 2e-4
BFLOAT16_EXCESS = 4 / 3


@dataclass
class Generated:
    """What a run gave for each prompt."""

    tokens: list[list[int]]
    logprobs: list[list[float]]
    """Of the drawn tokens."""
    prompts: list[list[TokenLogprobs | None]]


def generate(
    folder: str, prompts: list[list[int]], max_tokens: int, params: dict[str, Any] | None = None, **config_args: Any
) -> Generated:
    """Run the offline engine once."""
    config = EngineConfig.from_args(model=folder, max_model_len=2048, **config_args)
    model_config = ModelConfig.load(config)
    config = resolve(config, model_config)
    executor: Any
    if config.tensor_parallel_size > 1:
        from cluster.ray_executor import RayExecutor

        executor = RayExecutor(config, model_config)
    else:
        from engine.local_executor import LocalExecutor

        executor = LocalExecutor(config, model_config)
    engine = LLMEngine(config, executor, vocab_size=model_config.vocab_size, eos_token_ids=model_config.eos_token_ids)
    out = Generated([[] for _ in prompts], [[] for _ in prompts], [[] for _ in prompts])
    try:
        engine.start()
        for number, prompt in enumerate(prompts):
            sampling = SamplingParams(
                **{"temperature": 0.0, "max_tokens": max_tokens, "seed": number, "ignore_eos": True, **(params or {})}
            )
            engine.add_request(Request.create(str(number), prompt, sampling, arrival_s=time.time()))
        while engine.has_unfinished:
            for output in engine.step():
                number = int(output.request_id)
                assert output.finish_reason in (None, "length"), output
                out.tokens[number] += output.token_ids
                out.logprobs[number] += [entry.logprob for entry in output.logprobs or []]
                out.prompts[number] = output.prompt_logprobs or out.prompts[number]
    finally:
        engine.shutdown()
        gc.collect()
        torch.cuda.empty_cache()
    return out


@dataclass
class Checks:
    """The table."""

    failures: int = 0

    def row(self, what: str, passed: bool, detail: str) -> None:
        self.failures += not passed
        print(f"{'ok  ' if passed else 'FAIL'} {what:58} {detail}", flush=True)

    def same_tokens(self, what: str, got: Generated, wanted: Generated) -> None:
        total = sum(map(len, wanted.tokens))
        wrong = [
            (number, next(i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b))
            for number, (mine, theirs) in enumerate(zip(got.tokens, wanted.tokens, strict=True))
            if mine != theirs
        ]
        where = f"; first differences (prompt, token): {wrong[:4]}" if wrong else ""
        self.row(what, not wrong, f"{total} tokens of {len(wanted.tokens)} prompts, {len(wrong)} prompts differ{where}")

    def close(self, what: str, got: list[float], wanted: list[float], limit: float) -> None:
        difference = np.abs(np.array(got) - np.array(wanted))
        passed = bool(difference.max() <= limit)  # a NaN fails
        self.row(
            what, passed, f"differ by at most {difference.max():.2e} (limit {limit:g}), mean {difference.mean():.2e}"
        )

    def no_worse(self, what: str, got: list[float], other: list[float], exact: list[float]) -> None:
        """Root mean square errors of `got` and `other`."""
        mine, theirs = (float(np.sqrt(np.mean((np.array(x) - np.array(exact)) ** 2))) for x in (got, other))
        self.row(what, mine <= theirs * BFLOAT16_EXCESS, f"rms error {mine:.2e}, Transformers' {theirs:.2e}")


def checkpoints(root: Path, small: bool) -> Iterator[tuple[str, Callable[[], str]]]:
    """(name, what makes the folder): the embedded model, and random weights in real shapes."""
    if (TINY / "model.safetensors").exists():
        yield "embedded model", lambda: str(TINY)
    shapes = {
        "qwen3-0.6b": {**SHAPES["qwen3-0.6b"]},
        "llama (8 layers, GQA 4)": {
            **SHAPES["llama3-8b"],
            "hidden_size": 1024,
            "intermediate_size": 3584,
            "num_hidden_layers": 8,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "head_dim": 64,
        },
    }
    if small:
        shapes = {"micro": SHAPES["micro"]}
    for name, shape in shapes.items():
        yield name, partial(make_checkpoint, root / name.split(" ")[0], shape)


def make_checkpoint(folder: Path, shape: dict[str, Any]) -> str:
    """Random float32 weights, written by Transformers."""
    import transformers

    torch.manual_seed(7)
    values = {key: value for key, value in shape.items() if key != "torch_dtype"}
    config = transformers.AutoConfig.for_model(**values, initializer_range=0.05)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    return str(folder)


def reference_logprobs(folder: str, prompts: list[list[int]], device: str, dtype: torch.dtype) -> list[float]:
    """Transformers' log-probabilities of each prompt's tokens but the first."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    found: list[float] = []
    with torch.inference_mode():
        for prompt in prompts:
            ids = torch.tensor([prompt], device=device)
            logprobs = model(ids).logits[0, :-1].double().log_softmax(-1)
            found += logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist()
    return found


def prompt_logprobs(result: Generated) -> list[float]:
    return [entry.logprob for prompt in result.prompts for entry in prompt if entry is not None]


def check(name: str, folder: str, device: str, tp: int, checks: Checks) -> None:
    """Every comparison for one checkpoint."""
    vocab_size = ModelConfig.load(EngineConfig.from_args(model=folder)).vocab_size
    model_len = ModelConfig.load(EngineConfig.from_args(model=folder)).max_position_embeddings
    hi = min(200, model_len // 2 - 1)
    # As many as fill several padded batch sizes; some of a whole number of blocks, one token, and long ones.
    prompts = [prompt for prompt, _ in workload.chat(21, vocab_size, seed=3, hi=hi)]
    prompts += [prompt for prompt, _ in workload.fixed(3, vocab_size, 32, 1)] + [[11]]
    fast: dict[str, Any] = {"device": device, "dtype": "float32", "max_num_seqs": 32, "gpu_memory_utilization": 0.5}
    cpu = generate(folder, prompts, 40, device="cpu", dtype="float32", max_num_seqs=32, cpu_kv_cache_gib=4)
    checks.same_tokens(f"{name}: graphs = CPU definition", generate(folder, prompts, 40, **fast), cpu)
    checks.same_tokens(
        f"{name}: chunks of 64, 6 sequences at once = CPU definition",
        generate(folder, prompts, 40, **{**fast, "max_num_seqs": 6, "max_num_batched_tokens": 64}),
        cpu,
    )
    eager = generate(folder, prompts, 40, enforce_eager=True, steps_ahead=1, **fast)
    checks.same_tokens(f"{name}: eager, no step ahead = CPU definition", eager, cpu)
    sampled = {"temperature": 0.9, "top_p": 0.9, "top_k": 50}
    graphs, no_graphs = (
        generate(folder, prompts, 24, sampled, enforce_eager=eager_, **fast) for eager_ in (False, True)
    )
    checks.same_tokens(f"{name}: sampled, graphs = eager", graphs, no_graphs)
    penalised = {"temperature": 0.9, "presence_penalty": 0.6, "repetition_penalty": 1.1, "logprobs": 2}
    graphs, no_graphs = (
        generate(folder, prompts, 24, penalised, enforce_eager=eager_, **fast) for eager_ in (False, True)
    )
    checks.same_tokens(f"{name}: penalties and logprobs, graphs = eager", graphs, no_graphs)
    beams = {"use_beam_search": True, "n": 4, "best_of": 6}
    slow = generate(folder, prompts[:8], 24, beams, device="cpu", dtype="float32", max_num_seqs=32, cpu_kv_cache_gib=4)
    checks.same_tokens(f"{name}: beams = CPU definition", generate(folder, prompts[:8], 24, beams, **fast), slow)
    beams |= {"repetition_penalty": 1.3, "presence_penalty": 0.5}
    slow = generate(folder, prompts[:8], 24, beams, device="cpu", dtype="float32", max_num_seqs=32, cpu_kv_cache_gib=4)
    fine = generate(folder, prompts[:8], 24, beams, **fast)
    checks.same_tokens(f"{name}: beams with penalties = CPU definition", fine, slow)
    wanted = reference_logprobs(folder, prompts[:12], device, torch.float32)
    theirs = reference_logprobs(folder, prompts[:12], device, torch.bfloat16)
    got = generate(folder, prompts[:12], 1, {"prompt_logprobs": 0}, **fast)
    checks.close(f"{name}: float32 logprobs = Transformers", prompt_logprobs(got), wanted, FLOAT32_LOGPROBS)
    half = generate(folder, prompts[:12], 1, {"prompt_logprobs": 0}, **{**fast, "dtype": "bfloat16"})
    checks.no_worse(f"{name}: bfloat16 logprobs", prompt_logprobs(half), theirs, wanted)
    if tp > 1:
        ranks = {**fast, "tensor_parallel_size": tp}
        checks.same_tokens(f"{name}: {tp} ranks = CPU definition", generate(folder, prompts, 40, **ranks), cpu)
        half_ranks = generate(folder, prompts[:12], 1, {"prompt_logprobs": 0}, **{**ranks, "dtype": "bfloat16"})
        checks.no_worse(f"{name}: bfloat16 logprobs of {tp} ranks", prompt_logprobs(half_ranks), theirs, wanted)


def main(argv: list[str]) -> int:
    """Run the checks; returns the exit code."""
    parser = argparse.ArgumentParser(prog="scripts.check_gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="one small random checkpoint instead of the real shapes")
    parser.add_argument("--only", default="", help="only checkpoints whose name has this in it")
    args = parser.parse_args(argv)
    torch.backends.cuda.matmul.allow_tf32 = False
    checks = Checks()
    with tempfile.TemporaryDirectory() as root:
        for name, make in checkpoints(Path(root), args.small):
            if args.only in name:
                folder = make()
                began_s = time.perf_counter()
                check(name, folder, args.device, args.tp, checks)
                print(f"     {name}: {time.perf_counter() - began_s:.0f} s", flush=True)
    print(f"{checks.failures} failures", flush=True)
    return int(checks.failures > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
