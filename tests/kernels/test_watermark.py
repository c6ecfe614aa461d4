"""The watermark: which tokens it lifts, by how much, and that both implementations agree to the bit."""

from __future__ import annotations

import pytest
import torch

from kernels.philox import philox
from kernels.registry import Choice, force
from kernels.watermark import DELTA, add_watermark, is_green


@pytest.mark.parametrize("choice", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", [5, 199, 2500])
def test_green_tokens_are_lifted_by_delta(choice: Choice, dtype: torch.dtype, size: int) -> None:
    previous = torch.tensor([0, 7, -1, size - 1, 7])
    logits = torch.randn(5, size).to(dtype)
    with force(choice):
        lifted = add_watermark(logits, previous)
    for row, token in enumerate(previous.tolist()):
        green = is_green(torch.full((size,), token), torch.arange(size)) & (token >= 0)
        assert torch.equal(lifted[row], torch.where(green, logits[row].float() + DELTA, logits[row].float()))


def test_a_list_depends_on_the_token_before_and_has_half_of_the_vocabulary() -> None:
    size = 128_000
    lists = [is_green(torch.full((size,), token), torch.arange(size)) for token in (3, 4, 70_000)]
    for green in lists:
        assert abs(float(green.double().mean()) - 0.5) < 4 * (0.25 / size) ** 0.5
    agree = (lists[0] == lists[1]).double().mean()
    assert abs(float(agree) - 0.5) < 0.01


def test_membership_is_the_hash_of_both_tokens() -> None:
    lanes = philox(torch.tensor([15485863]), torch.tensor([9]), torch.tensor([25]))
    green = is_green(torch.full((4,), 9), torch.arange(100, 104))
    assert green.tolist() == [bool(lane < 2**31) for lane in lanes]
