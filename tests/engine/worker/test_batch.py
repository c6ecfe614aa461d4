"""The mirror's inputs of a step: what they are, and where they lie in memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.sampling_params import SamplingParams
from engine.step import NewSequence, StepPlan, pack
from engine.worker.batch import Batch


@pytest.mark.parametrize("length", [1, 2, 7, 16, 33])
def test_inputs_begin_at_multiples_of_16_bytes(length: int) -> None:
    """Where they do not, Triton compiles a kernel anew in the middle of serving."""
    batch = Batch(4, 64, 4, torch.device("cpu"))
    tokens = np.arange(100, 100 + length, dtype=np.int32)
    table = pack(np.arange(5, 5 - (-length // 4), dtype=np.int32))
    new = NewSequence(9, "r", pack(tokens), length, 0, table, SamplingParams(), 0)
    plan = StepPlan(0, 0, new=[new], seq_ids=pack([9]), num_tokens=pack([length]), block_counts=pack([0]))
    batch.add(new)
    token_ids, positions, slots = batch.inputs(batch.entries(plan))
    assert token_ids.tolist() == tokens.tolist() and positions.tolist() == list(range(length))
    assert slots.tolist() == [(5 + i // 4) * 4 + i % 4 for i in range(length)]
    assert [tensor.data_ptr() % 16 for tensor in (token_ids, positions, slots)] == [0, 0, 0]
