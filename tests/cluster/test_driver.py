"""The driver, its loop and its client over ranks that hash: no Ray, no model, the real sockets."""

import asyncio
import threading
import time

import msgspec
import pytest

from cluster.driver import Driver
from cluster.driver_client import DriverClient
from cluster.engine_loop import Call
from cluster.framing import Connection, Ticket, dial
from cluster.messages import Submit, Welcome, decode_for_client, encode, error_of
from cluster.recovery import RecoveryPolicy
from engine.errors import EngineUnavailable, ExecutorDied, PromptTooLong, RequestError, RequestFailed
from engine.request import Request
from engine.sampling_params import SamplingParams
from engine.step import unpack
from tests.fakes import EOS, VOCAB_SIZE, HashExecutor, engine_config, expected_tokens

QUICK = RecoveryPolicy(max_attempts=3, backoff_s=0.01)


def make_request(name, length=5, **params):
    params = {"max_tokens": 20, "seed": len(name), **params}
    return Request.create(name, [2 + (len(name) + i) % 90 for i in range(length)], SamplingParams(**params))


@pytest.fixture
def make_driver():
    drivers = []

    def make(executor=None, *, config=None, max_client_bytes=64 << 20, policy=QUICK, **changes):
        config = config or engine_config(**changes)
        driver = Driver(
            "test",
            config,
            executor or HashExecutor(config),
            vocab_size=VOCAB_SIZE,
            eos_token_ids=(EOS,),
            policy=policy,
            max_client_bytes=max_client_bytes,
        )
        driver.start()
        drivers.append(driver)
        return driver

    yield make
    for driver in drivers:
        driver.stop()


class Collector:
    """What a replica would keep: every sample's tokens and end."""

    def __init__(self):
        self.tokens, self.ends, self.errors = {}, {}, {}
        self.batches = []
        self.disconnected = []
        self.changed = asyncio.Event()

    def on_outputs(self, outputs):
        self.batches.append(len(outputs))
        for output in outputs:
            key = (output.request_id, output.index)
            assert key not in self.ends, "output after the end"
            self.tokens.setdefault(key, []).extend(output.token_ids)
            if output.finish_reason is not None:
                self.ends[key] = output.finish_reason
                if output.finish_reason == "error":
                    self.errors[key] = error_of(output)
        self.changed.set()

    def on_disconnect(self, reason):
        self.disconnected.append(reason)
        self.changed.set()

    async def until(self, condition, timeout_s=20):
        async with asyncio.timeout(timeout_s):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


async def join(driver):
    collector = Collector()
    client = await DriverClient.connect(
        driver.ticket, on_outputs=collector.on_outputs, on_disconnect=collector.on_disconnect
    )
    return client, collector


def assert_expected(collector, requests, model_len=64):
    for request in requests:
        for index, (tokens, reason) in enumerate(expected_tokens(request, model_len)):
            key = (request.request_id, index)
            assert collector.tokens[key] == tokens, key
            assert collector.ends[key] == reason, key


async def assert_no_blocks_used(client, num_blocks=1000):
    stats = await client.stats()
    assert (stats["running"], stats["waiting"]) == (0, 0)
    assert (stats["used_blocks"], stats["free_blocks"]) == (0, num_blocks)


def test_64_streams_get_their_tokens_in_one_message_a_step(make_driver):
    async def main():
        driver = make_driver(max_num_seqs=64, max_num_batched_tokens=256)
        client, collector = await join(driver)
        assert client.facts.num_blocks == 1000
        assert client.facts.max_model_len == 64
        requests = [make_request(f"r{i}", 1 + i % 40, seed=i, temperature=i % 2) for i in range(64)]
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
        await collector.until(lambda: len(collector.ends) == 4, 60)
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
        executor.lazy = False
        executor.release(10)
        await other.close()
        await client.close()

    asyncio.run(main())


def test_abort_frees_the_blocks_and_nothing_more_comes(make_driver):
    async def main():
        client, collector = await join(make_driver(max_model_len=50_000, max_num_seqs=16))
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
        await assert_no_blocks_used(client)
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


def test_a_client_that_goes_away_frees_its_blocks_and_no_others(make_driver):
    async def main():
        driver = make_driver(max_model_len=50_000)
        staying, kept = await join(driver)
        leaving, lost = await join(driver)
        staying.submit(make_request("stays", ignore_eos=True, max_tokens=40_000))
        for i in range(4):
            leaving.submit(make_request(f"leaves{i}", ignore_eos=True, max_tokens=40_000))
        await lost.until(lambda: len(lost.tokens) == 4)
        staying.abort("leaves0")  # not its own
        assert (await staying.stats())["running"] == 5
        await leaving.close()
        assert lost.disconnected == []
        while (await staying.stats())["running"] != 1:
            assert not staying.closed
        already = len(kept.tokens["stays", 0])
        await kept.until(lambda: len(kept.tokens["stays", 0]) > already)
        staying.abort("stays")
        await assert_no_blocks_used(staying)
        await staying.close()

    asyncio.run(main())


def test_a_client_that_does_not_read_is_dropped_and_harms_nobody(make_driver):
    async def main():
        driver = make_driver(max_model_len=50_000, max_client_bytes=100_000)
        lazy = Connection(dial(driver.ticket, "lazy"))
        for i in range(4):
            lazy.send(encode(Submit(make_request(f"lazy{i}", ignore_eos=True, max_tokens=40_000))))
        client, collector = await join(driver)
        while (await client.stats())["running"] != 4:
            assert not client.closed
        while (await client.stats())["running"] != 0:
            assert not client.closed
        request = make_request("fine", ignore_eos=True, max_tokens=10)
        client.submit(request)
        await collector.until(lambda: collector.ends)
        assert_expected(collector, [request])
        await assert_no_blocks_used(client)
        assert isinstance(decode_for_client(lazy.receive()), Welcome)
        lazy.close()
        await client.close()

    asyncio.run(main())


def test_a_malformed_message_drops_its_sender_only(make_driver):
    async def main():
        driver = make_driver()
        client, collector = await join(driver)
        broken = Connection(dial(driver.ticket, "broken"))
        assert isinstance(decode_for_client(broken.receive()), Welcome)
        broken.send(msgspec.msgpack.encode(["submit", {"prompt": 3}]))
        assert broken.receive() is None
        request = make_request("fine")
        client.submit(request)
        await collector.until(lambda: collector.ends)
        assert_expected(collector, [request])
        await client.close()

    asyncio.run(main())


@pytest.mark.parametrize("fail_at", [{3}, {0, 1, 2}, {4, 9, 10, 20}])
def test_failures_of_the_ranks_change_no_token(make_driver, fail_at):
    async def main():
        config = engine_config(max_num_seqs=32)
        driver = make_driver(HashExecutor(config, fail_at=frozenset(fail_at)), config=config)
        client, collector = await join(driver)
        requests = [make_request(f"r{i}", 3 + i, seed=i, n=1 + i % 2, ignore_eos=True) for i in range(12)]
        for request in requests:
            client.submit(request)
        await collector.until(lambda: len(collector.ends) == 18)
        assert_expected(collector, requests)
        assert (await client.stats())["recoveries"] >= 1
        health = await client.health()
        assert health.ready
        assert health.recoveries >= 1
        await assert_no_blocks_used(client)
        await client.close()

    asyncio.run(main())


class BrokenRestart(HashExecutor):
    """Comes back only at restart number `works_at`."""

    works_at = 10**9

    def restart(self):
        capacity = super().restart()
        if self.num_restarts < self.works_at:
            raise ExecutorDied("no device")
        return capacity


def test_a_restart_that_fails_is_tried_again(make_driver):
    async def main():
        config = engine_config()
        executor = BrokenRestart(config, fail_at=frozenset({2}))
        executor.works_at = 3
        client, collector = await join(make_driver(executor, config=config))
        request = make_request("r", ignore_eos=True)
        client.submit(request)
        await collector.until(lambda: collector.ends)
        assert_expected(collector, [request])
        assert executor.num_restarts == 3
        await client.close()

    asyncio.run(main())


def test_an_engine_that_cannot_come_back_says_so_to_everyone(make_driver):
    async def main():
        config = engine_config()
        client, collector = await join(make_driver(BrokenRestart(config, fail_at=frozenset({2})), config=config))
        assert (await client.health()).ready
        client.submit(make_request("running", n=2, ignore_eos=True))
        await collector.until(lambda: len(collector.ends) == 2)
        assert type(collector.errors["running", 1]) is EngineUnavailable
        assert collector.errors["running", 1].http_status == 503
        assert "no device" in str(collector.errors["running", 0])
        health = await client.health()
        assert (health.live, health.state) == (False, "failed")
        assert "no device" in health.reason
        client.submit(make_request("late"))
        await collector.until(lambda: ("late", 0) in collector.ends)
        assert type(collector.errors["late", 0]) is EngineUnavailable
        assert collector.errors["late", 0].retry_after_s > 0
        await client.close()

    asyncio.run(main())


def test_too_many_failures_in_a_while_end_it(make_driver):
    async def main():
        config = engine_config()
        executor = HashExecutor(config, fail_at=frozenset(range(1, 100)))
        policy = RecoveryPolicy(max_failures=4, window_s=60, max_recoveries=100)
        client, collector = await join(make_driver(executor, config=config, policy=policy))
        client.submit(make_request("r", ignore_eos=True))
        await collector.until(lambda: collector.ends)
        assert "5 failures in 60 s" in str(collector.errors["r", 0])
        assert executor.num_restarts == 4
        await client.close()

    asyncio.run(main())


class PoisonedRanks(HashExecutor):
    """Die of every step with a sequence of a request whose name begins with "poison"."""

    def __init__(self, config):
        super().__init__(config)
        self.names, self.num_deaths = {}, 0

    def submit(self, plan):
        self.names |= {new.seq_id: new.request_id for new in plan.new}
        scheduled = {self.names[seq_id] for seq_id in unpack(plan.seq_ids).tolist()}
        if any(name.startswith("poison") for name in scheduled) and not self._dead:
            self.num_deaths += 1
            self._dead = True
        return super().submit(plan)


def test_a_request_that_kills_the_ranks_each_time_is_failed_alone(make_driver):
    async def main():
        config = engine_config(max_num_seqs=32)
        executor = PoisonedRanks(config)
        policy = RecoveryPolicy(max_recoveries=3, backoff_s=0.01)
        client, collector = await join(make_driver(executor, config=config, policy=policy))
        requests = [make_request(f"r{i}", 3 + i, seed=i, n=1 + i % 2, ignore_eos=True) for i in range(8)]
        for request in requests[:4]:
            client.submit(request)
        await collector.until(lambda: len(collector.tokens) == 6)
        client.submit(make_request("poison", n=2))
        for request in requests[4:]:
            client.submit(request)
        await collector.until(lambda: len(collector.ends) == 14)
        assert_expected(collector, requests)
        assert executor.num_deaths == 3
        error = collector.errors["poison", 1]
        assert type(error) is RequestFailed
        assert error.http_status == 500
        assert "failed 3 times while it ran this request" in str(error)
        assert set(collector.errors) == {("poison", 0), ("poison", 1)}
        assert (await client.health()).ready
        await assert_no_blocks_used(client)
        await client.close()

    asyncio.run(main())


def test_a_bug_in_the_loop_is_told_to_everyone(make_driver):
    class Wrong(HashExecutor):
        def submit(self, plan):
            if len(self.plans) == 3:
                raise AssertionError("a broken promise")
            return super().submit(plan)

    async def main():
        config = engine_config()
        client, collector = await join(make_driver(Wrong(config), config=config))
        client.submit(make_request("r", ignore_eos=True))
        await collector.until(lambda: collector.ends)
        assert "a broken promise" in str(collector.errors["r", 0])
        assert not (await client.health()).live
        client.submit(make_request("late"))
        await collector.until(lambda: ("late", 0) in collector.ends)
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
    names, called = [], threading.Event()

    def call():
        names.append(threading.current_thread().name)
        called.set()

    driver.loop.post(None, Call(call))
    assert called.wait(5)
    assert names == ["manta-loop"]
    began_s, used_s = time.monotonic(), time.process_time()
    assert not threading.Event().wait(0.3)
    assert time.process_time() - used_s < 0.5 * (time.monotonic() - began_s)


def test_nobody_there():
    async def main():
        with pytest.raises(EngineUnavailable, match="cannot be reached"):
            await DriverClient.connect(Ticket("unix:/nonexistent/socket", b"x" * 32), on_outputs=print)

    asyncio.run(main())


def test_a_wrong_token_is_not_let_in(make_driver):
    async def main():
        ticket = Ticket(make_driver().ticket.address, b"x" * 32)
        with pytest.raises(EngineUnavailable):
            await DriverClient.connect(ticket, on_outputs=print)

    asyncio.run(main())
