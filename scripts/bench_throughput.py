"""Offline chat throughput beside Transformers' static batches: the same model, requests, lengths and precision."""

from __future__ import annotations

import time
from typing import Any

from tqdm import tqdm

from engine.config import EngineConfig
from engine.model_config import ModelConfig, resolve
from scripts import workload
from scripts.bench_report import Row

RATIO_LIMIT = 3.0


def measure_throughput(
    model: str = "configs/tiny",
    *,
    num_requests: int = 64,
    batch_size: int = 32,
    dtype: str = "float32",
    threads: int = 1,
) -> list[Row]:
    """Output tokens a second of `LLM.generate` and of `generate` in Transformers, over one trace of forced lengths.

    Sets the number of torch's threads, of this process and for good: on cores that others use too, more than one a
    process measures their waiting for each other.
    """
    import torch

    torch.set_num_threads(threads)
    config = EngineConfig.from_args(model=model, dtype=dtype, enable_prefix_caching=False)
    model_config = ModelConfig.load(config)
    config = resolve(config, model_config)
    trace = workload.chat(num_requests, model_config.vocab_size, hi=min(1024, config.model_len // 2))
    ours, wanted = run_manta(config, trace), sum(length for _, length in trace)
    theirs = run_transformers(model_config.folder, config.dtype, trace, batch_size)
    name = model.rstrip("/").rsplit("/", 1)[-1]
    note = f"{num_requests} requests, {wanted:,} tokens, {config.dtype}, {threads} thread{'s' * (threads > 1)}"
    return [
        Row("chat-offline", name, 1, wanted / ours, "tokens/s", wanted / theirs, lower_is_better=False, note=note),
        Row(
            "chat-offline-speedup",
            name,
            1,
            theirs / ours,
            "x",
            limit=RATIO_LIMIT,
            lower_is_better=False,
            note=f"over Transformers in static batches of {batch_size}",
        ),
    ]


def run_manta(config: EngineConfig, trace: workload.Trace) -> float:
    """Seconds for the whole trace, text included."""
    from engine import LLM, SamplingParams

    with LLM(**config.model_dump(exclude={"seed"})) as llm:
        warm_up = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        llm.generate([prompt for prompt, _ in trace[:4]], warm_up, use_tqdm=False)
        params = [SamplingParams(temperature=0, max_tokens=length, ignore_eos=True) for _, length in trace]
        began_s = time.perf_counter()
        results = llm.generate([prompt for prompt, _ in trace], params)
        elapsed_s = time.perf_counter() - began_s
    for result, (_, length) in zip(results, trace):
        assert len(result.outputs[0].token_ids) == length
    return elapsed_s


def run_transformers(folder: str, dtype: str, trace: workload.Trace, batch_size: int) -> float:
    """Seconds for the whole trace in batches of its order, each padded on the left and run to its longest output."""
    import torch

    from engine.imports import transformers

    model: Any = transformers().AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    if torch.cuda.is_available():
        model = model.cuda()
    batches = [trace[start : start + batch_size] for start in range(0, len(trace), batch_size)]
    generate_batch(model, batches[0][:4], 4)
    began_s = time.perf_counter()
    with tqdm(
        total=sum(max(length for _, length in batch) for batch in batches), desc="Transformers", unit="step"
    ) as bar:
        for batch in batches:
            generate_batch(model, batch, max(length for _, length in batch), bar)
    return time.perf_counter() - began_s


def generate_batch(model: Any, batch: workload.Trace, num_tokens: int, bar: Any = None) -> None:
    """Generate `num_tokens` tokens, no more and no fewer, for every prompt of the batch; `bar` counts the steps."""
    import torch

    longest = max(len(prompt) for prompt, _ in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (prompt, _) in enumerate(batch):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1

    def count(token_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:  # noqa: ARG001
        if bar is not None:
            bar.update()
        return torch.zeros(len(token_ids), dtype=torch.bool, device=token_ids.device)

    with torch.inference_mode():
        output = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=[count],
        )
    assert output.shape == (len(batch), longest + num_tokens)
