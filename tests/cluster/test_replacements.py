"""Who is kept and who is replaced: spares become ranks, and ranks outlive their driver."""

import asyncio
import os
import signal
import time

import pytest
import ray
from ray.util import list_named_actors

from cluster.driver import start_driver
from cluster.placement import bundles
from cluster.processes import is_ray_worker
from engine.config import EngineConfig
from engine.request import Request
from engine.sampling_params import SamplingParams
from tests.checkpoints import make_checkpoint
from tests.streams import Streams, driver_pid, rank_pids, started, undisturbed

pytestmark = pytest.mark.ray

PATIENCE_S = 2.0
"""How long a rank without a driver waits for another in the test of that: enough on a slow machine to name one."""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_checkpoint(folder)
    return EngineConfig(
        model=str(folder), device="cpu", dtype="float32", num_blocks=120, warm_spares=1, tensor_parallel_size=2
    )


@pytest.fixture(scope="module")
def group(config, ray_job):  # noqa: ARG001
    """Outlives every driver, as a replica's does."""
    group = ray.util.placement_group(bundles(config))
    assert group.wait(200)
    return group


def requests_of(count=16, max_tokens=120):
    return [
        Request.create(
            f"r{i}",
            [3 + (7 * i + j) % 190 for j in range(2 + 2 * i)],
            SamplingParams(temperature=float(i % 2), seed=i, n=1 + i % 2, max_tokens=max_tokens, ignore_eos=True),
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def expected(config):
    return undisturbed(config, requests_of())


def spare_pid(name, driver):
    """Of the engine's only spare, once it is there; it keeps its name when it becomes a rank."""
    names = [key for key in list_named_actors() if key.startswith(f"manta:{name}:spare")]
    found = {facts.pid for facts in ray.get([ray.get_actor(key).facts.remote() for key in names])}
    (spare,) = found - set(rank_pids(driver))
    return spare


def all_gone(processes, timeout_s=100):
    deadline_s = time.monotonic() + timeout_s
    while any(is_ray_worker(pid) for pid in processes):
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.05)
    return True


def generate(driver, victim):
    """Tokens of streams under which a process is killed."""

    async def main():
        streams, watching = Streams(requests_of()), driver_pid(driver)
        await streams.join(driver)
        async with streams.stopped(watching, streams.all_grow()):
            os.kill(victim, signal.SIGKILL)
        await streams.finish()
        return streams.tokens

    return asyncio.run(main())


def test_a_spare_becomes_the_rank_that_died(config, group, expected):
    with started(config, "spared", placement_group=group) as driver:
        before, spare = rank_pids(driver), spare_pid("spared", driver)
        assert generate(driver, before[1]) == expected
        assert rank_pids(driver) == [before[0], spare]
        # Another spare has come; that it is dead is no obstacle.
        second = spare_pid("spared", driver)
        os.kill(second, signal.SIGKILL)
        assert generate(driver, before[0]) == expected
        after = rank_pids(driver)
        assert after[1] == spare
        assert after[0] not in (*before, spare, second)
        assert ray.get(driver.health.remote()).recoveries == 2
        last = [*after, spare_pid("spared", driver)]
    assert all_gone(last)


@pytest.mark.parametrize("also_killed", [None, 0])
def test_ranks_outlive_their_driver_and_go_on_with_the_next(config, group, expected, also_killed):
    """Their weights, and what group they are in, stay; one that died with the driver is replaced beside the other."""
    name, alone = f"orphans{also_killed}", config.replace(warm_spares=0)
    replaced = [] if also_killed is None else [also_killed]
    streams, before = Streams(requests_of()), []

    async def join_and_lose(driver):
        pid = driver_pid(driver)
        await streams.join(driver)
        async with streams.stopped(pid, streams.all_grow()):
            for killed in (pid, *(before[rank] for rank in replaced)):
                os.kill(killed, signal.SIGKILL)
        await streams.lost.wait()

    async def main():
        for number in range(3 - len(replaced)):
            with started(alone, name, placement_group=group) as driver:
                after = rank_pids(driver)
                if before:
                    assert [rank for rank in (0, 1) if after[rank] != before[rank]] == replaced
                before[:] = after
                if number < 2 - len(replaced):
                    await join_and_lose(driver)
                    continue
                await streams.join(driver)
                await streams.finish()
        assert streams.tokens == expected
        assert all_gone(before)

    asyncio.run(main())


@ray.remote(num_cpus=0, lifetime="detached")
class Guarded:
    """A process that lives as long as its driver, and PATIENCE_S longer."""

    def __init__(self, driver):
        from cluster.worker_actor import DriverGuard

        self._guard = DriverGuard(driver, every_s=0.05, patience_s=PATIENCE_S)

    def serve(self, driver):
        self._guard.driver = driver
        return os.getpid()


@ray.remote(num_cpus=0)
class Living:
    def ping(self):
        pass


def test_a_rank_waits_for_another_driver_and_ends_when_none_comes(group):  # noqa: ARG001
    drivers = [Living.options(name=f"driver{number}").remote() for number in range(2)]
    ray.get([driver.ping.remote() for driver in drivers])
    guarded = Guarded.remote("driver0")
    pid = ray.get(guarded.serve.remote("driver0"))
    ray.kill(drivers[0])
    assert not all_gone([pid], 0.5)
    ray.get(guarded.serve.remote("driver1"))
    assert not all_gone([pid], PATIENCE_S + 1)
    ray.kill(drivers[1])
    assert all_gone([pid])


def test_what_a_driver_left_is_ended_where_it_is_of_no_use(config, group):
    driver = start_driver(config, name="changed", placement_group=group)
    before = rank_pids(driver)
    os.kill(driver_pid(driver), signal.SIGKILL)
    os.kill(before[1], signal.SIGSTOP)
    with started(config.replace(max_num_seqs=3), "changed", placement_group=group) as other:
        last = rank_pids(other)
        assert not set(before) & set(last)
        assert all_gone(before)
        ray.kill(other)
        ray.util.remove_placement_group(group)  # as Serve does when a replica is gone
        assert all_gone(last)
