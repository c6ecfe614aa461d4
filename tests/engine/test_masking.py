"""Grammar-bound requests through the engine: one step ahead, preempted, aborted, recovered, beside free ones."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from engine import LLM
from engine.errors import ExecutorDied, RequestError
from engine.grammar import Grammar
from engine.llm_engine import LLMEngine
from engine.request import Request, SequenceOutput
from engine.sampling_params import SamplingParams
from engine.step import pack
from tests.fakes import HashExecutor, engine_config

FOLDER = "configs/tiny"
MODEL = json.loads(Path(f"{FOLDER}/config.json").read_text())
TOKENIZER = Tokenizer.from_file(f"{FOLDER}/tokenizer.json")
DATE = Grammar("regex", "[0-9]{4}-[0-9]{2}-[0-9]{2}")
CHOICE = Grammar("choice", '["apple pie", "apple", "banana"]')


def make_engine(num_blocks: int = 400, fail_at: frozenset[int] = frozenset(), **changes: object) -> LLMEngine:
    config = engine_config(**{"model": FOLDER, "max_model_len": 256, "max_num_seqs": 16, **changes})
    executor = HashExecutor(config, num_blocks, eos_every=10**9, fail_at=fail_at)
    engine = LLMEngine(config, executor, vocab_size=MODEL["vocab_size"], eos_token_ids=(MODEL["eos_token_id"],))
    engine.start()
    return engine


def run(engine: LLMEngine, requests: list[Request]) -> dict[tuple[str, int], tuple[str, str | None]]:
    """Text and finish reason of each sample."""
    tokens: dict[tuple[str, int], list[int]] = {}
    reasons: dict[tuple[str, int], SequenceOutput] = {}
    for request in requests:
        engine.add_request(request)
    for _ in range(5000):
        if not engine.has_unfinished:
            break
        try:
            outputs = engine.step()
        except ExecutorDied:
            engine.recover()
            continue
        for output in outputs:
            key = (output.request_id, output.index)
            assert key not in reasons
            tokens.setdefault(key, []).extend(output.token_ids)
            if output.finish_reason is not None:
                reasons[key] = output
    assert not engine.has_unfinished
    assert engine.stats().used_blocks == 0
    return {key: (TOKENIZER.decode(tokens[key]), reasons[key].finish_reason) for key in reasons}


def make_requests(count: int = 6) -> list[Request]:
    out = []
    for i in range(count):
        grammar = (DATE, None, CHOICE)[i % 3]
        params = SamplingParams(temperature=1, seed=i, max_tokens=12, grammar=grammar, n=1 + (i % 2))
        out.append(Request.create(f"r{i}", list(range(20, 30 + i)), params))
    return out


def check(results: dict[tuple[str, int], tuple[str, str | None]]) -> None:
    for (request_id, _), (text, reason) in results.items():
        kind = int(request_id[1:]) % 3
        if kind == 0:
            assert reason == "stop"
            assert re.fullmatch(DATE.text, text)
        elif kind == 2:
            assert reason == "stop"
            assert text in ("apple pie", "apple", "banana")
        else:
            assert reason == "length"


@pytest.fixture(scope="module")
def undisturbed() -> dict[tuple[str, int], tuple[str, str | None]]:
    results = run(make_engine(steps_ahead=1), make_requests())
    check(results)
    assert len(results) == 9
    return results


@settings(max_examples=25, deadline=None)
@given(
    num_blocks=st.integers(8, 60),
    steps_ahead=st.integers(1, 3),
    batch=st.sampled_from([16, 32, 64]),
    fail_at=st.sets(st.integers(0, 40), max_size=2),
)
def test_the_same_outputs_whatever_happens(
    undisturbed: dict[tuple[str, int], tuple[str, str | None]],
    num_blocks: int,
    steps_ahead: int,
    batch: int,
    fail_at: set[int],
) -> None:
    engine = make_engine(num_blocks, frozenset(fail_at), steps_ahead=steps_ahead, max_num_batched_tokens=batch)
    assert run(engine, make_requests()) == undisturbed


def test_a_resumed_request_replays_its_grammar(undisturbed: dict[tuple[str, int], tuple[str, str | None]]) -> None:
    request = make_requests()[0]
    engine = make_engine()
    engine.add_request(request)
    seen: list[int] = []
    while len(seen) < 4:
        for output in engine.step():
            seen += output.token_ids
    resumed = Request.create("r0", request.prompt_token_ids, request.params)
    resumed = type(request)(
        request_id="r0", prompt=resumed.prompt, params=resumed.params, seed=resumed.seed, resume=(pack(seen),)
    )
    fresh = make_engine()
    fresh.add_request(resumed)
    while fresh.has_unfinished:
        for output in fresh.step():
            seen += output.token_ids
    assert TOKENIZER.decode(seen) == undisturbed["r0", 0][0]


def test_an_aborted_one_leaves_nothing() -> None:
    engine = make_engine()
    for request in make_requests():
        engine.add_request(request)
    for _ in range(3):
        engine.step()
    for i in range(6):
        engine.abort(f"r{i}")
    while engine.num_in_flight:
        engine.step()
    assert engine.stats().used_blocks == 0
    assert not engine._masking._matchers


def test_a_bad_grammar_is_refused_and_others_go_on(undisturbed: dict[tuple[str, int], tuple[str, str | None]]) -> None:
    engine = make_engine()
    bad = Request.create("bad", [20, 21], SamplingParams(grammar=Grammar("regex", "([")))
    with pytest.raises(RequestError, match="unclosed"):
        engine.add_request(bad)
    assert run(engine, make_requests()) == undisturbed


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(model=FOLDER, max_model_len=256, max_num_seqs=8) as llm:
        yield llm


def test_the_real_model_keeps_to_its_grammar(llm: LLM) -> None:
    params = [
        SamplingParams(temperature=0, max_tokens=30, grammar=DATE),
        SamplingParams(temperature=1, seed=3, max_tokens=30, grammar=CHOICE, n=3),
        SamplingParams(temperature=0, max_tokens=8),
    ]
    dates, choices, free = llm.generate(["The date is", "I like", "What is 3 + 4?"], params, use_tqdm=False)
    assert re.fullmatch(DATE.text, dates.outputs[0].text)
    assert all(o.text in ("apple pie", "apple", "banana") and o.finish_reason == "stop" for o in choices.outputs)
    alone = llm.generate("What is 3 + 4?", params[2], use_tqdm=False)[0]
    assert free.outputs[0].token_ids == alone.outputs[0].token_ids


def test_parameters_that_leave_no_token_end_the_sample_with_an_error(llm: LLM) -> None:
    letter = TOKENIZER.encode("x", add_special_tokens=False).ids[0]
    params = SamplingParams(temperature=0, grammar=DATE, max_tokens=5, allowed_token_ids=[letter])
    result = llm.generate("The date is", params, use_tqdm=False)[0]
    assert result.outputs[0].finish_reason == "error"
    assert "grammar" in (result.error or "")
    assert llm.generate("Hello", SamplingParams(max_tokens=2), use_tqdm=False)[0].finished
