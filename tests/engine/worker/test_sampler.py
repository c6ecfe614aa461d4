"""What SamplingParams mean: against Transformers' logits processors and definitions written out in numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.sampling_params import SamplingParams
from engine.step import NewSequence, pack, unpack
from engine.worker.batch import Batch
from engine.worker.sampler import Sampler, sampled_logprobs
from engine.worker.sampling_state import SamplingState
from kernels.watermark import DELTA, is_green

VOCAB = 50
EOS = (2, 3)
PROMPT = [5, 6, 7, 5, 5]
OUTPUT = [8, 6, 8, 8]
CPU = torch.device("cpu")


class Rows:
    """A sampler over sequences of given tokens, without a model: one row of logits each."""

    def __init__(self, max_seqs: int = 600) -> None:
        self.batch = Batch(max_seqs, 64, 16, CPU)
        self.state = SamplingState(self.batch, max_seqs, VOCAB, EOS)
        self.sampler = Sampler(self.batch, self.state)
        self.slots: list[int] = []

    def add(
        self, params: SamplingParams, prompt: Sequence[int] = PROMPT, output: Sequence[int] = OUTPUT, seed: int = 0
    ) -> None:
        tokens = [*prompt, *output]
        new = NewSequence(len(self.slots), "r", pack(tokens), len(prompt), len(tokens), b"", params, seed)
        slot = self.batch.add(new)
        self.state.add(slot, new)
        self.slots.append(slot)

    def draw(self, logits: Tensor) -> list[int]:
        """One token a row, appended to the mirror."""
        slots = np.array(self.slots, np.int64)
        token_ids, self.rows = self.sampler.sample(logits, slots)
        self.batch.append(slots, token_ids)
        tokens: list[int] = token_ids.tolist()
        return tokens


def random_logits(rows: int = 1, seed: int = 0, scale: float = 2.0) -> Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * scale


def draw_one(params: SamplingParams, logits: Tensor, *, output: Sequence[int] = OUTPUT, seed: int = 0) -> int:
    rows = Rows(4)
    rows.add(params, output=output, seed=seed)
    return rows.draw(logits)[0]


def ranking(params: SamplingParams, logits: Tensor, *, count: int = VOCAB, output: Sequence[int] = OUTPUT) -> list[int]:
    """`count` greedy choices, each taken away after it is made: the order of the adjusted logits."""
    order: list[int] = []
    logits = logits.clone()
    for _ in range(count):
        order.append(draw_one(params, logits, output=output))
        logits[0, order[-1]] = float("-inf")
    return order


def frequencies(params: SamplingParams, logits: Tensor, draws: int = 6000) -> np.ndarray:  # type: ignore[type-arg]
    """How often each token is drawn from one row of logits, over seeds and positions."""
    rows = Rows(600)
    for seed in range(600):
        rows.add(params, seed=seed * 7919)
    counts = np.zeros(VOCAB)
    for _ in range(draws // 600):
        counts += np.bincount(rows.draw(logits.expand(600, -1).contiguous()), minlength=VOCAB)
    return counts / counts.sum()


def assert_drawn_from(found: np.ndarray, wanted: np.ndarray, draws: int = 6000) -> None:  # type: ignore[type-arg]
    """Nothing outside the support, and every count within five standard deviations (and three, for the rare ones)."""
    assert not found[wanted == 0].any()
    assert (np.abs(found - wanted) * draws <= 5 * np.sqrt(wanted * (1 - wanted) * draws) + 3).all()


@pytest.mark.parametrize("repetition", [0.5, 1.3, 3.0])
def test_repetition_penalty_is_transformers(repetition: float) -> None:
    logits = random_logits()
    tokens = torch.tensor([PROMPT + OUTPUT])
    wanted = RepetitionPenaltyLogitsProcessor(repetition)(tokens, logits.clone())
    params = SamplingParams(temperature=0, repetition_penalty=repetition)
    assert ranking(params, logits) == wanted[0].argsort(descending=True).tolist()


@pytest.mark.parametrize("presence, frequency", [(1.5, 0.0), (0.0, 0.7), (-1.0, 0.4), (2.0, -2.0)])
def test_presence_and_frequency_penalties_count_the_output_only(presence: float, frequency: float) -> None:
    logits = random_logits()
    counts = torch.bincount(torch.tensor(OUTPUT), minlength=VOCAB)
    wanted = logits[0] - presence * (counts > 0) - frequency * counts
    params = SamplingParams(temperature=0, presence_penalty=presence, frequency_penalty=frequency)
    assert ranking(params, logits) == wanted.argsort(descending=True).tolist()


def test_penalties_count_what_is_drawn() -> None:
    """A frequency penalty of 2 over equal gaps of 1.5: each token's turn comes when the others have been used up."""
    logits = torch.full((1, VOCAB), -100.0)
    logits[0, 10:13] = torch.tensor([3.0, 1.5, 0.0])
    rows = Rows(4)
    rows.add(SamplingParams(temperature=0, frequency_penalty=2.0), output=[])
    counts, wanted, drawn = torch.zeros(VOCAB), [], []
    for _ in range(12):
        wanted.append(int((logits[0] - 2 * counts).argmax()))
        counts[wanted[-1]] += 1
        drawn += rows.draw(logits)
    assert drawn == wanted and len(set(drawn)) == 3


def test_a_slots_counts_are_forgotten_with_its_sequence() -> None:
    logits = torch.full((1, VOCAB), -100.0)
    logits[0, 10:12] = torch.tensor([3.0, 2.0])
    params = SamplingParams(temperature=0, frequency_penalty=2.0)
    rows = Rows(1)
    for seq_id in range(3):
        new = NewSequence(seq_id, "r", pack(PROMPT), len(PROMPT), 0, b"", params, 0)
        rows.slots = [rows.batch.add(new)]
        rows.state.add(rows.slots[0], new)
        assert [rows.draw(logits)[0] for _ in range(2)] == [10, 11]
        rows.state.drop(rows.slots)
        rows.batch.clear()


def test_logit_bias_adds_and_bans() -> None:
    logits = random_logits()
    bias = {int(logits.argmax()): -100.0, 17: 3.25, 40: -1.0, VOCAB + 5: 100.0}
    wanted = logits[0].clone()
    for token, value in bias.items():
        if token < VOCAB:
            wanted[token] += value
    params = SamplingParams(temperature=0, logit_bias=bias)
    assert draw_one(params, logits) == int(wanted.argmax())
    assert_drawn_from(frequencies(params.replace(temperature=1.0), logits), wanted.softmax(-1).double().numpy())


def test_allowed_token_ids_are_all_that_is_drawn() -> None:
    logits = random_logits()
    allowed = (4, 31, 32, 49, VOCAB + 9)
    params = SamplingParams(temperature=0, allowed_token_ids=allowed)
    assert ranking(params, logits, count=4) == sorted(allowed[:4], key=lambda token: -float(logits[0, token]))
    wanted = torch.full((VOCAB,), float("-inf"))
    wanted[list(allowed[:4])] = logits[0, list(allowed[:4])]
    assert_drawn_from(frequencies(params.replace(temperature=1.0), logits), wanted.softmax(-1).double().numpy())


@pytest.mark.parametrize(
    "words, output",
    [
        (((9,),), [1, 1]),
        (((8, 6, 9), (7,)), [1, 8, 6]),
        (((8, 6, 9),), [6, 8]),
        (((8, 6, 9), (6, 9), (1, 6, 9)), [4, 8, 6]),
        (((8, 8, 8, 9), (8, 9)), [8, 8]),
        (((9, 9, 10),), [9, 9, 9]),
    ],
)
def test_bad_words_are_transformers(words: tuple[tuple[int, ...], ...], output: list[int]) -> None:
    logits = random_logits()
    logits[0, 7:11] = torch.tensor([6.0, 5.0, 8.0, 7.0])
    processor = NoBadWordsLogitsProcessor([list(word) for word in words])
    wanted = processor(torch.tensor([output]), logits.clone())
    params = SamplingParams(temperature=0, bad_words_token_ids=words)
    finite = int(wanted.isfinite().sum())
    order = wanted[0].argsort(descending=True).tolist()[:finite]
    assert ranking(params, logits, count=finite, output=output) == order


def test_a_bad_word_begun_in_the_prompt_is_not_said_by_the_output() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 9] = 5
    params = SamplingParams(temperature=0, bad_words_token_ids=((5, 9),))
    assert draw_one(params, logits, output=[]) == 9
    assert draw_one(params, logits, output=[5]) != 9


def test_bad_words_see_tokens_that_were_only_just_drawn() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 8:11] = torch.tensor([1.0, 3.0, 2.0])
    rows = Rows(4)
    rows.add(SamplingParams(temperature=0, bad_words_token_ids=((9, 9), (9, 10, 10))), output=[])
    assert [rows.draw(logits)[0] for _ in range(7)] == [9, 10, 9, 10, 9, 10, 9]
    rows = Rows(4)
    rows.add(SamplingParams(temperature=0, bad_words_token_ids=((9, 9), (9, 10), (8, 8))), output=[])
    assert [rows.draw(logits)[0] for _ in range(5)] == [9, 8, 9, 8, 9]


@pytest.mark.parametrize(
    "settings, banned",
    [({}, {2, 3}), ({"stop_token_ids": (30,)}, {2, 3, 30}), ({"stop_token_ids": (30,), "ignore_eos": True}, {30})],
)
def test_min_tokens_keeps_what_would_stop_away(settings: dict[str, object], banned: set[int]) -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [2, 3, 30]] = torch.tensor([9.0, 8.0, 7.0])
    logits[0, 4] = 5.0
    rows = Rows(4)
    rows.add(SamplingParams(temperature=0, min_tokens=3, **settings), output=[1])  # type: ignore[arg-type]
    rows.add(SamplingParams(temperature=0), output=[1])
    drawn = [rows.draw(logits.expand(2, -1).contiguous()) for _ in range(3)]
    best = 4 if banned == {2, 3, 30} else 30 if banned == {2, 3} else 2
    assert drawn == [[best, 2], [best, 2], [2, 2]]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.7},
        {"top_k": 1},
        {"top_k": 5},
        {"top_k": 500},
        {"top_p": 0.1},
        {"top_p": 0.8},
        {"top_p": 0.99},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"temperature": 1.3, "top_k": 12, "top_p": 0.7},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.95, "min_p": 0.05},
    ],
)
def test_draws_follow_transformers_distribution(settings: dict[str, float]) -> None:
    logits = random_logits(seed=3)
    processors = LogitsProcessorList()
    if "temperature" in settings:
        processors.append(TemperatureLogitsWarper(settings["temperature"]))
    if "top_k" in settings:
        processors.append(TopKLogitsWarper(int(settings["top_k"])))
    if "top_p" in settings:
        processors.append(TopPLogitsWarper(settings["top_p"]))
    if "min_p" in settings:
        processors.append(MinPLogitsWarper(settings["min_p"]))
    wanted = processors(torch.tensor([PROMPT]), logits.clone()).softmax(-1)[0].double().numpy()
    assert_drawn_from(frequencies(SamplingParams(**settings), logits), wanted)  # type: ignore[arg-type]


def test_rows_of_every_kind_in_one_batch_are_what_they_are_alone() -> None:
    kinds = [
        SamplingParams(temperature=0),
        SamplingParams(),
        SamplingParams(temperature=0.5, top_k=4),
        SamplingParams(top_p=0.6),
        SamplingParams(min_p=0.2, repetition_penalty=1.4),
        SamplingParams(temperature=0, presence_penalty=2.0, logit_bias={9: 4.0}),
        SamplingParams(allowed_token_ids=(3, 9, 20), min_tokens=16),
        SamplingParams(temperature=0, bad_words_token_ids=((8, 3), (4,)), min_tokens=16),
        SamplingParams(temperature=1.2, logit_bias={1: -3.0}, frequency_penalty=-0.5, bad_words_token_ids=((7,),)),
        SamplingParams(temperature=0, allowed_token_ids=(2, 40)),
    ]
    together = Rows(len(kinds))
    for seed, params in enumerate(kinds):
        together.add(params, seed=seed)
    alone = []
    for seed, params in enumerate(kinds):
        alone.append(Rows(1))
        alone[-1].add(params, seed=seed)
    for step in range(12):
        logits = random_logits(len(kinds), seed=step)
        assert together.draw(logits) == [rows.draw(logits[i : i + 1])[0] for i, rows in enumerate(alone)]


def test_the_logits_are_left_as_they_were() -> None:
    logits = random_logits(2)
    before = logits.clone()
    rows = Rows(2)
    rows.add(SamplingParams(repetition_penalty=2.0, logit_bias={3: 9.0}, allowed_token_ids=(3, 4), top_k=2))
    rows.add(SamplingParams(temperature=0.2))
    rows.draw(logits)
    assert torch.equal(logits, before)


def test_logprobs_of_the_rows_that_want_them() -> None:
    logits = random_logits(3)
    rows = Rows(3)
    rows.add(SamplingParams(temperature=0.5, logprobs=0))
    rows.add(SamplingParams())
    rows.add(SamplingParams(n=1, best_of=2, top_k=3))
    tokens = rows.draw(logits)
    found = sampled_logprobs(logits, torch.tensor(tokens), rows.rows)()
    wanted = logits.log_softmax(-1)
    assert [entry.sample for entry in found] == [0, 2]
    for entry in found:
        token = tokens[entry.sample]
        assert entry.logprob == pytest.approx(float(wanted[entry.sample, token]), abs=1e-5)
        assert entry.rank == 1 + int((logits[entry.sample] > logits[entry.sample, token]).sum())
        assert len(unpack(entry.top_ids)) == 0


def test_a_watermark_greedily_takes_the_likeliest_of_the_lifted() -> None:
    logits = random_logits(seed=3)
    rows = Rows(4)
    rows.add(SamplingParams(temperature=0, watermark=True))
    rows.add(SamplingParams(temperature=0, watermark=True), output=[8, 9])
    rows.add(SamplingParams(temperature=0))
    drawn = rows.draw(logits.expand(3, -1))
    for token, previous in zip(drawn, (8, 9), strict=False):
        lifted = logits[0] + DELTA * is_green(torch.full((VOCAB,), previous), torch.arange(VOCAB))
        assert token == int(lifted.argmax())
    assert drawn[2] == int(logits.argmax())


def test_penalties_come_after_a_watermark() -> None:
    """As Text Generation Inference does: what is lifted above 0 is divided."""
    green = is_green(torch.full((VOCAB,), 8), torch.arange(VOCAB))
    seen = next(token for token in (5, 6, 7, 8) if green[token])
    logits = torch.full((1, VOCAB), -9.0)
    logits[0, seen] = -1.0  # lifted to 1, then divided by 5: 0.2
    other = int((~green).nonzero()[-1])
    for height, wanted in ((0.1, seen), (0.3, other)):
        logits[0, other] = height
        rows = Rows(2)
        rows.add(SamplingParams(temperature=0, watermark=True, repetition_penalty=5.0))
        assert rows.draw(logits) == [wanted]
