"""LLMEngine on ranks that fail, and requests that had run elsewhere before: no token changes, none comes twice."""

from __future__ import annotations

from concurrent.futures import Future

import msgspec
import pytest

from engine.errors import ExecutorDied
from engine.executor import CacheCapacity
from engine.llm_engine import LLMEngine
from engine.step import StepPlan, StepResult, pack
from tests.fakes import Collected, HashExecutor, engine_config
from tests.hash_engine import check, make_engine, request, run
from tests.hash_model import EOS, VOCAB_SIZE, expected_tokens


def test_a_failed_step_loses_nothing() -> None:
    engine, executor = make_engine(fail_at=frozenset({4, 9, 15}), steps_ahead=2)
    requests = [request(str(i), 9, n=1 + i % 2) for i in range(5)]
    for each in requests:
        engine.add_request(each)
    collected = Collected()
    while engine.has_unfinished:
        try:
            collected.add(engine.step())
        except ExecutorDied:
            engine.recover()
            assert engine.num_in_flight == 0 and engine.stats().used_blocks == 0
    check(collected, *requests)
    assert engine.stats().recoveries == executor.num_restarts == 3


def test_a_recovery_that_fails_is_tried_again() -> None:
    class Stubborn(HashExecutor):
        def restart(self) -> CacheCapacity:
            capacity = super().restart()
            if self.num_restarts < 3:
                raise ExecutorDied("again")
            return capacity

    config = engine_config()
    executor = Stubborn(config, fail_at=frozenset({2}))
    engine = LLMEngine(config, executor, vocab_size=VOCAB_SIZE, eos_token_ids=(EOS,))
    engine.start()
    only = request()
    engine.add_request(only)
    collected = Collected()
    while engine.has_unfinished:
        try:
            collected.add(engine.step())
        except ExecutorDied:
            for _ in range(2):
                with pytest.raises(ExecutorDied, match="again"):
                    engine.recover()
            engine.recover()
    check(collected, only)
    assert executor.epoch == 3


def test_an_executor_that_raises_at_submit_is_recovered_from() -> None:
    class Refusing(HashExecutor):
        def submit(self, plan: StepPlan) -> Future[StepResult]:
            if self.num_submitted == 3 and not self.num_restarts:
                raise ExecutorDied("the channel is gone")
            return super().submit(plan)

    config = engine_config()
    engine = LLMEngine(config, Refusing(config), vocab_size=VOCAB_SIZE, eos_token_ids=(EOS,))
    engine.start()
    only = request()
    engine.add_request(only)
    collected = Collected()
    while engine.has_unfinished:
        try:
            collected.add(engine.step())
        except ExecutorDied:
            engine.recover()
    check(collected, only)


def test_an_answer_to_another_step_is_a_failure() -> None:
    class Confused(HashExecutor):
        def submit(self, plan: StepPlan) -> Future[StepResult]:
            future = super().submit(plan)
            future.result().step += 1
            return future

    config = engine_config()
    engine = LLMEngine(config, Confused(config), vocab_size=VOCAB_SIZE, eos_token_ids=(EOS,))
    engine.start()
    engine.add_request(request())
    with pytest.raises(ExecutorDied, match="step 0 of epoch 0"):
        engine.step()


def test_a_step_that_takes_too_long_stays_in_flight() -> None:
    engine, executor = make_engine(lazy=True)
    only = request()
    engine.add_request(only)
    assert engine.begin_step()
    with pytest.raises(TimeoutError):
        engine.finish_step(0.001)
    assert engine.num_in_flight == 1
    executor.release()
    collected = Collected()
    collected.add(engine.finish_step(0.001))
    executor.lazy = False
    while engine.has_unfinished:
        collected.add(engine.step())
    check(collected, only)


def test_a_resumed_sample_gives_only_what_is_new() -> None:
    engine, _ = make_engine()
    fresh = request(n=3, max_tokens=10, prompt_logprobs=1)
    expected = expected_tokens(fresh, 64)
    resumed = msgspec.structs.replace(fresh, resume=(pack(expected[0][0][:3]), pack(expected[1][0]), b""))
    collected = run(engine, resumed)
    assert collected.tokens == {("a", 0): expected[0][0][3:], ("a", 1): [], ("a", 2): expected[2][0]}
    assert all(collected.reasons["a", index] == expected[index][1] for index in range(3))
    assert all(output.prompt_logprobs is None for output in collected.outputs), "told before"


def test_a_request_whose_samples_had_all_ended_ends_without_a_step() -> None:
    engine, executor = make_engine()
    fresh = request(max_tokens=5)
    ((tokens, reason),) = expected_tokens(fresh, 64)
    engine.add_request(msgspec.structs.replace(fresh, resume=(pack(tokens),)))
    assert engine.has_unfinished and engine.begin_step()
    future = engine.next_future()
    assert future is not None and future.done()
    (only,) = engine.finish_step()
    assert only.finish_reason == reason and only.token_ids == []
    assert not engine.has_unfinished and not executor.plans
