"""The largest step runs for any limits, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.worker.largest_step import largest_step
from tests.checkpoints import make_checkpoint
from tests.ranks import Ranks


@pytest.mark.parametrize(
    "limits",
    [
        {"max_num_batched_tokens": 40, "max_model_len": 64},
        {"max_num_batched_tokens": 200, "max_model_len": 64},  # more than one prompt can hold
        {"max_num_batched_tokens": 4, "max_num_seqs": 9, "max_model_len": 64},  # less than the decodes alone
    ],
)
@pytest.mark.parametrize("family", ["llama3", "qwen3"])
def test_it_runs_and_changes_no_token(tmp_path: Path, family: str, limits: dict[str, int]) -> None:
    make_checkpoint(tmp_path, family)
    prompts = [[5, 6, 7], [9] * 20]
    with Ranks(tmp_path, **limits) as ranks:
        before = ranks.generate(prompts, num_tokens=5)
        model = ranks.workers[0]._model
        assert model is not None
        with torch.inference_mode():
            largest_step(ranks.config, ranks.model_config, model, torch.device("cpu"), torch.float32)
        assert ranks.generate(prompts, num_tokens=5) == before
