"""Ranks over two nodes: plans by TCP, and a node that is lost and comes back."""

import asyncio
import contextlib
import os
import signal
import time
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from cluster.placement import DRIVER_CPUS, rank_bundle
from cluster.recovery import RecoveryPolicy
from engine.config import EngineConfig
from engine.errors import EngineUnavailable, ResourcesMissing
from engine.request import Request
from engine.sampling_params import SamplingParams
from tests.checkpoints import make_checkpoint
from tests.streams import Streams, driver_pid, started, undisturbed

pytestmark = pytest.mark.ray

GIVEN_UP_S = 10.0
RED_WITHIN_S = 30.0
"""Promised are seconds: two where the machine is not busy."""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_checkpoint(folder)
    settings = {"device": "cpu", "dtype": "float32", "num_blocks": 200, "tensor_parallel_size": 2, "warm_spares": 0}
    return EngineConfig(model=str(folder), **settings)


@pytest.fixture(scope="module")
def cluster():
    """A head, and Ray at it."""
    quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": quick}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


class SecondNode:
    """A node that may be lost and come back."""

    def __init__(self, cluster):
        self._cluster = cluster
        self.come()

    def come(self):
        self._node = self._cluster.add_node(num_cpus=1, resources={"second": 1})

    def lose(self, rank):
        """The process of its rank too: Ray would let it live for a moment."""
        self._cluster.remove_node(self._node, allow_graceful=False)
        self._node = None
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank.pid, signal.SIGKILL)

    def end(self):
        if self._node is not None:
            self._cluster.remove_node(self._node)


@pytest.fixture
def second(cluster):
    node = SecondNode(cluster)
    yield node
    node.end()


@pytest.fixture
def group(second, config):  # noqa: ARG001
    """The driver and rank 0 on the head, rank 1 on the other."""
    room, head = rank_bundle(config)["CPU"], {"node:__internal_head__": 0.001}
    group = ray.util.placement_group(
        [{"CPU": DRIVER_CPUS, **head}, {"CPU": room, **head}, {"CPU": room, "second": 0.001}]
    )
    assert group.wait(200)
    yield group
    ray.util.remove_placement_group(group)


def requests():
    return [
        Request.create(
            f"r{i}",
            [4 + (11 * i + j) % 190 for j in range(3 + 4 * i)],
            SamplingParams(temperature=float(i % 2), seed=i, max_tokens=60, ignore_eos=True),
        )
        for i in range(8)
    ]


def test_a_lost_node_is_waited_for_and_no_token_changes(second, group, config):
    async def main(driver):
        here, elsewhere = ray.get(driver.rank_facts.remote())
        assert here.node_id != elsewhere.node_id
        streams, pid = Streams(requests()), driver_pid(driver)
        await streams.join(driver)
        async with streams.stopped(pid, streams.all_grow()):
            second.lose(elsewhere)
        deadline_s = time.monotonic() + 100
        while "waiting for resources" not in (health := await streams.client.health()).waiting_for:
            assert time.monotonic() < deadline_s, health
        assert (health.state, health.live, health.healthy) == ("recovering", True, False)
        assert streams.open
        second.come()
        stats = await streams.finish()
        assert streams.tokens == undisturbed(config, requests())
        assert ray.get(driver.rank_facts.remote())[0] == here  # its weights stayed, while it waited
        assert stats["recoveries"] >= 1
        health = await driver.health.remote()
        assert health.ready and health.healthy

    with started(config, "spread", placement_group=group) as driver:
        asyncio.run(main(driver))


def test_a_node_that_never_comes_back_is_told_in_seconds_and_given_up_in_time(second, group, config):
    few = config.replace(max_num_seqs=2, resources_timeout_s=GIVEN_UP_S)
    long = SamplingParams(max_tokens=250, ignore_eos=True)
    running, waiting = ("runs0", "runs1"), ("waits0", "waits1")

    async def main(driver):
        streams, pid = (
            Streams([Request.create(name, [5, 6, 7], long) for name in (*running, *waiting)]),
            driver_pid(driver),
        )
        elsewhere = ray.get(driver.rank_facts.remote())[1]
        began = lambda: {name for (name, _), tokens in streams.tokens.items() if tokens}
        await streams.join(driver)
        async with streams.stopped(pid, lambda: began() == set(running)):
            second.lose(elsewhere)
            lost_s = time.monotonic()
        while (health := await streams.client.health()).healthy:
            await asyncio.sleep(0.1)
        assert time.monotonic() - lost_s < RED_WITHIN_S
        assert abs(health.since_s - time.time()) < RED_WITHIN_S
        late = Streams([Request.create("late", [5, 6, 7], long)])
        await late.join(driver)
        await late.until(lambda: not late.open)
        assert (health.state, health.live) == ("recovering", True)
        assert health.waiting_for.startswith("waiting for resources: needs 0.5 CPU")
        await streams.client.stats()  # it still answers
        await streams.until(lambda: not streams.open)
        assert time.monotonic() - lost_s >= GIVEN_UP_S
        assert began() == set(running)
        for error in (*late.errors.values(), *(streams.errors[name, 0] for name in waiting)):
            assert type(error) is ResourcesMissing
            assert (error.http_status, error.retry_after_s) == (503, 5.0)
            assert "the engine is recovering since" in str(error)
        for name in running:
            assert type(streams.errors[name, 0]) is EngineUnavailable
            assert "could not be brought back" in str(streams.errors[name, 0])
        assert (await streams.client.health()).state == "failed"
        await late.client.close()
        await streams.client.close()
        return pid

    with started(few, "forlorn", placement_group=group, policy=RecoveryPolicy(patience_s=3)) as driver:
        pid = asyncio.run(main(driver))
        logs = Path(ray._private.worker._global_node.get_logs_dir_path())
        log = "".join(path.read_text() for path in logs.glob(f"worker-*-{pid}.err"))
        assert log.count("manta:forlorn: waiting for resources") == 2, log  # as it began, and as it was given up
        assert log.count("giving up") == 1
