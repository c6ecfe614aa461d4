"""LLMEngine on ranks that only hash: the right tokens, the right ends, and nothing left behind."""

from __future__ import annotations

import random

import pytest

from engine.errors import PromptTooLong, RequestError
from engine.llm_engine import LLMEngine
from engine.request import Request
from engine.sampling_params import SamplingParams
from tests.fakes import EOS, VOCAB_SIZE, Collected, HashExecutor, engine_config, expected_tokens, random_prompt


def make_engine(num_blocks: int = 100, *, eos_every: int = 20, **changes: object) -> tuple[LLMEngine, HashExecutor]:
    config = engine_config(**changes)
    executor = HashExecutor(config, num_blocks, eos_every=eos_every)
    engine = LLMEngine(config, executor, vocab_size=VOCAB_SIZE, eos_token_ids=(EOS,))
    engine.start()
    return engine, executor


def request(request_id: str = "a", prompt: int | list[int] = 10, *, seed: int = 7, **params: object) -> Request:
    tokens = random_prompt(random.Random(f"{request_id}"), prompt) if isinstance(prompt, int) else prompt
    return Request.create(request_id, tokens, SamplingParams(seed=seed, **params))  # type: ignore[arg-type]


def run(engine: LLMEngine, *requests: Request) -> Collected:
    for each in requests:
        engine.add_request(each)
    collected = Collected()
    for _ in range(10_000):
        if not engine.has_unfinished:
            return collected
        collected.add(engine.step())
    raise AssertionError("the engine does not finish")


def check(collected: Collected, *requests: Request, model_len: int = 64, eos_every: int = 20) -> None:
    for each in requests:
        for index, (tokens, reason) in enumerate(expected_tokens(each, model_len, eos_every)):
            assert collected.tokens[each.request_id, index] == tokens
            assert collected.reasons[each.request_id, index] == reason


@pytest.mark.parametrize("steps_ahead", [1, 2, 3])
@pytest.mark.parametrize("num_blocks", [8, 16, 100])
def test_tokens_are_those_of_the_definition(num_blocks: int, steps_ahead: int) -> None:
    engine, _ = make_engine(num_blocks, steps_ahead=steps_ahead, max_num_batched_tokens=16)
    requests = [request(str(i), 1 + 3 * i, max_tokens=20, n=1 + i % 3) for i in range(12)]
    check(run(engine, *requests), *requests)
    stats = engine.stats()
    assert stats.free_blocks == num_blocks and stats.running == stats.waiting == 0


def test_refuses_what_can_never_fit() -> None:
    engine, _ = make_engine(4)
    with pytest.raises(PromptTooLong, match="max_model_len"):
        engine.add_request(request(prompt=64))
    with pytest.raises(PromptTooLong, match="4 blocks of 8"):
        engine.add_request(request(prompt=33))
    with pytest.raises(RequestError, match="vocabulary"):
        engine.add_request(request(prompt=[VOCAB_SIZE]))
    assert not engine.has_unfinished
