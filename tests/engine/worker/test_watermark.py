"""Watermarked draws: found by who knows the key, the same in any company, and nothing to be seen in plain ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.sampling_params import SamplingParams
from kernels.watermark import is_green
from tests.checkpoints import make_checkpoint
from tests.ranks import Ranks

MARKED = SamplingParams(temperature=1.5, watermark=True)
PLAIN = SamplingParams(temperature=1.5)


def z_score(prompt: list[int], output: list[int]) -> float:
    """How many standard deviations more green tokens there are than chance gives; each pair of tokens counts once."""
    pairs = sorted(set(zip([prompt[-1], *output], output)))
    previous, tokens = (torch.tensor(column) for column in zip(*pairs, strict=True))
    green = int(is_green(previous, tokens).sum())
    return (green - 0.5 * len(pairs)) / (0.25 * len(pairs)) ** 0.5


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    folder: Path = tmp_path_factory.mktemp("llama3")
    make_checkpoint(folder, "llama3", initializer_range=0.1)
    return Ranks(folder, block_size=8, num_blocks=200)


PROMPTS = [[5, 7, 9], [60, 61, 62, 63], [100, 20]]


def test_watermarked_text_is_told_from_plain_text(ranks: Ranks) -> None:
    outputs = ranks.generate(PROMPTS * 2, [MARKED] * 3 + [PLAIN] * 3, num_tokens=150)
    scores = [z_score(prompt, output) for prompt, output in zip(PROMPTS * 2, outputs, strict=True)]
    assert min(scores[:3]) > 5
    assert max(map(abs, scores[3:])) < 3


def test_draws_do_not_depend_on_the_batch_or_on_a_pause(ranks: Ranks) -> None:
    together = ranks.generate(PROMPTS, [MARKED, PLAIN, MARKED], num_tokens=20, seeds=[4, 5, 6])
    alone = [
        ranks.generate([prompt], params, num_tokens=20, seeds=[seed])[0]
        for prompt, params, seed in zip(PROMPTS, [MARKED, PLAIN, MARKED], [4, 5, 6], strict=True)
    ]
    assert together == alone
    so_far = alone[0][:8]
    ranks.add(900, PROMPTS[0] + so_far, MARKED, num_prompt=len(PROMPTS[0]), seed=4)
    result = ranks.step([(900, len(PROMPTS[0]) + 8)])
    ranks.drop(900)
    assert result.token_ids == torch.tensor(alone[0][8:9], dtype=torch.int32).numpy().tobytes()
