"""Random runs: whatever the cache, the batch, the pipeline and the accidents, the tokens are those of the definition.

The definition (`expected_tokens`) knows no blocks, chunks or steps, so that each of these runs equals every other: a
tight cache a roomy one, chunks a whole prompt, one step in flight four, cached prefixes none.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from engine.errors import ExecutorDied, PromptTooLong
from engine.llm_engine import LLMEngine
from engine.request import Request, SequenceOutput
from engine.sampling_params import SamplingParams
from engine.step import pack, unpack
from tests.fakes import Collected, HashExecutor, engine_config
from tests.hash_model import EOS, VOCAB_SIZE, attend, expected_tokens, fake_logprob, random_prompt

MAX_PROMPT = 24
PREFIXES = [random_prompt(random.Random(number), MAX_PROMPT) for number in range(3)]


@dataclass
class Scenario:
    """One random run."""

    config: dict[str, object]
    block_size: int
    num_blocks: int
    eos_every: int
    requests: list[Request]
    arrivals: list[int]
    """The round before which each request comes."""
    aborts: list[tuple[int, int, int | None]] = field(default_factory=list)
    """(round, request, sample or None)."""
    failures: frozenset[int] = frozenset()
    """Submissions that fail."""
    pace: int = 0
    """Seed of the order in which steps begin and results come; 0: as `step` does it."""


@st.composite
def requests(draw: st.DrawFn, request_id: str, *, beams: bool) -> Request:
    prefix = draw(st.integers(0, MAX_PROMPT))
    tail = draw(st.integers(0 if prefix else 1, MAX_PROMPT - prefix if prefix < MAX_PROMPT else 0))
    prompt = draw(st.sampled_from(PREFIXES))[:prefix] + random_prompt(random.Random(request_id), tail)
    count = draw(st.sampled_from([1, 1, 1, 2, 3, 5]))
    max_tokens = draw(st.one_of(st.none(), st.integers(1, 30)))
    params = SamplingParams(
        n=count,
        temperature=1.0 if count > 1 else draw(st.sampled_from([0.0, 1.0])),
        seed=draw(st.integers(0, 3)),
        max_tokens=max_tokens,
        min_tokens=draw(st.sampled_from([0, 0, 1, 4])) if max_tokens is None or max_tokens >= 4 else 0,
        ignore_eos=draw(st.booleans()),
        stop_token_ids=tuple(draw(st.sampled_from([(), (), (5, 6, 7, 8), (EOS,)]))),
        logprobs=draw(st.sampled_from([None, None, 0, 2])),
        prompt_logprobs=draw(st.sampled_from([None, None, None, 0, 2])),
        priority=draw(st.integers(0, 2)),
    )
    if beams and draw(st.booleans()):
        params = params.replace(
            prompt_logprobs=None,
            use_beam_search=True,
            best_of=draw(st.integers(count, 6)),
            max_tokens=draw(st.integers(max(1, params.min_tokens), 12)),
            length_penalty=draw(st.sampled_from([1.0, 0.0, -1.0, 0.5, 2.0])),
            early_stopping=draw(st.sampled_from([True, False, "never"])),
        )
    salt = draw(st.sampled_from(["", "", "salt"]))
    tenant = draw(st.sampled_from(["", "", "one", "two"]))
    arrival_s = float(draw(st.integers(0, 3)))
    return Request.create(request_id, prompt, params, arrival_s=arrival_s, cache_salt=salt, tenant=tenant)


@st.composite
def scenarios(draw: st.DrawFn, *, accidents: bool, beams: bool = False) -> Scenario:
    block_size = draw(st.sampled_from([1, 2, 3, 4, 8]))
    fits = -(-MAX_PROMPT // block_size)
    chunked = draw(st.booleans())
    config: dict[str, object] = {
        "max_model_len": draw(st.integers(MAX_PROMPT + 1, 48)),
        "max_num_seqs": draw(st.integers(1, 8)),
        "max_num_batched_tokens": draw(st.integers(8 if beams else 1, 40) if chunked else st.integers(MAX_PROMPT, 48)),
        "step_token_multiple": draw(st.sampled_from([1, 2, 3, 5])),
        "enable_chunked_prefill": chunked,
        "enable_prefix_caching": draw(st.booleans()),
        "policy": draw(st.sampled_from(["fcfs", "priority"])),
        "steps_ahead": draw(st.integers(1, 4)),
    }
    count = draw(st.integers(1, 6))
    scenario = Scenario(
        config,
        block_size,
        num_blocks=draw(st.one_of(st.integers(fits, fits + 6), st.integers(fits, 8 * fits))),
        eos_every=draw(st.sampled_from([3, 10, 30])),
        requests=[draw(requests(str(number), beams=beams)) for number in range(count)],
        arrivals=draw(st.lists(st.integers(0, 20), min_size=count, max_size=count)),
        pace=draw(st.sampled_from([0, 1, 2, 3])),
    )
    if accidents:
        abort = st.tuples(st.integers(0, 25), st.integers(0, count - 1), st.sampled_from([None, 0, 0, 1, 2]))
        scenario.aborts = draw(st.lists(abort, max_size=3))
        scenario.failures = frozenset(draw(st.lists(st.integers(0, 40), max_size=3)))
    return scenario


class Run:
    """Drives one scenario to its end and checks the books after every round."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        config = engine_config(**scenario.config)
        self.executor = HashExecutor(
            config,
            scenario.num_blocks,
            block_size=scenario.block_size,
            eos_every=scenario.eos_every,
            lazy=scenario.pace > 0,
            fail_at=scenario.failures,
        )
        self.engine = LLMEngine(config, self.executor, vocab_size=VOCAB_SIZE, eos_token_ids=(EOS,))
        self.engine.start()
        self.collected = Collected()
        self.aborted: set[tuple[str, int]] = set()
        self.pace = random.Random(scenario.pace)

    def finish(self, max_rounds: int = 5_000) -> Collected:
        scenario = self.scenario
        last = max(scenario.arrivals)
        for round_ in range(max_rounds):
            for request, arrival in zip(scenario.requests, scenario.arrivals):
                if arrival == round_:
                    self.engine.add_request(request)
            for when, which, index in scenario.aborts:
                if when == round_:
                    self._abort(scenario.requests[which], index)
            if round_ > last and not self.engine.has_unfinished:
                break
            try:
                self._round()
            except ExecutorDied:
                self.engine.recover()
            self._check_books()
        else:
            raise AssertionError(f"unfinished after {max_rounds} rounds: {self.engine.stats()}")
        stats = self.engine.stats()
        assert stats.free_blocks == scenario.num_blocks and stats.running == stats.waiting == 0
        event(f"preemptions: {min(stats.preemptions, 3)}, recoveries: {stats.recoveries}")
        return self.collected

    def _abort(self, request: Request, index: int | None) -> None:
        self.engine.abort(request.request_id, index)
        if request.params.use_beam_search and index is not None:
            return
        for each in range(request.params.num_sequences):
            if index in (None, each):
                self.aborted.add((request.request_id, each))

    def _round(self) -> None:
        engine = self.engine
        if not self.scenario.pace:
            self.collected.add(engine.step())
            return
        for _ in range(self.pace.randint(0, 3)):
            engine.begin_step()
        self.executor.release(self.pace.randint(0, 3))
        future = engine.next_future()
        if future is not None and future.done():
            self.collected.add(engine.finish_step(0))

    def _check_books(self) -> None:
        engine = self.engine
        engine.blocks.check(engine.scheduler.running)
        assert engine.num_in_flight <= engine.config.steps_ahead
        assert len(engine.scheduler.running) <= engine.config.max_num_seqs
        assert 0 <= engine.stats().kv_utilization <= 1


def check(scenario: Scenario, collected: Collected, aborted: set[tuple[str, int]]) -> None:
    """Every sample has the tokens of the definition, an aborted one a beginning of them."""
    limit = min(int(str(scenario.config["max_model_len"])), scenario.num_blocks * scenario.block_size + 1)
    by_sample: dict[tuple[str, int], list[SequenceOutput]] = {}
    for output in collected.outputs:
        by_sample.setdefault((output.request_id, output.index), []).append(output)
    for request in scenario.requests:
        for index, (tokens, reason) in enumerate(expected_tokens(request, limit, scenario.eos_every)):
            sample = (request.request_id, index)
            found = collected.tokens.get(sample, [])
            if sample in aborted and sample not in collected.reasons:
                assert found == tokens[: len(found)]
            else:
                assert found == tokens
                assert collected.reasons[sample] == reason
            check_details(request, index, by_sample.get(sample, []), scenario)


def check_details(request: Request, index: int, outputs: list[SequenceOutput], scenario: Scenario) -> None:
    """Log-probabilities belong to their tokens; what is told once is told with the first."""
    params, prompt = request.params, request.prompt_token_ids
    tokens = [token for output in outputs for token in output.token_ids]
    values: list[int] = []
    for token in prompt + tokens:
        values.append(attend(values, token))
    if params.logprobs is not None:
        entries = [entry for output in outputs for entry in output.logprobs or []]
        states = values[len(prompt) - 1 :]
        assert [entry.logprob for entry in entries] == [fake_logprob(s, t) for s, t in zip(states, tokens)]
        assert all(len(entry.top_ids) == params.logprobs for entry in entries)
    told = [output.prompt_logprobs for output in outputs if output.prompt_logprobs is not None]
    if params.prompt_logprobs is None or index or not outputs:
        assert not told
    else:
        assert told == [outputs[0].prompt_logprobs]
        assert told[0][0] is None
        assert [e and e.logprob for e in told[0][1:]] == [fake_logprob(s, t) for s, t in zip(values, prompt[1:])]
        assert all(e is not None and len(e.top_ids) == params.prompt_logprobs for e in told[0][1:])
    cached = [output.num_cached_tokens for output in outputs]
    assert not any(cached[1:])
    assert all(count < len(prompt) and count % scenario.block_size == 0 for count in cached)
    assert scenario.config["enable_prefix_caching"] or not any(cached)


slow_ok = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@settings(slow_ok, max_examples=700)
@given(scenarios(accidents=False))
def test_any_schedule_gives_the_same_tokens(scenario: Scenario) -> None:
    run = Run(scenario)
    check(scenario, run.finish(), run.aborted)


@settings(slow_ok, max_examples=900)
@given(scenarios(accidents=True))
def test_aborts_and_failures_change_nothing_for_the_others(scenario: Scenario) -> None:
    run = Run(scenario)
    check(scenario, run.finish(), run.aborted)


@settings(slow_ok, max_examples=250)
@given(scenarios(accidents=True, beams=True))
def test_beam_searches_find_what_trying_everything_finds(scenario: Scenario) -> None:
    run = Run(scenario)
    check(scenario, run.finish(), run.aborted)


@settings(slow_ok, max_examples=300)
@given(scenarios(accidents=False), st.integers(0, 30))
def test_a_resumed_request_goes_on_where_it_was(scenario: Scenario, rounds: int) -> None:
    first = Run(scenario)
    for request in scenario.requests:
        first.engine.add_request(request)
    for _ in range(rounds):
        first._round()
    before = first.collected
    resumed = []
    for request in scenario.requests:
        tokens = [before.tokens.get((request.request_id, i), []) for i in range(request.params.num_sequences)]
        changes = {name: getattr(request, name) for name in request.__struct_fields__}
        resumed.append(Request(**{**changes, "resume": tuple(pack(t) for t in tokens)}))
    scenario.requests, scenario.arrivals = resumed, [0] * len(resumed)
    second = Run(scenario)
    after = second.finish()
    limit = min(second.engine.config.model_len, scenario.num_blocks * scenario.block_size + 1)
    for request in resumed:
        for index, (tokens, reason) in enumerate(expected_tokens(request, limit, scenario.eos_every)):
            sample = (request.request_id, index)
            assert unpack(request.resume[index]).tolist() + after.tokens[sample] == tokens
            assert after.reasons[sample] == reason
            if sample in before.reasons:
                assert not after.tokens[sample]


@settings(slow_ok, max_examples=150)
@given(scenarios(accidents=False), st.integers(1, 20), st.integers(-6, 6))
def test_a_restart_with_another_cache_ends_only_what_does_not_fit(scenario: Scenario, rounds: int, change: int) -> None:
    run = Run(scenario)
    for request in scenario.requests:
        run.engine.add_request(request)
    for _ in range(rounds):
        run._round()
    fewest = min(scenario.num_blocks, max(1, scenario.num_blocks + change)) * scenario.block_size
    run.executor.num_blocks = scenario.num_blocks = max(1, scenario.num_blocks + change)
    run.engine.recover()
    for _ in range(5_000):
        if not run.engine.has_unfinished:
            break
        run._round()
        run._check_books()
    slots = scenario.num_blocks * scenario.block_size
    for request in scenario.requests:
        for index, (tokens, _) in enumerate(expected_tokens(request, run.engine.config.model_len, scenario.eos_every)):
            sample = (request.request_id, index)
            found, reason = run.collected.tokens.get(sample, []), run.collected.reasons[sample]
            assert found == tokens[: len(found)]
            if reason == "error":
                assert request.num_prompt_tokens + len(found) > slots
            elif found != tokens:
                assert reason == "length" and request.num_prompt_tokens + len(found) > fewest
    assert run.engine.stats().free_blocks == scenario.num_blocks


@pytest.mark.parametrize("steps_ahead", [1, 3])
def test_nobody_starves_under_a_flood(steps_ahead: int) -> None:
    """First-come, first-served: a request is overtaken at most by those that ran beside it."""
    config = engine_config(max_num_seqs=4, max_num_batched_tokens=8, steps_ahead=steps_ahead)
    executor = HashExecutor(config, 12, eos_every=10_000)
    engine = LLMEngine(config, executor, vocab_size=VOCAB_SIZE, eos_token_ids=(EOS,))
    engine.start()
    rng = random.Random(3)
    order: list[str] = []
    waiting = 0
    rounds = 0
    while len(order) < 150:
        while waiting < 12:  # always more than fit
            request_id = str(rounds * 100 + waiting)
            params = SamplingParams(max_tokens=rng.randint(1, 20), seed=1)
            engine.add_request(Request.create(request_id, random_prompt(rng, rng.randint(1, 40)), params))
            waiting += 1
        rounds += 1
        for output in engine.step():
            if output.finish_reason is not None:
                order.append(output.request_id)
                waiting -= 1
        try:
            engine.add_request(Request.create("too long", random_prompt(rng, 64), SamplingParams()))
        except PromptTooLong:
            pass
        else:
            raise AssertionError("it cannot fit")
    arrived = sorted(order, key=int)
    lateness = [place - arrived.index(request_id) for place, request_id in enumerate(order)]
    assert max(lateness) <= 12
    assert engine.stats().preemptions > 0
