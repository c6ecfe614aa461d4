"""Fair shares between tenants, in steps of ranks that hash: no clock is read."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.llm_engine import LLMEngine
from engine.request import Request
from engine.sampling_params import SamplingParams
from tests.fakes import Collected, HashExecutor, engine_config
from tests.hash_model import EOS, VOCAB_SIZE, expected_tokens, random_prompt

NEVER = 10**15


def make_engine(num_blocks: int = 64, eos_every: int = NEVER, **changes: object) -> LLMEngine:
    config = engine_config(**{"max_num_batched_tokens": 32, **changes})
    executor = HashExecutor(config, num_blocks, eos_every=eos_every)
    engine = LLMEngine(config, executor, vocab_size=VOCAB_SIZE, eos_token_ids=(EOS,))
    engine.start()
    return engine


def ask(name: str, tenant: str, prompt: int, output: int) -> Request:
    tokens = random_prompt(random.Random(name), prompt)
    return Request.create(name, tokens, SamplingParams(max_tokens=output, seed=len(name)), tenant=tenant)


def visitor() -> Iterator[Request]:
    """Short requests of the small tenant, one after the other."""
    for number in range(40):
        yield ask(f"small{number}", "small", 6, 8)


def latencies(engine: LLMEngine, flood: Iterator[Request], collected: Collected) -> list[int]:
    """Steps that each short request took, while `flood` is never allowed to run dry."""
    steps: list[int] = []
    outstanding = 0
    for request in visitor():
        engine.add_request(request)
        began = engine.metrics.num_steps
        while (request.request_id, 0) not in collected.reasons:
            while outstanding < 60 and (more := next(flood, None)) is not None:
                engine.add_request(more)
                outstanding += 1
            outputs = engine.step()
            collected.add(outputs)
            outstanding -= sum(o.finish_reason is not None and not o.request_id.startswith("small") for o in outputs)
        steps.append(engine.metrics.num_steps - began)
    return steps


@pytest.mark.parametrize("prompt, output", [(6, 8), (40, 3), (4, 55)], ids=["alike", "long prompts", "long answers"])
@pytest.mark.parametrize("num_blocks", [64, 20], ids=["seats are short", "blocks are short"])
def test_a_flood_at_most_doubles_the_latency_of_a_small_tenant(prompt: int, output: int, num_blocks: int) -> None:
    quiet = latencies(make_engine(num_blocks), iter(()), Collected())
    engine, collected = make_engine(num_blocks), Collected()
    flood = {f"flood{number}": ask(f"flood{number}", "big", prompt, output) for number in range(4000)}
    flooded = latencies(engine, iter(flood.values()), collected)
    assert max(quiet) == min(quiet)
    assert max(flooded) <= 2 * quiet[0], (quiet[0], flooded)
    for request in visitor():
        assert collected.tokens[request.request_id, 0] == expected_tokens(request, 64, NEVER)[0][0]
    served = {sample for sample in collected.reasons if sample[0].startswith("flood")}
    assert len(served) > 10, "the flood goes on too"
    for name, index in served:
        assert collected.tokens[name, index] == expected_tokens(flood[name], 64, NEVER)[index][0]


def test_without_tenants_the_same_flood_makes_it_wait() -> None:
    """What the tests above would show if tenants meant nothing."""
    engine = make_engine()
    quiet = latencies(make_engine(), iter(()), Collected())
    flood = (ask(f"flood{number}", "small", 4, 55) for number in range(4000))
    assert max(latencies(engine, flood, Collected())) > 10 * quiet[0]


def test_two_floods_get_the_same_tokens() -> None:
    """One asks for long answers, one for short ones: it is tokens that are shared, not requests."""
    engine = make_engine(max_num_seqs=6)
    for number in range(300):
        engine.add_request(ask(f"long{number}", "one", 8, 40))
        engine.add_request(ask(f"short{number}", "two", 8, 5))
    drawn = {"long": 0, "shor": 0}
    for _ in range(900):
        for output in engine.step():
            drawn[output.request_id[:4]] += len(output.token_ids) + 8 * (output.finish_reason is not None)
    assert 0.8 < drawn["long"] / drawn["shor"] < 1.25, drawn


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    asked=st.lists(
        st.tuples(st.sampled_from("abcd"), st.integers(1, 40), st.integers(1, 20), st.integers(0, 60)),
        min_size=1,
        max_size=40,
    ),
    num_blocks=st.integers(8, 40),
    max_num_seqs=st.integers(1, 8),
    failing=st.booleans(),
)
def test_nobody_starves_and_each_tenant_keeps_its_order(
    asked: list[tuple[str, int, int, int]], num_blocks: int, max_num_seqs: int, failing: bool
) -> None:
    engine = make_engine(num_blocks, eos_every=20, max_num_seqs=max_num_seqs, max_num_batched_tokens=16)
    requests = [(when, ask(f"{i}", who, prompt, output)) for i, (who, prompt, output, when) in enumerate(asked)]
    requests.sort(key=lambda pair: pair[0])
    collected, first_tokens = Collected(), []
    for round_ in range(6_000):
        for when, request in requests:
            if when == round_:
                engine.add_request(request)
        if failing and round_ == 15:
            engine.recover()
        outputs = engine.step()
        engine.blocks.check(engine.scheduler.running)
        first_tokens += [o.request_id for o in outputs if (o.request_id, 0) not in collected.tokens]
        collected.add(outputs)
        if round_ > 60 and not engine.has_unfinished:
            break
    else:
        raise AssertionError(f"unfinished: {engine.stats()}")
    for _, request in requests:
        (tokens, reason), *_ = expected_tokens(request, 64)
        assert collected.tokens[request.request_id, 0] == tokens
        assert collected.reasons[request.request_id, 0] == reason
    if not failing and max_num_seqs == 1:
        for tenant in "abcd":
            mine = [request.request_id for _, request in requests if request.tenant == tenant]
            assert [name for name in first_tokens if name in set(mine)] == mine
    assert engine.stats().used_blocks == 0 and engine.scheduler.shares.num_active == 0


@pytest.mark.parametrize("steps_ahead", [1, 2])
def test_two_that_are_larger_than_their_shares_take_turns_only_once(steps_ahead: int) -> None:
    """Each finds most of its blocks in the cache, held by the other or just given up: it could come back for little."""
    engine = make_engine(11, block_size=8, max_num_batched_tokens=1, steps_ahead=steps_ahead)
    rng = random.Random(1)
    begin = random_prompt(rng, 24)
    requests = [
        Request.create(tenant, begin + random_prompt(rng, 28), SamplingParams(max_tokens=9, seed=1), tenant=tenant)
        for tenant in ("one", "two")
    ]
    for request in requests:
        engine.add_request(request)
    collected = Collected()
    for _ in range(400):
        collected.add(engine.step())
    for request in requests:
        assert collected.tokens[request.request_id, 0] == expected_tokens(request, 64, NEVER)[0][0]
    assert engine.stats().preemptions <= 2
