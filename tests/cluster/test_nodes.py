"""Ranks over two nodes: plans by TCP, and a node that is lost and comes back."""

import asyncio
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from cluster.driver import start_driver, stop_driver
from cluster.driver_client import DriverClient
from cluster.messages import error_of
from cluster.placement import DRIVER_CPUS, rank_bundle
from cluster.recovery import RecoveryPolicy
from engine.config import EngineConfig
from engine.errors import ResourcesMissing
from engine.llm_engine import LLMEngine
from engine.local_executor import LocalExecutor
from engine.model_config import ModelConfig, resolve
from engine.request import Request
from engine.sampling_params import SamplingParams
from tests.checkpoints import make_checkpoint

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_checkpoint(folder)
    settings = {"device": "cpu", "dtype": "float32", "num_blocks": 200, "tensor_parallel_size": 2, "warm_spares": 0}
    return EngineConfig(model=str(folder), **settings)


@pytest.fixture(scope="module")
def nodes(config):
    """A head with room for the driver and one rank, and a second node with room for one: the last of a list."""
    quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": quick}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=cluster.address, log_to_driver=False)
    room = rank_bundle(config)["CPU"]
    fill(1 - DRIVER_CPUS - room, "node:__internal_head__")
    second = cluster.add_node(num_cpus=1, resources={"second": 1})
    fill(1 - room, "second")
    yield cluster, [second]
    ray.shutdown()
    cluster.shutdown()


def fill(cpus, where):
    """Leave less room on a node."""
    group = ray.util.placement_group([{"CPU": round(cpus, 4), where: 0.001}])
    assert group.wait(20)


def requests():
    return [
        Request.create(
            f"r{i}",
            [4 + (11 * i + j) % 190 for j in range(3 + 4 * i)],
            SamplingParams(temperature=float(i % 2), seed=i, max_tokens=60, ignore_eos=True),
        )
        for i in range(8)
    ]


@pytest.fixture(scope="module")
def expected(config):
    alone = config.replace(tensor_parallel_size=1)
    model_config = ModelConfig.load(alone)
    alone = resolve(alone, model_config)
    engine = LLMEngine(
        alone,
        LocalExecutor(alone, model_config),
        vocab_size=model_config.vocab_size,
        eos_token_ids=model_config.eos_token_ids,
    )
    engine.start()
    tokens = {}
    for request in requests():
        engine.add_request(request)
    while engine.has_unfinished:
        for output in engine.step():
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
    engine.shutdown()
    return tokens


def test_a_lost_node_is_waited_for_and_no_token_changes(nodes, config, expected):
    cluster, seconds = nodes
    driver = start_driver(config, name="spread")
    before = ray.get(driver.rank_facts.remote())
    assert len({facts.node_id for facts in before}) == 2
    all_began = threading.Event()

    async def generate():
        tokens, ended, changed = {}, set(), asyncio.Event()

        def on_outputs(outputs):
            for output in outputs:
                assert output.error is None
                tokens.setdefault(output.request_id, []).extend(output.token_ids)
                if output.finish_reason:
                    ended.add(output.request_id)
            changed.set()

        client = await DriverClient.connect(driver, on_outputs=on_outputs)
        for request in requests():
            client.submit(request)
        async with asyncio.timeout(150):
            while len(ended) < 8:
                await changed.wait()
                changed.clear()
                if len(tokens) == 8:
                    all_began.set()
        stats = await client.stats()
        await client.close()
        return tokens, stats

    with ThreadPoolExecutor(1) as pool:
        generated = pool.submit(lambda: asyncio.run(generate()))
        assert all_began.wait(60)
        cluster.remove_node(seconds.pop(), allow_graceful=False)
        deadline_s = time.monotonic() + 60
        while "waiting for resources" not in (health := ray.get(driver.health.remote())).waiting_for:
            assert time.monotonic() < deadline_s
        assert (health.state, health.live, health.healthy) == ("recovering", True, False)
        assert not generated.done()
        seconds.append(cluster.add_node(num_cpus=1, resources={"second": 1}))
        tokens, stats = generated.result(150)
    assert tokens == expected
    assert ray.get(driver.rank_facts.remote())[0] == before[0]  # its weights stayed, while it waited
    assert stats["recoveries"] >= 1
    assert stats["used_blocks"] == 0
    assert ray.get(driver.health.remote()).ready
    assert ray.get(driver.health.remote()).healthy
    stop_driver(driver)


class Kept:
    """What became of each request."""

    def __init__(self):
        self.began, self.errors, self.changed = set(), {}, asyncio.Event()

    def on_outputs(self, outputs):
        for output in outputs:
            if output.error is not None:
                self.errors[output.request_id] = error_of(output)
            elif output.token_ids:
                self.began.add(output.request_id)
        self.changed.set()

    async def until(self, condition, timeout_s):
        async with asyncio.timeout(timeout_s):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


def test_a_node_that_never_comes_back_is_told_in_seconds_and_given_up_in_time(nodes, config):
    cluster, seconds = nodes
    policy = RecoveryPolicy(patience_s=3)
    few = config.replace(max_num_seqs=2, resources_timeout_s=15)
    room, head = rank_bundle(config)["CPU"], {"node:__internal_head__": 0.001}
    group = ray.util.placement_group(
        [{"CPU": DRIVER_CPUS, **head}, {"CPU": room, **head}, {"CPU": room, "second": 0.001}]
    )
    driver = start_driver(few, name="forlorn", placement_group=group, policy=policy)
    _, pid = ray.get(driver.pid.remote())
    ranks = ray.get(driver.rank_facts.remote())
    long = SamplingParams(max_tokens=250, ignore_eos=True)

    async def main():
        kept = Kept()
        client = await DriverClient.connect(driver, on_outputs=kept.on_outputs)
        for name in ("runs0", "runs1", "waits0", "waits1"):
            client.submit(Request.create(name, [5, 6, 7], long))
        await kept.until(lambda: kept.began == {"runs0", "runs1"}, 30)
        os.kill(ranks[1].pid, signal.SIGSTOP)  # nothing more is done until the node goes
        cluster.remove_node(seconds.pop(), allow_graceful=False)
        os.kill(ranks[1].pid, signal.SIGKILL)  # a stopped process outlives its node
        removed_s = time.monotonic()
        async with asyncio.timeout(10):
            while (await client.health()).healthy:
                await asyncio.sleep(0.1)
        red_s = time.monotonic()
        client.submit(Request.create("late", [5, 6, 7], long))
        await kept.until(lambda: "late" in kept.errors, 3)
        health = await client.health()
        assert (health.state, health.live) == ("recovering", True)
        assert health.waiting_for.startswith("waiting for resources: needs 0.5 CPU")
        assert abs(health.since_s - time.time()) < 30
        assert (await client.stats())["waiting"] >= 0  # it still answers
        await kept.until(lambda: {"waits0", "waits1"} <= kept.errors.keys(), 8)
        assert kept.errors.keys() == {"late", "waits0", "waits1"}
        for error in kept.errors.values():
            assert type(error) is ResourcesMissing
            assert (error.http_status, error.retry_after_s) == (503, 5.0)
            assert "the engine is recovering since" in str(error)
        await kept.until(lambda: {"runs0", "runs1"} <= kept.errors.keys(), 20)
        assert "could not be brought back" in str(kept.errors["runs0"])
        assert kept.errors["runs0"].http_status == 503
        assert (await client.health()).state == "failed"
        await client.close()
        return red_s - removed_s, time.monotonic() - red_s

    red_after_s, waited_s = asyncio.run(main())
    assert red_after_s < 8
    assert 10 < waited_s < 25
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    log = "".join(path.read_text() for path in logs.glob(f"worker-*-{pid}.err"))
    assert log.count("manta:forlorn: waiting for resources") == 2, log  # when it began, and when it was given up
    assert log.count("giving up") == 1
    stop_driver(driver)
