"""Who is kept and who is replaced: spares become ranks, and ranks outlive their driver."""

import asyncio
import contextlib
import os
import signal
import time

import msgspec
import pytest
import ray
from ray.util import list_named_actors

from cluster.driver import start_driver, stop_driver
from cluster.driver_client import DriverClient
from cluster.placement import bundles
from cluster.processes import is_ray_worker
from engine.config import EngineConfig
from engine.llm_engine import LLMEngine
from engine.local_executor import LocalExecutor
from engine.model_config import ModelConfig, resolve
from engine.request import Request
from engine.sampling_params import SamplingParams
from engine.step import pack
from tests.checkpoints import make_checkpoint

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_checkpoint(folder)
    return EngineConfig(
        model=str(folder), device="cpu", dtype="float32", num_blocks=120, warm_spares=1, tensor_parallel_size=2
    )


@pytest.fixture(scope="module")
def group(config):
    """Outlives every driver, as a replica's does."""
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, namespace="replacements")
    group = ray.util.placement_group(bundles(config))
    assert group.wait(30)
    yield group
    ray.shutdown()


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
    alone = config.replace(tensor_parallel_size=1)
    model_config = ModelConfig.load(alone)
    alone = resolve(alone, model_config)
    executor = LocalExecutor(alone, model_config)
    engine = LLMEngine(alone, executor, vocab_size=model_config.vocab_size, eos_token_ids=model_config.eos_token_ids)
    engine.start()
    tokens = {}
    for request in requests_of():
        engine.add_request(request)
    while engine.has_unfinished:
        for output in engine.step():
            tokens.setdefault((output.request_id, output.index), []).extend(output.token_ids)
    engine.shutdown()
    return tokens


class Streams:
    """What a replica holds of its requests, while drivers come and go."""

    def __init__(self, requests):
        self.requests = requests
        self.tokens = {(r.request_id, i): [] for r in requests for i in range(r.params.num_sequences)}
        self.open = set(self.tokens)
        self.changed = asyncio.Event()

    async def join(self, driver):
        self.lost = asyncio.Event()
        self.client = await DriverClient.connect(
            driver, on_outputs=self.on_outputs, on_disconnect=lambda _: self.lost.set()
        )
        for request in self.requests:
            count = request.params.num_sequences
            if any((request.request_id, i) in self.open for i in range(count)):
                resume = tuple(pack(self.tokens[request.request_id, i]) for i in range(count))
                self.client.submit(msgspec.structs.replace(request, resume=resume))

    def on_outputs(self, outputs):
        for output in outputs:
            assert output.error is None
            key = (output.request_id, output.index)
            if key in self.open:  # a sample that had ended ends once more when it is resumed
                self.tokens[key] += output.token_ids
                if output.finish_reason is not None:
                    self.open.discard(key)
        self.changed.set()

    async def until(self, condition, timeout_s=60):
        async with asyncio.timeout(timeout_s):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


def pids(driver):
    return [facts.pid for facts in ray.get(driver.rank_facts.remote())]


def spare_pid(name, driver):
    """Of the engine's only spare, once it is there; it keeps its name when it becomes a rank."""
    names = [key for key in list_named_actors() if key.startswith(f"manta:{name}:spare")]
    found = {facts.pid for facts in ray.get([ray.get_actor(key).facts.remote() for key in names])}
    (spare,) = found - set(pids(driver))
    return spare


@contextlib.contextmanager
def started(config, name, group):
    driver = start_driver(config, name=name, placement_group=group)
    try:
        yield driver
    finally:
        stop_driver(driver)


def all_gone(processes, timeout_s=15):
    deadline_s = time.monotonic() + timeout_s
    while any(is_ray_worker(pid) for pid in processes):
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.05)
    return True


async def generate(driver, kill):
    """Tokens of streams under which a process is killed."""
    streams = Streams(requests_of())
    await streams.join(driver)
    await streams.until(lambda: all(streams.tokens.values()))
    os.kill(kill, signal.SIGKILL)
    await streams.until(lambda: not streams.open)
    stats = await streams.client.stats()
    await streams.client.close()
    assert stats["used_blocks"] == 0
    return streams.tokens


def test_a_spare_becomes_the_rank_that_died(config, group, expected):
    with started(config, "spared", group) as driver:
        before, spare = pids(driver), spare_pid("spared", driver)
        assert asyncio.run(generate(driver, before[1])) == expected
        assert pids(driver) == [before[0], spare]
        # Another spare has come; that it is dead is no obstacle.
        second = spare_pid("spared", driver)
        os.kill(second, signal.SIGKILL)
        assert asyncio.run(generate(driver, before[0])) == expected
        after = pids(driver)
        assert after[1] == spare
        assert after[0] not in (*before, spare, second)
        assert ray.get(driver.health.remote()).recoveries == 2
        last = [*after, spare_pid("spared", driver)]
    assert all_gone(last)


@pytest.mark.parametrize("also_killed", [None, 0])
def test_ranks_outlive_their_driver_and_go_on_with_the_next(config, group, expected, also_killed):
    """Their weights, and what group they are in, stay; one that died with the driver is replaced beside the other."""

    async def main():
        name, alone = f"orphans{also_killed}", config.replace(warm_spares=0)
        driver = await asyncio.to_thread(start_driver, alone, name=name, placement_group=group)
        before = pids(driver)
        streams = Streams(requests_of())
        for _ in range(2 if also_killed is None else 1):
            await streams.join(driver)
            had = {key: len(tokens) for key, tokens in streams.tokens.items()}
            await streams.until(lambda: all(len(streams.tokens[k]) > had[k] for k in streams.open))  # noqa: B023
            assert streams.open
            _, pid = ray.get(driver.pid.remote())
            os.kill(pid, signal.SIGKILL)
            if also_killed is not None:
                os.kill(before[also_killed], signal.SIGKILL)
            await streams.lost.wait()
            await asyncio.to_thread(stop_driver, driver)
            driver = await asyncio.to_thread(start_driver, alone, name=name, placement_group=group)
            after = pids(driver)
            assert [rank for rank in (0, 1) if after[rank] != before[rank]] == (
                [] if also_killed is None else [also_killed]
            )
            before = after
        await streams.join(driver)
        await streams.until(lambda: not streams.open)
        assert streams.tokens == expected
        stats = await streams.client.stats()
        assert stats["used_blocks"] == 0
        await streams.client.close()
        await asyncio.to_thread(stop_driver, driver)
        assert all_gone(before)

    asyncio.run(main())


@ray.remote(num_cpus=0, lifetime="detached")
class Guarded:
    """A process that lives as long as its driver, and half a second longer."""

    def __init__(self, driver):
        from cluster.worker_actor import DriverGuard

        self._guard = DriverGuard(driver, every_s=0.05, patience_s=0.5)

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
    assert not all_gone([pid], 2)
    ray.kill(drivers[0])
    ray.get(guarded.serve.remote("driver1"))
    assert not all_gone([pid], 2)
    ray.kill(drivers[1])
    assert all_gone([pid], 10)


def test_what_a_driver_left_is_ended_where_it_is_of_no_use(config, group):
    driver = start_driver(config, name="changed", placement_group=group)
    before = pids(driver)
    _, pid = ray.get(driver.pid.remote())
    os.kill(pid, signal.SIGKILL)
    os.kill(before[1], signal.SIGSTOP)
    other = start_driver(config.replace(max_num_seqs=3), name="changed", placement_group=group)
    assert not set(before) & set(pids(other))
    assert all_gone(before)
    last = pids(other)
    ray.kill(other)
    ray.util.remove_placement_group(group)  # as Serve does when a replica is gone
    assert all_gone(last)
