"""An engine over ranks that hash, its requests, and what must come of them."""

from __future__ import annotations

import random

from engine.llm_engine import LLMEngine
from engine.request import Request
from engine.sampling_params import SamplingParams
from tests.fakes import Collected, HashExecutor, engine_config
from tests.hash_model import EOS, VOCAB_SIZE, expected_tokens, random_prompt


def make_engine(
    num_blocks: int = 100,
    *,
    eos_every: int = 20,
    lazy: bool = False,
    fail_at: frozenset[int] = frozenset(),
    **changes: object,
) -> tuple[LLMEngine, HashExecutor]:
    config = engine_config(**changes)
    executor = HashExecutor(config, num_blocks, eos_every=eos_every, lazy=lazy, fail_at=fail_at)
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
