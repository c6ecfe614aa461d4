"""The driver, its loop and its client over ranks that hash: no Ray, no model, the real sockets."""

import asyncio
import queue
import threading
import time

import pytest

from cluster.inbox import Call
from engine.errors import EngineUnavailable, PromptTooLong, RequestError
from tests.driver_clients import assert_expected, assert_no_blocks_used, join, make_request, standing_still
from tests.fakes import HashExecutor, engine_config
from tests.hash_model import VOCAB_SIZE


def test_64_streams_get_their_tokens_in_one_message_a_step(make_driver):
    async def main():
        driver = make_driver(max_num_seqs=64, max_num_batched_tokens=256)
        client, collector = await join(driver)
        assert client.facts.num_blocks == 1000
        assert client.facts.max_model_len == 64
        requests = [make_request(f"r{i}", 1 + i % 40, seed=i, temperature=i % 2) for i in range(64)]
        async with standing_still(driver, client):
            for request in requests:
                client.submit(request)
        await collector.until(lambda: len(collector.ends) == 64)
        assert_expected(collector, requests)
        stats = await client.stats()
        assert len(collector.batches) <= stats["steps"]
        assert max(collector.batches) > 10
        await assert_no_blocks_used(client)
        await client.close()

    asyncio.run(main())


def test_samples_and_a_prompt_of_a_megabyte(make_driver):
    async def main():
        config = engine_config(max_model_len=300_000, max_num_batched_tokens=300_000)
        executor = HashExecutor(config, 40_000, model=lambda values, token: 31 * token + len(values))
        client, collector = await join(make_driver(executor, config=config))
        client.submit(make_request("long", 262_144, max_tokens=2, ignore_eos=True))
        client.submit(make_request("many", 9, n=3, max_tokens=4, ignore_eos=True))
        await collector.until(lambda: len(collector.ends) == 4)
        assert {key: len(tokens) for key, tokens in collector.tokens.items()} == {
            ("long", 0): 2,
            ("many", 0): 4,
            ("many", 1): 4,
            ("many", 2): 4,
        }
        await client.close()

    asyncio.run(main())


def test_a_refusal_comes_back_as_the_error_it_was(make_driver):
    async def main():
        client, collector = await join(make_driver())
        client.submit(make_request("long", 64, n=2))
        client.submit(make_request("odd", stop_token_ids=(VOCAB_SIZE,)))
        await collector.until(lambda: len(collector.ends) == 3)
        error = collector.errors["long", 0]
        assert type(error) is PromptTooLong
        assert (error.http_status, error.param, error.code) == (400, "prompt", "context_length_exceeded")
        assert "max_model_len" in str(error)
        assert type(collector.errors["long", 1]) is PromptTooLong
        assert type(collector.errors["odd", 0]) is RequestError
        assert collector.errors["odd", 0].param == "stop_token_ids"
        await client.close()

    asyncio.run(main())


def test_a_second_request_of_the_same_id_is_refused_without_harm_to_the_first(make_driver):
    async def main():
        config = engine_config()
        executor = HashExecutor(config, lazy=True)
        driver = make_driver(executor, config=config)
        client, _ = await join(driver)
        other, refused = await join(driver)
        first = make_request("same", ignore_eos=True)
        client.submit(first)
        await client.stats()
        other.submit(make_request("same"))
        await refused.until(lambda: refused.ends)
        assert type(refused.errors["same", 0]) is RequestError
        assert (await client.health()).live
        executor.thaw()
        await other.close()
        await client.close()

    asyncio.run(main())


def test_abort_frees_the_blocks_and_nothing_more_comes(make_driver):
    async def main():
        config = engine_config(max_model_len=50_000, max_num_seqs=16)
        executor = HashExecutor(config, 50_000)  # however long this takes, nobody is preempted
        client, collector = await join(make_driver(executor, config=config))
        endless = [make_request(f"r{i}", n=2, ignore_eos=True, max_tokens=40_000) for i in range(4)]
        for request in endless:
            client.submit(request)
        await collector.until(lambda: len(collector.tokens) == 8)
        client.abort("r0")
        client.abort("r1", 1)
        client.abort("unknown")
        await client.stats()
        before = {key: len(tokens) for key, tokens in collector.tokens.items()}
        assert (await client.stats())["running"] == 5
        await collector.until(lambda: len(collector.tokens["r3", 1]) > before["r3", 1] + 20)
        grown = {key for key, tokens in collector.tokens.items() if len(tokens) > before[key]}
        assert grown == {("r1", 0), ("r2", 0), ("r2", 1), ("r3", 0), ("r3", 1)}
        for request in endless:
            client.abort(request.request_id)
        await assert_no_blocks_used(client, 50_000)
        assert collector.ends == {}
        await client.close()

    asyncio.run(main())


def test_thousands_of_cancels_leak_nothing(make_driver):
    async def main():
        client, collector = await join(make_driver(max_num_seqs=32, max_num_batched_tokens=128))
        running = []
        for i in range(3000):
            running.append(f"r{i}")
            client.submit(make_request(running[-1], 1 + i % 20, n=1 + i % 3, ignore_eos=True, max_tokens=30))
            if i % 7 == 3:
                client.abort(running[-1], i % 3)
            if len(running) > 40:
                client.abort(running.pop(i * 31 % 40))
            if i % 100 == 99:
                await client.stats()
        for request_id in running:
            client.abort(request_id)
        await assert_no_blocks_used(client)
        assert not collector.errors
        assert collector.tokens
        await client.close()

    asyncio.run(main())


def test_health_answers_while_a_step_is_stuck_and_stop_ends_what_runs(make_driver):
    async def main():
        config = engine_config()
        driver = make_driver(HashExecutor(config, lazy=True), config=config)
        client, collector = await join(driver)
        client.submit(make_request("stuck"))
        while (health := await client.health()).idle:
            assert health.live
        await asyncio.to_thread(driver.stop)
        await collector.until(lambda: collector.disconnected)
        assert collector.errors["stuck", 0].http_status == 503
        assert client.closed
        with pytest.raises(EngineUnavailable):
            client.submit(make_request("late"))
        with pytest.raises(EngineUnavailable):
            await client.stats()
        client.abort("stuck")
        await client.close()

    asyncio.run(main())


def test_an_idle_loop_sleeps_and_wakes_for_a_call(make_driver):
    driver = make_driver()

    def ask():
        """The loop's thread, and the processor time it has used."""
        answers = queue.SimpleQueue()
        driver.loop.post(None, Call(lambda: answers.put((threading.current_thread().name, time.thread_time()))))
        return answers.get(timeout=60)

    name, before_s = ask()
    assert name == "manta-loop"
    assert not threading.Event().wait(0.3)
    assert ask()[1] - before_s < 0.15
