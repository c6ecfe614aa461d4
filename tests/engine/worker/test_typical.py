"""keep_typical against Transformers' warper."""

from __future__ import annotations

import pytest
import torch
from transformers import TypicalLogitsWarper

from engine.worker.typical import keep_typical


@pytest.mark.parametrize("mass", [0.05, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("vocab", [7, 300])
def test_equals_transformers(mass: float, vocab: int) -> None:
    logits = 3 * torch.randn(16, vocab, generator=torch.Generator().manual_seed(vocab))
    temperature = torch.linspace(0.3, 2, 16)
    got = keep_typical(logits, temperature, torch.full((16,), mass))
    want = TypicalLogitsWarper(mass)(None, logits / temperature[:, None])
    assert torch.equal(torch.isinf(got), torch.isinf(want))
    assert torch.equal(got[~torch.isinf(got)], logits[~torch.isinf(got)])
    assert torch.isinf(got).any()


def test_greedy_rows_and_rows_without_it_stay() -> None:
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(keep_typical(logits, torch.tensor([0.0, 1.0]), torch.tensor([0.2, 1.0])), logits)


def test_tokens_that_are_banned_stay_banned() -> None:
    logits = torch.tensor([[0.0, float("-inf"), 1.0, float("-inf")]])
    got = keep_typical(logits, torch.ones(1), torch.tensor([0.99]))
    assert torch.isinf(got[0, [1, 3]]).all()
    assert not torch.isnan(got).any()
