"""Beam searches in an engine: what they share, what is told of them and when, and what happens to them in between."""

from __future__ import annotations

import random

import msgspec
import pytest

from engine.errors import ExecutorDied, RequestError
from engine.llm_engine import LLMEngine
from engine.request import Request, SequenceOutput
from engine.sampling_params import SamplingParams
from engine.step import pack, unpack
from tests.fakes import Collected, HashExecutor, engine_config
from tests.hash_model import EOS, VOCAB_SIZE, expected_tokens, random_prompt

PROMPT = random_prompt(random.Random(1), 21)


def make_engine(
    num_blocks: int = 100, *, fail_at: frozenset[int] = frozenset(), **changes: object
) -> tuple[LLMEngine, HashExecutor]:
    config = engine_config(**{"max_num_seqs": 16, **changes})
    executor = HashExecutor(config, num_blocks, fail_at=fail_at)
    engine = LLMEngine(config, executor, vocab_size=VOCAB_SIZE, eos_token_ids=(EOS,))
    engine.start()
    return engine, executor


def search(request_id: str = "a", width: int = 4, prompt: list[int] = PROMPT, **params: object) -> Request:
    asked = {"use_beam_search": True, "n": width, "max_tokens": 12, "ignore_eos": True, **params}
    return Request.create(request_id, prompt, SamplingParams(**asked))  # type: ignore[arg-type]


def finish(engine: LLMEngine) -> list[SequenceOutput]:
    outputs: list[SequenceOutput] = []
    for _ in range(3000):
        if not engine.has_unfinished:
            break
        try:
            outputs += engine.step()
        except ExecutorDied:
            engine.recover()
        engine.blocks.check(engine.scheduler.running)
    assert not engine.has_unfinished, f"does not finish: {engine.stats()}"
    assert engine.stats().used_blocks == engine.stats().running == 0
    return outputs


def check(outputs: list[SequenceOutput], *requests: Request, model_len: int = 64) -> None:
    collected = Collected()
    collected.add(outputs)
    for request in requests:
        for index, (tokens, reason) in enumerate(expected_tokens(request, model_len)):
            assert collected.tokens[request.request_id, index] == tokens
            assert collected.reasons[request.request_id, index] == reason


def test_beams_share_all_but_what_they_write() -> None:
    engine, executor = make_engine()
    engine.add_request(search(width=8))
    most_used = most_saved = 0
    while engine.has_unfinished:
        engine.step()
        stats = engine.stats()
        most_used, most_saved = max(most_used, stats.used_blocks), max(most_saved, stats.saved_blocks)
    alone = -(-33 // 8)
    assert most_used < 8 * alone / 2 and most_saved >= 7 * (len(PROMPT) // 8), (
        "the whole blocks of the prompt are held once"
    )
    copies = [len(unpack(plan.copies)) // 2 for plan in executor.plans]
    assert sum(copies) > 0 and max(copies) <= 7, "of those that write to one block, the last writes in place"
    assert [len(plan.new) for plan in executor.plans] == [1] + 11 * [8]
    assert all(plan.num_decodes == 8 for plan in executor.plans[1:]), "no beam computes its past again"


def test_everything_is_told_at_the_end_at_once() -> None:
    engine, _ = make_engine(enable_prefix_caching=True)
    first, again = search("first"), search("again", logprobs=2)
    engine.add_request(first)
    finish(engine)
    engine.add_request(again)
    told = []
    while engine.has_unfinished:
        if outputs := engine.step():
            told.append(outputs)
    assert len(told) == 1 and not engine.has_unfinished
    check(told[0], again)
    assert [output.index for output in told[0]] == [0, 1, 2, 3]
    for output in told[0]:
        assert output.num_cached_tokens == 16 and output.finish_reason == "length" and output.stop_reason is None
        assert output.logprobs is not None and len(output.logprobs) == len(output.token_ids) == 12
        for token, entry in zip(output.token_ids, output.logprobs):
            assert len(entry.top_ids) == 2 and (entry.rank > 2 or entry.top_ids[entry.rank - 1] == token)
    assert engine.metrics.finished == {"stop": 0, "length": 8, "error": 0}


def test_what_ended_a_beam_is_told() -> None:
    engine, _ = make_engine()
    request = search(width=6, ignore_eos=False, stop_token_ids=tuple(range(2, 20)), early_stopping=True)
    engine.add_request(request)
    outputs = finish(engine)
    check(outputs, request)
    assert {output.finish_reason for output in outputs} == {"stop"}
    lasts = [output.token_ids[-1] for output in outputs]
    assert [output.stop_reason for output in outputs] == [None if last == EOS else last for last in lasts]


@pytest.mark.parametrize("seats", [1, 3, 5])
def test_more_beams_than_seats_take_turns(seats: int) -> None:
    engine, executor = make_engine(max_num_seqs=seats)
    requests = [search("a", 4), search("b", 7, PROMPT[:9])]
    for request in requests:
        engine.add_request(request)
    check(finish(engine), *requests)
    assert executor.max_live <= seats


def test_an_abort_frees_every_beam() -> None:
    engine, executor = make_engine()
    other = search("b", 3)
    engine.add_request(search("a", 8))
    engine.add_request(other)
    for _ in range(5):
        engine.step()
    engine.abort("a", 2)
    assert len(engine.groups()) == 2, "one output cannot be taken out"
    engine.abort("a")
    engine.abort("a")
    outputs = finish(engine)
    assert {output.request_id for output in outputs} == {"b"}
    check(outputs, other)
    assert len(executor.mirrors) <= 3


@pytest.mark.parametrize("seats", [16, 4, 2])
def test_a_search_goes_on_after_a_restart(seats: int) -> None:
    """A step that fails costs that step: what was found before it is kept."""
    engine, executor = make_engine(max_num_seqs=seats, fail_at=frozenset({0, 4, 9, 14, 19}))
    requests = [search("a", 5), search("b", 2, PROMPT[:3])]
    for request in requests:
        engine.add_request(request)
    check(finish(engine), *requests)
    stats = engine.stats()
    assert stats.recoveries == (5 if seats < 16 else 4)
    assert seats < 16 or executor.num_submitted <= 12 + 3 * 5


def test_restarts_of_crowded_searches_count_no_draw_twice() -> None:
    """Some beams have drawn when the ranks fail, and draw again after it, in any order."""
    for seed in range(40):
        rng = random.Random(seed)
        engine, _ = make_engine(
            rng.randint(5, 9),
            max_num_seqs=rng.randint(2, 7),
            enable_chunked_prefill=False,
            fail_at=frozenset(rng.sample(range(60), 8)),
        )
        requests = [search(str(i), rng.randint(2, 6), PROMPT[: rng.randint(2, 21)]) for i in range(3)]
        for request in requests:
            engine.add_request(request)
        check(finish(engine), *requests)


def test_a_resumed_search_begins_anew() -> None:
    engine, _ = make_engine()
    request = msgspec.structs.replace(search(), resume=(pack([5, 6]), b"", pack([7]), b""))
    engine.add_request(request)
    check(finish(engine), request)


@pytest.mark.parametrize("num_blocks", [2, 3, 4, 40])
def test_a_restart_with_another_cache(num_blocks: int) -> None:
    engine, executor = make_engine(8)
    plain = Request.create("plain", PROMPT[:3], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    request = search(width=3, max_tokens=20)
    engine.add_request(request)
    for _ in range(6):
        engine.step()
    executor.num_blocks = num_blocks
    engine.recover()
    engine.add_request(plain)
    outputs = finish(engine)
    check([output for output in outputs if output.request_id == "plain"], plain)
    beams = [output for output in outputs if output.request_id == "a"]
    assert [output.index for output in beams] == [0, 1, 2]
    if num_blocks <= 3:
        assert all(output.finish_reason == "error" and f"{num_blocks} blocks" in str(output.error) for output in beams)
    else:
        check(beams, request, model_len=num_blocks * 8 + 1)


def test_a_vocabulary_smaller_than_the_choice_is_refused() -> None:
    engine, _ = make_engine()
    with pytest.raises(RequestError, match=r"best_of: .* need 98 tokens of the 97"):
        engine.add_request(search(width=2, n=1, best_of=97, ignore_eos=False))
    assert not engine.has_unfinished and not engine.groups()
