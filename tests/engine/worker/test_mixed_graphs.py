"""Steps with chunks from static buffers give what steps built anew give, whichever rows are wanted of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from engine.sampling_params import SamplingParams
from engine.step import StepResult
from engine.worker.backend import CpuBackend
from engine.worker.mixed_graphs import MixedGraphs
from tests.checkpoints import SHAPE, make_checkpoint
from tests.ranks import GREEDY, Ranks

MAX_SEQS = 20
PROMPTS = [[5, 7, 9], [11] * 16, list(range(20, 61)), [3, 4], [8, 9] * 7]
SAMPLED = SamplingParams(temperature=0.9, logprobs=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen3")
    make_checkpoint(path, "qwen3")
    return path


@pytest.fixture(params=[1, 2], ids=["one rank", "two ranks"])
def pair(folder: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Ranks, Ranks]]:
    """The same ranks with and without static buffers: graphs of 16 tokens, and of 32 and more, over 20 sequences."""
    size = {"tensor_parallel_size": request.param, "max_num_seqs": MAX_SEQS, "max_num_batched_tokens": 256}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuBackend, "graphs", True)
        static = Ranks(folder, **size)
    with static, Ranks(folder, **size) as plain:
        yield static, plain


def graphs_of(ranks: Ranks) -> MixedGraphs:
    runner = ranks.workers[0]._runner
    assert runner is not None and runner._mixed is not None
    return runner._mixed


def rows_of(ranks: Ranks) -> dict[int, int]:
    """Of each recorded size, the rows it gives."""
    return {size: len(hidden) for size, (_, hidden) in graphs_of(ranks)._replays.items()}


def same_results(pair: tuple[Ranks, Ranks], run: Callable[[Ranks], list[StepResult]]) -> list[StepResult]:
    """Run it on both; their results are the same, up to rounding."""
    results = [run(ranks) for ranks in pair]
    for found, expected in zip(*results, strict=True):
        assert found.token_ids == expected.token_ids
        for mine, other in zip(found.logprobs, expected.logprobs, strict=True):
            assert (mine.sample, mine.rank, mine.top_ids) == (other.sample, other.rank, other.top_ids)
            assert mine.logprob == pytest.approx(other.logprob, abs=1e-4)
        for part, wanted in zip(found.prompt_logprobs, expected.prompt_logprobs, strict=True):
            assert (part.seq_id, part.start, part.top_ids) == (wanted.seq_id, wanted.start, wanted.top_ids)
            np.testing.assert_allclose(floats(part.logprobs), floats(wanted.logprobs), atol=1e-4)
        for vector, same in zip(found.pooled, expected.pooled, strict=True):
            assert vector.sample == same.sample
            np.testing.assert_allclose(floats(vector.vector), floats(same.vector), rtol=1e-4, atol=1e-5)
    return results[0]


def floats(data: bytes) -> npt.NDArray[np.float32]:
    return np.frombuffer(data, "<f4")


def test_large_steps_give_a_row_a_sequence(pair: tuple[Ranks, Ranks]) -> None:
    tokens = [ranks.generate(PROMPTS, num_tokens=6) for ranks in pair]
    assert tokens[0] == tokens[1]
    tokens = [ranks.generate(PROMPTS, SAMPLED, num_tokens=6, chunk=3) for ranks in pair]
    assert tokens[0] == tokens[1]
    rows = rows_of(pair[0])
    assert rows[128] == MAX_SEQS and rows[16] == 16
    wide = {size: hidden.shape[1] for size, (_, hidden) in graphs_of(pair[0])._replays.items()}
    assert set(wide.values()) == {SHAPE["hidden_size"]}


def test_a_fork_beside_chunks_draws_from_one_row(pair: tuple[Ranks, Ranks]) -> None:
    def run(ranks: Ranks) -> list[StepResult]:
        for seq_id in range(4):
            ranks.add(seq_id, PROMPTS[2], SAMPLED, seed=seq_id, num_computed=0 if seq_id in (0, 3) else 41)
        ranks.tables[1], ranks.tables[2] = [50, 51, 52], [53, 54, 55]
        # All three draw from what the first computes; the last computes a chunk and draws nothing.
        out = [ranks.step([(0, 41), (3, 20)], samples={2: 0, 0: 0, 1: 0})]
        for seq_id in range(4):
            ranks.drop(seq_id)
        return out

    (result,) = same_results(pair, run)
    assert len(result.token_ids) == 12
    assert rows_of(pair[0])[64] == MAX_SEQS


def test_steps_that_draw_nothing(pair: tuple[Ranks, Ranks]) -> None:
    def run(ranks: Ranks) -> list[StepResult]:
        ranks.add(1, PROMPTS[2])
        ranks.add(2, PROMPTS[1])
        out = [ranks.step([(1, 20), (2, 8)]), ranks.step([(1, 2), (2, 3)]), ranks.step([(1, 19), (2, 5)])]
        out.append(ranks.step([(1, 1), (2, 1)]))
        ranks.drop(1)
        ranks.drop(2)
        return out

    results = same_results(pair, run)
    assert [len(result.token_ids) for result in results] == [0, 0, 8, 8]
    assert rows_of(pair[0]) == {16: 16, 32: MAX_SEQS}


def test_prompt_logprobs_beside_chunks_take_no_graph_of_fewer_rows(pair: tuple[Ranks, Ranks]) -> None:
    reported = SamplingParams(temperature=0.0, prompt_logprobs=3)

    def run(ranks: Ranks) -> list[StepResult]:
        ranks.add(1, PROMPTS[2], reported)
        ranks.add(2, PROMPTS[1])
        out = [ranks.step([(1, 30), (2, 16)]), ranks.step([(1, 10), (2, 1)])]
        if ranks is pair[0]:
            assert rows_of(ranks) == {16: 16}, "46 tokens, each wanted"
        ranks.add(3, PROMPTS[1])
        # 18 tokens, each wanted: as many rows as a graph of 32 tokens gives.
        ranks.add(4, PROMPTS[2][:18], reported)
        out += [ranks.step([(4, 17), (2, 1)]), ranks.step([(1, 1), (2, 1), (3, 16), (4, 1)])]
        for seq_id in range(1, 5):
            ranks.drop(seq_id)
        return out

    results = same_results(pair, run)
    assert [len(part.logprobs) // 4 for result in results for part in result.prompt_logprobs] == [30, 10, 17]
    assert rows_of(pair[0]) == {16: 16, 32: MAX_SEQS}


def test_embedded_beside_drawing(pair: tuple[Ranks, Ranks]) -> None:
    def run(ranks: Ranks) -> list[StepResult]:
        ranks.add(1, PROMPTS[2], pooling="last")
        ranks.add(2, PROMPTS[2], pooling="mean")
        ranks.add(3, PROMPTS[1], GREEDY)
        out = [
            ranks.step([(1, 20), (3, 12)]),
            ranks.step([(1, 21), (3, 4)]),
            ranks.step([(2, 25), (3, 1)]),
            ranks.step([(2, 16), (3, 1)]),
        ]
        for seq_id in range(1, 4):
            ranks.drop(seq_id)
        return out

    results = same_results(pair, run)
    assert [[part.sample for part in result.pooled] for result in results] == [[], [0], [], [1]]
    # The steps of the mean have more tokens than there can be sequences, or no more than a graph gives rows for.
    assert rows_of(pair[0]) == {32: MAX_SEQS}
