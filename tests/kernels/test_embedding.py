"""The embedding over a slice of the vocabulary: the slices' sum is the whole lookup."""

from __future__ import annotations

import pytest
import torch

from kernels.embedding import embedding
from kernels.registry import Choice, force


@pytest.mark.parametrize("choice", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_add_up(choice: Choice, dtype: torch.dtype) -> None:
    weight = torch.randn(30, 300).to(dtype)
    token_ids = torch.tensor([0, 9, 10, 29, 10])
    with force(choice):
        parts = [embedding(token_ids, weight[start : start + 10], start) for start in (0, 10, 20)]
        assert torch.equal(embedding(token_ids, weight), weight[token_ids])
    assert torch.equal(sum(parts[1:], parts[0]), weight[token_ids])
    assert not parts[0][2:].any()
