"""Pooled hidden states are Transformers' own: whole or in chunks, alone or beside drawing sequences, on two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from engine.sampling_params import SamplingParams
from engine.step import Pooling, StepResult
from engine.worker import pooling as pooling_module
from tests.checkpoints import make_checkpoint
from tests.ranks import GREEDY, Ranks

PROMPTS = [[5, 7, 9, 11, 100, 150, 33], [3], [50, 60, 70, 80, 90] * 9, list(range(20, 36))]


def wanted_vector(model: Any, prompt: list[int], pooling: Pooling) -> npt.NDArray[np.float32]:
    with torch.inference_mode():
        states = model.model(torch.tensor([prompt])).last_hidden_state[0].float().numpy()
    vector: npt.NDArray[np.float32] = states[-1] if pooling == "last" else states.mean(axis=0)
    return vector


def vector_of(result: StepResult, sample: int) -> npt.NDArray[np.float32]:
    (vector,) = [part.vector for part in result.pooled if part.sample == sample]
    return np.frombuffer(vector, "<f4")


def embed(ranks: Ranks, prompts: list[list[int]], pooling: Pooling, chunk: int) -> list[npt.NDArray[np.float32]]:
    """Embed all of them together, in chunks."""
    for seq_id, prompt in enumerate(prompts):
        ranks.add(seq_id, prompt, pooling=pooling)
    left = {seq_id: len(prompt) for seq_id, prompt in enumerate(prompts)}
    vectors: dict[int, npt.NDArray[np.float32]] = {}
    while left:
        work = [(seq_id, min(chunk, count)) for seq_id, count in left.items()]
        result = ranks.step([(s, n) for s, n in work])
        # Chunks of one token behind others come first in the plan, as decodes do.
        order = sorted(work, key=lambda item: not (item[1] == 1 and left[item[0]] < len(prompts[item[0]])))
        ended = [seq_id for seq_id, count in order if count == left[seq_id]]
        for sample, seq_id in enumerate(ended):
            vectors[seq_id] = vector_of(result, sample)
        assert len(result.pooled) == len(ended)
        left = {seq_id: left[seq_id] - count for seq_id, count in work if count < left[seq_id]}
    for seq_id in range(len(prompts)):
        ranks.drop(seq_id)
    return [vectors[seq_id] for seq_id in range(len(prompts))]


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("family", ["llama3.1", "qwen2", "qwen3"])
def test_vectors_equal_transformers_whole_and_in_chunks(family: str, pooling: Pooling, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, family)
    wanted = [wanted_vector(model, prompt, pooling) for prompt in PROMPTS]
    with Ranks(tmp_path, block_size=8) as ranks:
        for chunk in (1000, 7, 2):
            for got, want in zip(embed(ranks, PROMPTS, pooling, chunk), wanted, strict=True):
                np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_two_ranks_pool_what_one_pools(pooling: Pooling, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, "llama3")
    with Ranks(tmp_path, tensor_parallel_size=2) as ranks:
        for got, prompt in zip(embed(ranks, PROMPTS, pooling, 16), PROMPTS, strict=True):
            np.testing.assert_allclose(got, wanted_vector(model, prompt, pooling), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(temperature=1.0, logprobs=2)])
def test_embedded_and_drawing_sequences_share_a_step(params: SamplingParams, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, "llama3")
    with Ranks(tmp_path, block_size=8) as ranks:
        (alone,) = ranks.generate([PROMPTS[0]], params, seeds=[4], num_tokens=4)
        first = max(ranks._lengths, default=100) + 1
        ranks.add(first, PROMPTS[0], params, seed=4)
        drawn = [int(np.frombuffer(ranks.step([(first, len(PROMPTS[0]))]).token_ids, "<i4")[0])]
        ranks.add(900, PROMPTS[2], pooling="mean")
        ranks.add(901, PROMPTS[3], pooling="last")
        for chunks in ([(900, 20), (901, 16)], [(900, 25)]):
            result = ranks.step([(first, 1), *chunks])
            drawn.append(int(np.frombuffer(result.token_ids, "<i4")[0]))
            for part in result.pooled:
                assert part.sample == 1
                prompt, how = (PROMPTS[3], "last") if chunks[0] == (900, 20) else (PROMPTS[2], "mean")
                want = wanted_vector(model, prompt, how)  # type: ignore[arg-type]
                np.testing.assert_allclose(np.frombuffer(part.vector, "<f4"), want, rtol=2e-4, atol=2e-5)
            assert len(result.pooled) == 1
        drawn.append(int(np.frombuffer(ranks.step([(first, 1)]).token_ids, "<i4")[0]))
        assert drawn == alone


def test_sums_do_not_need_all_states_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_checkpoint(tmp_path, "llama3")
    monkeypatch.setattr(pooling_module, "FLOAT_BYTES", 4 * 48 * 10)  # ten tokens
    with Ranks(tmp_path) as ranks:
        for got, prompt in zip(embed(ranks, PROMPTS, "mean", 1000), PROMPTS, strict=True):
            np.testing.assert_allclose(got, wanted_vector(model, prompt, "mean"), rtol=2e-4, atol=2e-5)


def test_the_last_state_may_follow_a_cached_prefix(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, "llama3")
    prompt = PROMPTS[2]
    with Ranks(tmp_path, block_size=8) as ranks:
        ranks.add(1, prompt)
        ranks.step([(1, len(prompt))])
        ranks.add(2, prompt, num_computed=40, table=ranks.tables[1][:5], pooling="last")
        got = vector_of(ranks.step([(2, 5)]), 0)
    np.testing.assert_allclose(got, wanted_vector(model, prompt, "last"), rtol=2e-4, atol=2e-5)
