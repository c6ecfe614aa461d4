"""Beam search: the scores against a definition that keeps everything, whole searches against Transformers' generate."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.beam_search import BeamSearch
from engine.config import EngineConfig
from engine.llm_engine import LLMEngine
from engine.local_executor import LocalExecutor
from engine.model_config import ModelConfig, resolve
from engine.request import Request, SequenceOutput
from engine.sampling_params import SamplingParams
from tests.checkpoints import make_checkpoint

EOS = 2
Tokens = tuple[int, ...]


class Table:
    """A language model of `vocab_size` tokens without structure: random log-probabilities after every history."""

    def __init__(self, seed: int, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._seed = seed
        self.after = lru_cache(maxsize=None)(self._after)

    def _after(self, history: Tokens) -> np.ndarray[Any, np.dtype[np.float32]]:
        rng = np.random.default_rng([self._seed, *history])
        logits = 3 * rng.standard_normal(self.vocab_size)
        return (logits - np.log(np.exp(logits).sum())).astype(np.float32)


def searched(table: Table, params: SamplingParams, stops: frozenset[int], max_tokens: int) -> list[tuple[Tokens, str]]:
    """What BeamSearch finds, each beam reporting only as many tokens as it asks for."""
    search = BeamSearch(params, stops, max_tokens)
    live: list[Tokens] = [()]
    while live:
        for index in random.Random(len(live)).sample(range(len(live)), len(live)):
            assert not search.complete
            logprobs = table.after(live[index])
            top = np.argsort(-logprobs, kind="stable")[: search.rank_params.num_logprobs].astype(np.int32)
            search.report(index, top, logprobs[top])
        chosen = search.advance()
        live = [(*live[parent], token) for parent, token in chosen]
        assert live == [tuple(beam.token for beam in each.history()) for each in search.beams]
        assert len(live) in (0, params.beam_width)
    results = search.results()
    assert [each.score for each in results] == sorted((each.score for each in results), reverse=True)
    for each in results:
        logprobs = [entry.logprob for entry in each.logprobs]
        assert logprobs == [table.after(tuple(each.token_ids[:i]))[t] for i, t in enumerate(each.token_ids)]
        assert all(len(entry.top_ids) == (params.logprobs or 0) for entry in each.logprobs)
        assert each.score == pytest.approx(sum(logprobs) / len(logprobs) ** params.length_penalty)
    return [(tuple(each.token_ids), each.finish_reason) for each in results]


def defined(table: Table, params: SamplingParams, stops: frozenset[int], max_tokens: int) -> list[tuple[Tokens, str]]:
    """The same by the rules alone: every continuation of every beam is looked at."""
    width, penalty = params.beam_width, params.length_penalty
    live: list[tuple[float, Tokens]] = [(0.0, ())]
    ended: list[tuple[float, Tokens, str]] = []
    for length in range(1, max_tokens + 1):
        every = [
            (score + float(logprob), (*tokens, token))
            for score, tokens in live
            for token, logprob in enumerate(table.after(tokens))
            if length > params.min_tokens or token not in stops
        ]
        every.sort(reverse=True)
        for score, tokens in every[:width]:
            if tokens[-1] in stops:
                ended.append((score / length**penalty, tokens, "stop"))
            elif length == max_tokens:
                ended.append((score / length**penalty, tokens, "length"))
        ended = sorted(ended, reverse=True)[:width]
        live = [(score, tokens) for score, tokens in every if tokens[-1] not in stops][:width]
        if len(ended) == width:
            # What the best live beam would score as long as it is, or where length is rewarded at its longest.
            final = max_tokens if params.early_stopping == "never" and penalty > 0 else length
            if params.early_stopping is True or live[0][0] / final**penalty <= ended[-1][0]:
                break
    return [(tokens, reason) for _, tokens, reason in ended[: params.n]]


def test_scores_are_those_of_the_definition() -> None:
    """Random small languages, widths, ends, penalties and rules."""
    seen = set()
    for seed in range(400):
        rng = random.Random(seed)
        width = rng.randint(1, 8)
        stops = frozenset(rng.sample(range(20), rng.choice([0, 1, 1, 2, 5])))
        table = Table(seed, rng.randint(max(width + len(stops), 20), 30))
        max_tokens = rng.randint(1, 10)
        params = SamplingParams(
            n=rng.randint(1, width),
            best_of=width,
            use_beam_search=True,
            length_penalty=rng.choice([-2.0, -0.5, 0.0, 0.7, 1.0, 2.0]),
            early_stopping=rng.choice([True, False, "never"]),
            min_tokens=rng.choice([0, 0, min(2, max_tokens), max_tokens]),
            max_tokens=max_tokens,
            logprobs=rng.choice([None, 3]),
        )
        wanted = defined(table, params, stops, max_tokens)
        assert searched(table, params, stops, max_tokens) == wanted
        seen |= {(params.early_stopping, np.sign(params.length_penalty), reason) for _, reason in wanted}
    assert len(seen) == 18, "every rule met every sign and both ends"


def test_a_report_can_be_given_again() -> None:
    search = BeamSearch(SamplingParams(n=2, use_beam_search=True), frozenset(), 5)
    search.report(0, np.array([7, 8], np.int32), np.array([-1, -2], np.float32))
    search.report(0, np.array([9, 8], np.int32), np.array([-1, -2], np.float32))
    assert search.complete and search.advance() == [(0, 9), (0, 8)]
    assert not search.complete


def test_greedy_is_a_search_of_one_beam() -> None:
    table = Table(3, 20)
    tokens: list[int] = []
    while len(tokens) < 6:
        tokens.append(int(table.after(tuple(tokens)).argmax()))
    params = SamplingParams(use_beam_search=True)
    assert searched(table, params, frozenset(), 6) == [(tuple(tokens), "length")]


@pytest.fixture
def checkpoint(tmp_path: Path, family: str, num_blocks: int) -> Iterator[tuple[Any, LLMEngine]]:
    """Transformers' model, and an engine of it."""
    torch.set_num_threads(1)
    model = make_checkpoint(tmp_path, family, initializer_range=0.1)
    given = EngineConfig.from_args(
        model=str(tmp_path), dtype="float32", num_blocks=num_blocks, block_size=8, max_model_len=64
    )
    model_config = ModelConfig.load(given)
    config = resolve(given, model_config)
    engine = LLMEngine(
        config, LocalExecutor(config, model_config), vocab_size=model_config.vocab_size, eos_token_ids=(EOS,)
    )
    engine.start()
    yield model, engine
    engine.shutdown()


PENALTIES: list[dict[str, float]] = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 4.0},
    {"repetition_penalty": 0.6},
    {"presence_penalty": 1.5, "frequency_penalty": 0.7},
    {"presence_penalty": -1.0, "repetition_penalty": 1.2},
]


@pytest.mark.parametrize("num_blocks", [200, 12])
@pytest.mark.parametrize("family", ["llama3", "qwen2"])
def test_penalties_are_those_of_transformers(checkpoint: tuple[Any, LLMEngine], num_blocks: int) -> None:
    """Beside searches without penalties, and ordinary requests with and without."""
    model, engine = checkpoint
    rng = random.Random(num_blocks)
    requests, wanted = [], {}
    for number, given in enumerate([*PENALTIES, {}] * 3):
        width = 2 + number // 6  # to 4
        prompt = [rng.randrange(3, 199) for _ in range(rng.randint(1, 20))]
        common: dict[str, Any] = {"max_tokens": 14, "n": width, "use_beam_search": True, "logprobs": 2}
        params = SamplingParams(**common, **given, length_penalty=rng.choice([1.0, 0.0, 2.0]))
        requests.append(Request.create(str(number), prompt, params))
        wanted[str(number)] = of_transformers(model, prompt, params)
        plain = SamplingParams(temperature=0, max_tokens=12, logprobs=2, **given)
        requests.append(Request.create(f"plain {number}", prompt, plain))
        wanted[f"plain {number}"] = of_transformers(model, prompt, plain)
    outputs, _ = run(engine, requests)
    for request in requests:
        found = sorted(outputs[request.request_id], key=lambda output: output.index)
        assert [tokens for _, tokens in joined(found)] == wanted[request.request_id], request.request_id
    for request in requests[-12::2]:
        bare = request.params.replace(presence_penalty=0.0, frequency_penalty=0.0, repetition_penalty=1.0)
        same = of_transformers(model, list(request.prompt_token_ids), bare) == wanted[request.request_id]
        assert same == (bare == request.params), "penalties matter"
    for request in requests[:2]:
        ((_, alone),) = run(engine, [request])[0].items()
        assert np.allclose(told(outputs[request.request_id]), told(alone), atol=1e-4)
    assert (engine.stats().preemptions > 0) == (num_blocks == 12)


@pytest.mark.parametrize("num_blocks", [200, 12])
@pytest.mark.parametrize("family", ["llama3", "qwen2"])
def test_outputs_are_those_of_transformers(checkpoint: tuple[Any, LLMEngine], num_blocks: int) -> None:
    """Many searches at once beside ordinary requests, in a roomy cache and in a tight one."""
    model, engine = checkpoint
    rng = random.Random(num_blocks)
    requests, wanted = [], {}
    penalties, rules = [0.0, 1.0, -1.0, 2.0, 0.5], [True, False, "never"]
    for number in range(15):
        width = 2 + number % 7
        prompt = [rng.randrange(3, 199) for _ in range(rng.randint(1, 20))]
        params = SamplingParams(
            n=rng.randint(1, width),
            best_of=width,
            use_beam_search=True,
            length_penalty=penalties[number % 5],
            early_stopping=rules[number % 3],  # type: ignore[arg-type]
            max_tokens=rng.randint(3, 16),
            min_tokens=rng.choice([0, 0, 2]),
            stop_token_ids=tuple(rng.sample(range(3, 199), rng.choice([0, 6, 6]))),
        )
        requests.append(Request.create(str(number), prompt, params))
        wanted[str(number)] = of_transformers(model, prompt, params)
        plain = SamplingParams(temperature=0, max_tokens=12)
        requests.append(Request.create(f"plain {number}", prompt, plain))
        greedy = SamplingParams(use_beam_search=True, max_tokens=12)
        wanted[f"plain {number}"] = of_transformers(model, prompt, greedy)
    outputs, most_saved = run(engine, requests)
    for request in requests:
        found = sorted(outputs[request.request_id], key=lambda output: output.index)
        assert [tokens for _, tokens in joined(found)] == wanted[request.request_id]
        if request.params.use_beam_search:
            assert all(output.finish_reason for output in found) and len(found) == request.params.n
    stats = engine.stats()
    assert most_saved > 0 and stats.used_blocks == 0
    assert (stats.preemptions > 0) == (num_blocks == 12)


def run(engine: LLMEngine, requests: list[Request]) -> tuple[dict[str, list[SequenceOutput]], int]:
    """All outputs by request, and the most blocks that sharing saved at a time."""
    outputs: dict[str, list[SequenceOutput]] = {request.request_id: [] for request in requests}
    most_saved = 0
    for request in requests:
        engine.add_request(request)
    while engine.has_unfinished:
        for output in engine.step():
            outputs[output.request_id].append(output)
        most_saved = max(most_saved, engine.stats().saved_blocks)
    return outputs, most_saved


def joined(outputs: list[SequenceOutput]) -> list[tuple[int, list[int]]]:
    """(index, all its tokens)."""
    tokens: dict[int, list[int]] = {}
    for output in outputs:
        tokens.setdefault(output.index, []).extend(output.token_ids)
    return list(tokens.items())


def told(outputs: list[SequenceOutput]) -> list[float]:
    """Log-probabilities of all tokens, those of the likeliest behind each."""
    entries = [entry for output in sorted(outputs, key=lambda output: output.index) for entry in output.logprobs or []]
    assert entries
    return [value for entry in entries for value in (entry.logprob, *entry.top_logprobs)]


def of_transformers(model: Any, prompt: list[int], params: SamplingParams) -> list[list[int]]:
    """The output tokens of `generate`, the best first, each with the token that ended it.

    It has no presence and frequency penalties: they are added to its processors as they are defined.
    """
    ends = [EOS, *params.stop_token_ids]

    def minus(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        said = torch.zeros_like(scores)
        output = input_ids[:, len(prompt) :]
        said.scatter_add_(1, output, torch.ones_like(output, dtype=scores.dtype))
        return scores - params.presence_penalty * (said > 0) - params.frequency_penalty * said

    rows = model.generate(
        torch.tensor([prompt]),
        num_beams=params.beam_width,
        do_sample=False,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
        num_return_sequences=params.n,
        max_new_tokens=params.max_tokens,
        min_new_tokens=params.min_tokens,
        repetition_penalty=params.repetition_penalty,
        logits_processor=[minus],
        eos_token_id=ends,
        pad_token_id=0,
    )
    outputs = []
    for row in rows[:, len(prompt) :].tolist():
        length = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        outputs.append(row[:length])
    return outputs
