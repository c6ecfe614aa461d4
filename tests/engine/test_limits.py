"""Limits: how long a sample may get, and which limit is named."""

from __future__ import annotations

import pytest

from engine.errors import PromptTooLong
from engine.limits import Limits
from engine.request import Request
from engine.sampling_params import SamplingParams
from tests.fakes import engine_config
from tests.hash_model import VOCAB_SIZE


def request(num_tokens: int, max_tokens: int | None) -> Request:
    return Request.create("r", [5] * num_tokens, SamplingParams(seed=0, max_tokens=max_tokens))


@pytest.mark.parametrize(
    "num_blocks, max_tokens, length",
    [
        (100, 5, 15),
        (100, None, 64),
        (100, 1000, 64),
        (4, None, 33),
        (4, 5, 15),
    ],
)
def test_the_smallest_limit_counts(num_blocks: int, max_tokens: int | None, length: int) -> None:
    limits = Limits(engine_config(max_model_len=64), VOCAB_SIZE, num_blocks, 8)
    assert limits.length(request(10, max_tokens)) == length


def test_a_prompt_with_room_for_one_token_is_accepted() -> None:
    limits = Limits(engine_config(max_model_len=64), VOCAB_SIZE, 100, 8)
    limits.check(request(63, None))
    assert limits.length(request(63, None)) == 64
    with pytest.raises(PromptTooLong, match="max_model_len") as caught:
        limits.check(request(64, 1))
    assert caught.value.http_status == 400 and caught.value.code == "context_length_exceeded"
