"""Decode steps from static buffers give the tokens of steps built anew; on a CPU the same functions run unrecorded."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from engine.sampling_params import SamplingParams
from engine.step import StepResult
from engine.worker.backend import CpuBackend
from engine.worker.cuda_graphs import graph_sizes
from engine.worker.mixed_graphs import token_sizes
from tests.ranks import GREEDY, Ranks

PROMPTS = [[5, 7, 9], [11] * 16, list(range(20, 61)), [3], [8, 9] * 7]
MIXED = [GREEDY, SamplingParams(temperature=0.9), SamplingParams(temperature=1.1, top_k=7, top_p=0.8), GREEDY, GREEDY]
REPORTED = [
    SamplingParams(temperature=0.9, presence_penalty=0.7, logprobs=2),
    SamplingParams(temperature=0.0, logit_bias={9: 3.0}),
    GREEDY,
    SamplingParams(temperature=0.8, min_tokens=6),
    SamplingParams(temperature=0.8, min_p=0.2),
]


@pytest.fixture(params=[1, 2], ids=["one rank", "two ranks"])
def pair(folder: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Ranks, Ranks]]:
    """The same ranks with and without static decode steps."""
    size = {"tensor_parallel_size": request.param, "max_num_seqs": 6}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuBackend, "graphs", True)
        static = Ranks(folder, **size)
    with static, Ranks(folder, **size) as plain:
        yield static, plain


@pytest.mark.parametrize("params", [[GREEDY] * 5, MIXED, REPORTED], ids=["greedy", "mixed", "reported"])
def test_tokens_and_logprobs_are_those_of_steps_built_anew(
    pair: tuple[Ranks, Ranks], params: list[SamplingParams]
) -> None:
    results: tuple[list[StepResult], list[StepResult]] = ([], [])
    tokens = [
        ranks.generate(PROMPTS, params, num_tokens=20, results=kept) for ranks, kept in zip(pair, results, strict=True)
    ]
    assert tokens[0] == tokens[1]
    assert [r.logprobs for r in results[0]] == [r.logprobs for r in results[1]]
    # The batch shrinks, grows and changes its parameters between decode steps.
    again = [ranks.generate(PROMPTS[::-1][:3], MIXED[:3], num_tokens=9, chunk=4) for ranks in pair]
    assert again[0] == again[1]


def test_a_row_that_leaves_and_one_that_comes(pair: tuple[Ranks, Ranks]) -> None:
    def run(ranks: Ranks) -> list[bytes]:
        for seq_id, prompt in enumerate(PROMPTS[:3]):
            ranks.add(seq_id, prompt)
        out = [ranks.step([(seq_id, len(PROMPTS[seq_id])) for seq_id in range(3)])]
        out += [ranks.step([(seq_id, 1) for seq_id in range(3)]) for _ in range(3)]
        ranks.drop(1)
        out += [ranks.step([(0, 1), (2, 1)]) for _ in range(2)]
        ranks.add(9, PROMPTS[4], MIXED[1])
        out += [ranks.step([(0, 1), (2, 1), (9, len(PROMPTS[4]))])]
        out += [ranks.step([(9, 1), (0, 1), (2, 1)]) for _ in range(12)]
        for seq_id in (0, 2, 9):
            ranks.drop(seq_id)
        return [result.token_ids for result in out]

    static, plain = pair
    assert run(static) == run(plain)


def test_token_sizes_end_at_the_largest_step() -> None:
    for most in (16, 100, 256, 2048):
        assert token_sizes(most)[-1] == most
    assert token_sizes(8192) == token_sizes(2048)
    sizes = token_sizes(2048)
    assert all(later - size <= min(size, 128) for size, later in pairwise(sizes))
    assert all(size % 128 == 0 for size in sizes if size >= 384)


def test_few_sizes_that_waste_little() -> None:
    for most in (1, 3, 8, 100, 256, 1000):
        sizes = graph_sizes(most)
        assert sizes == sorted(set(sizes)) and sizes[-1] == most
        for count in range(4, most + 1):
            padded = next(size for size in sizes if size >= count)
            assert padded < min(2 * count, count + 64), (most, count, padded)
    assert graph_sizes(256) == [1, 2, 4, 8, 16, 32, 64, 128, 192, 256]
