"""LLMEngine on ranks that only hash: the right tokens, the right ends, and nothing left behind."""

from __future__ import annotations

import random

import msgspec
import pytest

from engine.errors import PromptTooLong, RequestError
from engine.request import Request
from engine.step import pack
from tests.fakes import Collected
from tests.hash_engine import check, make_engine, request, run
from tests.hash_model import EOS, VOCAB_SIZE, expected_tokens

NEVER = 10**15
"""An `eos_every` at which no sample meets its end of sequence."""


@pytest.mark.parametrize("steps_ahead", [1, 2, 3])
@pytest.mark.parametrize("num_blocks", [8, 16, 100])
def test_tokens_are_those_of_the_definition(num_blocks: int, steps_ahead: int) -> None:
    engine, _ = make_engine(num_blocks, steps_ahead=steps_ahead, max_num_batched_tokens=16)
    requests = [request(str(i), 1 + 3 * i, max_tokens=20, n=1 + i % 3) for i in range(12)]
    check(run(engine, *requests), *requests)
    stats = engine.stats()
    assert stats.free_blocks == num_blocks and stats.running == stats.waiting == 0


# Acceptance.


def test_refuses_what_can_never_fit() -> None:
    engine, _ = make_engine(4)
    with pytest.raises(PromptTooLong, match=r"64 tokens .* max_model_len \(64\) leaves room for 63"):
        engine.add_request(request(prompt=64))
    with pytest.raises(PromptTooLong, match=r"33 tokens .* \(4 blocks of 8\) holds 32"):
        engine.add_request(request(prompt=33))
    engine, _ = make_engine(enable_chunked_prefill=False, max_num_batched_tokens=20)
    with pytest.raises(PromptTooLong, match=r"max_num_batched_tokens \(20\)"):
        engine.add_request(request(prompt=21))
    assert not engine.has_unfinished and not engine.begin_step()


def test_accepts_what_just_fits() -> None:
    engine, _ = make_engine(4, eos_every=NEVER)
    whole = request(prompt=32, max_tokens=None)
    check(run(engine, whole), whole, model_len=33, eos_every=NEVER)
    engine, _ = make_engine(enable_chunked_prefill=False, max_num_batched_tokens=20, eos_every=NEVER)
    whole = request(prompt=20)
    check(run(engine, whole), whole, eos_every=NEVER)


@pytest.mark.parametrize(
    "bad, param",
    [
        (request(prompt=[]), "prompt"),
        (request(prompt=[3, VOCAB_SIZE]), "prompt"),
        (request(prompt=[-1]), "prompt"),
        (request(stop_token_ids=[VOCAB_SIZE]), "stop_token_ids"),
        (request(allowed_token_ids=[VOCAB_SIZE]), "allowed_token_ids"),
        (request(logit_bias={VOCAB_SIZE: 1.0}), "logit_bias"),
        (msgspec.structs.replace(request(), resume=(b"", b"")), "resume"),
        (msgspec.structs.replace(request(), resume=(pack([VOCAB_SIZE]),)), "resume"),
    ],
)
def test_refuses_what_cannot_be_run(bad: Request, param: str) -> None:
    engine, _ = make_engine()
    with pytest.raises(RequestError) as caught:
        engine.add_request(bad)
    assert caught.value.param == param
    assert not engine.has_unfinished


def test_refuses_an_id_that_is_running() -> None:
    engine, _ = make_engine()
    engine.add_request(request())
    with pytest.raises(RequestError, match="already running"):
        engine.add_request(request())
    engine.abort("a")
    engine.add_request(request())


# Ends.


def test_a_stop_token_ends_and_is_told() -> None:
    engine, _ = make_engine(eos_every=NEVER)
    (tokens, _), *_ = expected_tokens(request(max_tokens=30), 64, NEVER)
    stop = tokens[6]
    where = tokens.index(stop) + 1
    stopped = run(engine, request(max_tokens=30, stop_token_ids=[stop]))
    assert stopped.tokens["a", 0] == tokens[:where]
    assert stopped.outputs[-1].finish_reason == "stop" and stopped.outputs[-1].stop_reason == stop


def test_the_end_of_sequence_ends_unless_it_is_ignored() -> None:
    engine, _ = make_engine(eos_every=1)
    ended = run(engine, request("a"))
    assert ended.tokens["a", 0] == [EOS] and ended.outputs[-1].stop_reason is None
    ignored = run(engine, request("b", ignore_eos=True, max_tokens=5))
    assert ignored.tokens["b", 0] == [EOS] * 5 and ignored.reasons["b", 0] == "length"
    named = run(engine, request("c", ignore_eos=True, stop_token_ids=[EOS], max_tokens=5))
    assert named.tokens["c", 0] == [EOS] and named.outputs[-1].stop_reason == EOS


def test_min_tokens_come_before_any_stop() -> None:
    engine, _ = make_engine(eos_every=1)
    late = run(engine, request(min_tokens=4))
    assert late.tokens["a", 0][4:] == [EOS] and EOS not in late.tokens["a", 0][:4]


def test_the_context_ends_what_max_tokens_does_not() -> None:
    engine, _ = make_engine(eos_every=NEVER, steps_ahead=3)
    for params in ({"max_tokens": None}, {"max_tokens": 1000}):
        long = run(engine, request(prompt=60, **params))
        assert len(long.tokens["a", 0]) == 4 and long.reasons["a", 0] == "length"
    assert engine.metrics.surplus_tokens == 0, "lengths are known beforehand"


def test_what_was_drawn_past_a_stop_is_thrown_away() -> None:
    engine, executor = make_engine(eos_every=1, steps_ahead=3, lazy=True)
    engine.add_request(request())
    while engine.begin_step():
        pass
    assert engine.num_in_flight == 3 and len(executor.plans) == 3
    executor.release(3)
    (only,) = engine.finish_step()
    assert only.token_ids == [EOS] and not engine.has_unfinished
    assert engine.stats().used_blocks == 0, "though two steps that write to them are in flight"
    assert engine.finish_step() == engine.finish_step() == []
    assert engine.metrics.surplus_tokens == 2 and engine.num_in_flight == 0


# Aborts.


@pytest.mark.parametrize("rounds", range(8))
def test_an_abort_frees_the_blocks_at_once(rounds: int) -> None:
    engine, _ = make_engine(steps_ahead=2, eos_every=NEVER, max_num_batched_tokens=8)
    other = request("other", max_tokens=12)
    engine.add_request(request("gone", 20, n=3, max_tokens=40))
    engine.add_request(other)
    collected = Collected()
    for _ in range(rounds):
        collected.add(engine.step())
    engine.abort("gone")
    engine.blocks.check(engine.scheduler.running)
    assert all(sequence.request_id == "other" for sequence in engine.scheduler.running)
    collected.tokens = {sample: tokens for sample, tokens in collected.tokens.items() if sample[0] == "other"}
    while engine.has_unfinished:
        outputs = engine.step()
        assert all(output.request_id == "other" for output in outputs)
        collected.add(outputs)
    check(collected, other, eos_every=NEVER)
    assert engine.stats().used_blocks == 0


def test_aborting_one_sample_leaves_the_others() -> None:
    engine, _ = make_engine(eos_every=NEVER)
    three = request(n=3, max_tokens=10)
    engine.add_request(three)
    engine.abort("a", 0)
    engine.abort("a", 7)
    engine.abort("unknown")
    collected = Collected()
    while engine.has_unfinished:
        collected.add(engine.step())
    tokens = [tokens for tokens, _ in expected_tokens(three, 64, NEVER)]
    assert collected.tokens == {("a", 1): tokens[1], ("a", 2): tokens[2]}


def test_ten_thousand_cancels_leak_nothing() -> None:
    engine, executor = make_engine(50, eos_every=NEVER)
    rng = random.Random(5)
    live: list[str] = []
    for number in range(10_000):
        name = str(number)
        engine.add_request(request(name, 1 + number % 3, n=1 + number % 2))
        live.append(name)
        if number % 50 == 0:
            engine.step()
        if len(live) > 20:
            engine.abort(live.pop(rng.randrange(len(live))))
    for name in live:
        engine.abort(name)
    while engine.num_in_flight:
        assert engine.finish_step() == []
    stats = engine.stats()
    assert stats.free_blocks == 50 and stats.waiting == stats.running == 0 and not engine.has_unfinished
    assert engine.scheduler.waiting.num_held < 200
    assert (engine.scheduler.table.seq_id == -1).all()
    after = request("after", max_tokens=3)
    check(run(engine, after), after, eos_every=NEVER)
    assert len(executor.mirrors) <= 1, "only what the next plan will drop"


# What is told beside tokens, and counted.


def test_prompt_log_probabilities_come_whole_with_the_first_token() -> None:
    engine, _ = make_engine(max_num_batched_tokens=4)
    run(engine, request("warm", [5] * 20))
    collected = run(engine, request("a", [5] * 20, prompt_logprobs=2, n=2))
    told = [output for output in collected.outputs if output.prompt_logprobs is not None]
    assert told == [next(output for output in collected.outputs if output.index == 0)]
    entries = told[0].prompt_logprobs
    assert entries is not None and len(entries) == 20
    assert entries[0] is None and all(entry is not None and len(entry.top_ids) == 2 for entry in entries[1:])
    assert told[0].num_cached_tokens == 0, "the cache was not used"


def test_cached_tokens_are_told_once() -> None:
    engine, _ = make_engine(eos_every=NEVER)
    first, second = request("a", [5] * 20), request("b", [5] * 20)
    assert [output.num_cached_tokens for output in run(engine, first).outputs] == [0] * 16
    assert [output.num_cached_tokens for output in run(engine, second).outputs] == [16] + [0] * 15
    assert engine.stats().prefix_hit_tokens == 16 and engine.stats().prefix_query_tokens == 40


def test_a_second_turn_finds_the_first_ones_answer() -> None:
    engine, _ = make_engine(eos_every=NEVER, steps_ahead=1)
    first = run(engine, request("a", [5] * 10, max_tokens=23)).tokens["a", 0]
    second = run(engine, request("b", [5] * 10 + first + [7]))
    assert second.outputs[0].num_cached_tokens == 32


def test_counts_and_times() -> None:
    engine, _ = make_engine(eos_every=NEVER)
    run(engine, request("a", 10, max_tokens=5), request("b", 10, max_tokens=5, n=2))
    metrics, stats = engine.metrics, engine.stats()
    assert metrics.num_requests == 2 and metrics.prompt_tokens == 20 and metrics.finished["length"] == 3
    assert metrics.generated_tokens == stats.generated_tokens == 15
    assert metrics.queue_s.count == 2 and metrics.first_token_s.count == 3 and metrics.token_gap_s.count == 12
    assert metrics.step_s.count == stats.steps == metrics.num_steps == 5
    assert metrics.computed_tokens == 20 + 3 * 4


def test_utilization_counts_filled_slots_of_those_held() -> None:
    engine, _ = make_engine(eos_every=NEVER, steps_ahead=1)
    assert engine.stats().kv_utilization == 1
    engine.add_request(request(prompt=12))
    engine.step()
    stats = engine.stats()
    assert stats.kv_utilization == 12 / 16 and stats.used_blocks == 2 and stats.running == 1
