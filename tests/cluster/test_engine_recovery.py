"""The loop over ranks that fail: who goes on, who is told, and when it is given up."""

import asyncio
import threading

import pytest

from cluster.recovery import RecoveryPolicy
from engine.errors import EngineUnavailable, ExecutorDied, RequestFailed, ResourcesMissing
from engine.step import unpack
from tests.driver_clients import assert_expected, assert_no_blocks_used, join, make_request, standing_still
from tests.fakes import HashExecutor, engine_config


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


def test_a_long_search_is_not_to_blame_for_what_others_do(make_driver):
    """It brings no token before its end, but it gets on."""

    async def main():
        config = engine_config(max_num_seqs=32)
        executor = HashExecutor(config, fail_at=frozenset(range(4, 90, 6)))
        policy = RecoveryPolicy(max_failures=100, window_s=60, max_recoveries=3)
        client, collector = await join(make_driver(executor, config=config, policy=policy))
        requests = [make_request(f"{n}", n=n, use_beam_search=True, ignore_eos=True) for n in (4, 6)]
        for request in requests:
            client.submit(request)
        await collector.until(lambda: len(collector.ends) == 10)
        assert_expected(collector, requests)
        assert (await client.stats())["recoveries"] >= 4
        await assert_no_blocks_used(client)
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


@pytest.mark.parametrize("searching", [False, True])
def test_a_request_that_kills_the_ranks_each_time_is_failed_alone(make_driver, searching):
    async def main():
        config = engine_config(max_num_seqs=32)
        executor = PoisonedRanks(config)
        policy = RecoveryPolicy(max_recoveries=3, backoff_s=0.01)
        client, collector = await join(make_driver(executor, config=config, policy=policy))
        requests = [make_request(f"r{i}", 3 + i, seed=i, n=1 + i % 2, ignore_eos=True) for i in range(8)]
        for request in requests[:4]:
            client.submit(request)
        await collector.until(lambda: len(collector.tokens) == 6)
        client.submit(make_request("poison", n=2, use_beam_search=searching))
        for request in requests[4:]:
            client.submit(request)
        await collector.until(lambda: len(collector.ends) == 14)
        assert_expected(collector, requests)
        assert executor.num_deaths == 3
        error = collector.errors["poison", 1]
        assert type(error) is RequestFailed, ResourcesMissing
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


class WaitingRestart(HashExecutor):
    """A restart that waits until the test says that resources are there."""

    def __init__(self, config, **options):
        super().__init__(config, **options)
        self.on_wait, self.told, self.arrived = None, threading.Event(), threading.Event()

    def restart(self):
        self.on_wait("waiting for resources: needs 2 GPU")
        self.told.wait()  # what a test sends meanwhile is found at the next call
        while not self.arrived.wait(0.01):
            self.on_wait("waiting for resources: needs 2 GPU")
        self.on_wait("")
        return super().restart()


def test_while_resources_are_missing_new_requests_are_refused_and_running_ones_wait(make_driver):
    async def main():
        config = engine_config(max_num_seqs=4, max_model_len=2000)
        # Once four have tokens: a step is submitted before the last one's results are out.
        began = lambda plan: plan.epoch == 0 and plan.num_decodes == 4 and plan.step > 3
        executor = WaitingRestart(config, fail_when=began)
        driver = make_driver(executor, config=config, policy=RecoveryPolicy(patience_s=0.2))
        executor.on_wait = driver.loop.waits
        client, collector = await join(driver)
        running = [make_request(f"r{i}", seed=i, ignore_eos=True, max_tokens=200) for i in range(4)]
        async with standing_still(driver, client):
            for request in [*running, make_request("waits"), make_request("aborted")]:
                client.submit(request)
        while (health := await client.health()).healthy:
            assert not client.closed
        assert (health.state, health.live, health.waiting_for) == (
            "recovering",
            True,
            "waiting for resources: needs 2 GPU",
        )
        client.abort("aborted")
        client.submit(make_request("late"))
        await client.health()  # the driver has both
        executor.told.set()
        await collector.until(lambda: ("late", 0) in collector.ends)
        await collector.until(lambda: ("waits", 0) in collector.ends)
        for name in ("late", "waits"):
            error = collector.errors[name, 0]
            assert type(error) is ResourcesMissing
            assert (error.http_status, error.retry_after_s) == (503, 5.0)
            assert "the engine is recovering since" in str(error) and "needs 2 GPU" in str(error)
        assert (await client.stats())["running"] == 4
        assert not {r.request_id for r in running} & {name for name, _ in collector.ends}
        executor.arrived.set()
        await collector.until(lambda: len(collector.ends) == 6)
        assert_expected(collector, running, 2000)
        health = await client.health()
        assert (health.ready, health.healthy, health.waiting_for) == (True, True, "")
        await assert_no_blocks_used(client)
        await client.close()

    asyncio.run(main())


def test_a_wait_for_resources_ends_when_the_engine_is_stopped(make_driver):
    async def main():
        config = engine_config()
        executor = WaitingRestart(config, fail_at=frozenset({3}))
        executor.told.set()
        driver = make_driver(executor, config=config)
        executor.on_wait = driver.loop.waits
        client, collector = await join(driver)
        client.submit(make_request("r", ignore_eos=True))
        while (await client.health()).healthy:
            assert not client.closed
        await asyncio.to_thread(driver.stop)
        await collector.until(lambda: collector.ends)
        assert "stopping" in str(collector.errors["r", 0])
        await client.close()

    asyncio.run(main())
