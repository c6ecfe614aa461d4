"""A step computes the last layer for the rows that it makes something of, and makes the same of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torch.utils.flop_counter import FlopCounterMode

from engine.sampling_params import SamplingParams
from engine.step import StepResult, unpack
from tests.ranks import GREEDY, Ranks

PROMPT = [5, 7, 9, 11, 100, 150, 33, 60, 61, 62, 63, 64, 65, 66, 67, 68, 69, 70, 71, 72]
OTHER = list(range(90, 120))
REPORTED = SamplingParams(temperature=0.0, prompt_logprobs=2)


def products(ranks: Ranks, run: Callable[[], StepResult]) -> int:
    """Multiplications in the matrix products of a step."""
    counter = FlopCounterMode(display=False)
    ranks._threads.submit(counter.__enter__).result()  # it counts what its own thread computes
    try:
        run()
    finally:
        ranks._threads.submit(counter.__exit__, None, None, None).result()
    return int(counter.get_total_flops()) // 2


def spared(ranks: Ranks, num_rows: int) -> int:
    """Multiplications behind the last layer's attention, of so many rows."""
    shape = ranks.model_config
    return num_rows * shape.hidden_size * (shape.num_attention_heads * shape.head_dim + 3 * shape.intermediate_size)


def test_only_rows_that_something_is_made_of_pass_the_last_layer(ranks: Ranks) -> None:
    head = ranks.model_config.hidden_size * ranks.model_config.vocab_size

    def step(params: SamplingParams, count: int) -> int:
        ranks.add(1, PROMPT, params)
        made = products(ranks, lambda: ranks.step([(1, count)]))
        ranks.drop(1)
        return made

    # A row is computed where none is needed.
    assert step(REPORTED, 12) - step(GREEDY, 12) == spared(ranks, 11) + 12 * head
    assert step(REPORTED, 20) - step(GREEDY, 20) == spared(ranks, 19) + 19 * head
    assert step(GREEDY, 20) - step(GREEDY, 19) > head


def test_decodes_behind_a_reported_prompt_want_their_own_rows_only(ranks: Ranks) -> None:
    def step(params: SamplingParams) -> int:
        ranks.add(1, PROMPT, params)
        ranks.step([(1, len(PROMPT))])
        ranks.add(2, OTHER)
        made = products(ranks, lambda: ranks.step([(1, 1), (2, 15)]))
        ranks.drop(1)
        ranks.drop(2)
        return made

    assert step(REPORTED) == step(GREEDY)


def test_a_mean_takes_every_row_and_the_last_state_one(ranks: Ranks) -> None:
    def step(pooling: str) -> int:
        ranks.add(1, PROMPT, pooling=pooling)  # type: ignore[arg-type]
        made = products(ranks, lambda: ranks.step([(1, len(PROMPT))]))
        ranks.drop(1)
        return made

    assert step("mean") - step("last") == spared(ranks, len(PROMPT) - 1)


@pytest.mark.parametrize("size", [1, 2])
def test_prompt_logprobs_beside_chunks_are_those_of_a_prompt_alone(folder: Path, size: int) -> None:
    with Ranks(folder, block_size=8, tensor_parallel_size=size) as ranks:
        wanted: list[StepResult] = []
        alone = ranks.generate([PROMPT], REPORTED, num_tokens=3, results=wanted)[0]
        (other,) = ranks.generate([OTHER], num_tokens=2)
        ranks.add(50, PROMPT, REPORTED)
        ranks.add(51, OTHER)
        steps = [
            ranks.step([(51, 10)]),
            ranks.step([(50, 12), (51, 9)]),
            ranks.step([(50, 8), (51, 10)]),
            ranks.step([(50, 1), (51, 1)]),
            ranks.step([(50, 1), (51, 1)]),
        ]
        tokens = [unpack(result.token_ids).tolist() for result in steps]
        assert tokens[:2] == [[], []]
        assert [step[0] for step in tokens[2:]] == alone
        assert tokens[3][1:] == other[:1]
        parts = [part for result in steps for part in result.prompt_logprobs]
        assert [(part.seq_id, part.start) for part in parts] == [(50, 1), (50, 13)]
        found = np.concatenate([np.frombuffer(part.logprobs, "<f4") for part in parts])
        (whole,) = wanted[0].prompt_logprobs
        np.testing.assert_allclose(found, np.frombuffer(whole.logprobs, "<f4"), atol=1e-4)


def test_a_prompt_in_chunks_that_draw_nothing(ranks: Ranks) -> None:
    (wanted,) = ranks.generate([PROMPT], num_tokens=4)
    ranks.add(30, PROMPT)
    assert [ranks.step([(30, count)]).token_ids for count in (1, 7, 11)] == [b"", b"", b""]
    tokens = [unpack(ranks.step([(30, 1)]).token_ids).tolist() for _ in range(4)]
    assert [token for step in tokens for token in step] == wanted
