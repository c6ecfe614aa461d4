"""Ranks over two nodes: plans by TCP, and a node that is lost and comes back."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import ray
from ray.cluster_utils import Cluster

from cluster.driver import start_driver, stop_driver
from cluster.driver_client import DriverClient
from cluster.placement import DRIVER_CPUS, rank_bundle
from engine.config import EngineConfig
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
    return EngineConfig(model=str(folder), device="cpu", dtype="float32", num_blocks=200, tensor_parallel_size=2)


@pytest.fixture(scope="module")
def nodes(config):
    """A head with room for the driver and one rank, and a second node with room for one."""
    quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": quick}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=cluster.address, log_to_driver=False)
    room = rank_bundle(config)["CPU"]
    fill(1 - DRIVER_CPUS - room, "node:__internal_head__")
    second = cluster.add_node(num_cpus=1, resources={"second": 1})
    fill(1 - room, "second")
    yield cluster, second
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
    cluster, second = nodes
    driver = start_driver(config, name="spread")
    assert len({facts.node_id for facts in ray.get(driver.rank_facts.remote())}) == 2
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
        cluster.remove_node(second, allow_graceful=False)
        deadline_s = time.monotonic() + 60
        while "waiting for resources" not in ray.get(driver.health.remote()).reason:
            assert time.monotonic() < deadline_s
        assert not generated.done()
        cluster.add_node(num_cpus=1, resources={"second": 1})
        tokens, stats = generated.result(150)
    assert tokens == expected
    assert stats["recoveries"] >= 1
    assert stats["used_blocks"] == 0
    assert ray.get(driver.health.remote()).ready
    stop_driver(driver)
