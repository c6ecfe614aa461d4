"""The whole cluster over a real model: driver actor, worker actors, sockets."""

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest
import ray
from ray.util import list_named_actors

from cluster.adoption import workers_of
from cluster.driver import start_driver, stop_driver
from cluster.driver_client import DriverClient
from cluster.messages import error_of
from cluster.placement import STRATEGY, bundles
from cluster.processes import is_ray_worker
from engine.config import EngineConfig
from engine.errors import EngineUnavailable, ModelLoadError, PromptTooLong
from engine.request import Request
from engine.sampling_params import SamplingParams
from tests.checkpoints import make_checkpoint
from tests.streams import Streams, driver_pid, rank_pids, started, undisturbed

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_job")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_checkpoint(path)
    return path


@pytest.fixture
def make_group():
    groups = []

    def make(layout):
        groups.append(ray.util.placement_group(layout, strategy=STRATEGY))
        return groups[-1]

    yield make
    for group in groups:
        ray.util.remove_placement_group(group)


def config_of(folder, **changes):
    return EngineConfig(
        model=str(folder),
        **{"device": "cpu", "dtype": "float32", "num_blocks": 120, "max_num_seqs": 16, "warm_spares": 0, **changes},
    )


def requests_of(count, max_tokens=24):
    """Greedy and sampled, one and two samples, beam searches; more than the cache can hold at once."""
    requests = []
    for i in range(count):
        params = SamplingParams(temperature=float(i % 2), seed=i, n=1 + i % 2, max_tokens=max_tokens, ignore_eos=True)
        if i % 4 == 3:
            params = params.replace(use_beam_search=True, best_of=4)
        requests.append(Request.create(f"request{i}", [3 + (7 * i + j) % 190 for j in range(2 + 5 * i)], params))
    return requests


@pytest.fixture(scope="module")
def expected(folder):
    return undisturbed(config_of(folder), requests_of(12, 60))


def generate(driver, requests, disturb=None):
    """All tokens of `requests`, and stats; `disturb` comes when every sample has begun and no beam search has ended."""

    async def main():
        streams, pid = Streams(requests), driver_pid(driver)
        beams = {request.request_id for request in requests if request.params.use_beam_search}
        samples = [sample for sample in streams.tokens if sample[0] not in beams]
        await streams.join(driver)
        if disturb is not None:
            async with streams.stopped(pid, lambda: all(streams.tokens[sample] for sample in samples)):
                assert not any(streams.tokens[sample] for sample in streams.tokens if sample[0] in beams)
                disturb()
        stats = await streams.finish()
        assert not streams.errors
        return streams.tokens, stats

    return asyncio.run(main())


def wait_all_free(timeout_s=200):
    """Until every resource is back: no actor and no placement group is left."""
    deadline_s = time.monotonic() + timeout_s
    while ray.available_resources().get("CPU") != 4:
        assert time.monotonic() < deadline_s, ray.available_resources()
        time.sleep(0.05)


def private_sockets(pid):
    """Sockets in private folders that a process listens on."""
    own = {os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()}
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    return {line[7] for line in lines if len(line) > 7 and "/manta-" in line[7] and f"socket:[{line[6]}]" in own}


@pytest.mark.parametrize(("ranks", "channel"), [(1, "socket"), (2, "actor")])
def test_tokens_are_those_of_one_process(folder, expected, ranks, channel):
    with started(config_of(folder, tensor_parallel_size=ranks, step_channel=channel), "same") as driver:
        tokens, _ = generate(driver, requests_of(12, 60))
        assert tokens == expected


def test_killed_and_frozen_ranks_change_no_token(folder, expected):
    with started(config_of(folder, tensor_parallel_size=2), "faulty") as driver:
        for number, (rank, fault) in enumerate([(0, signal.SIGKILL), (1, signal.SIGSTOP)]):
            before = rank_pids(driver)
            tokens, stats = generate(driver, requests_of(12, 60), lambda: os.kill(before[rank], fault))  # noqa: B023
            assert tokens == expected
            assert stats["recoveries"] == number + 1
            after = rank_pids(driver)
            assert [r for r in (0, 1) if before[r] != after[r]] == [rank]
        health = ray.get(driver.health.remote())
        assert (health.ready, health.recoveries) == (True, 2)


async def refusal_of(driver, request):
    errors = []
    client = await DriverClient.connect(driver, on_outputs=lambda outputs: errors.extend(map(error_of, outputs)))
    client.submit(request)
    while not errors:
        await client.stats()
    await client.close()
    return errors[0]


def test_names_and_control_calls_and_a_refusal_and_the_end(folder):
    with started(config_of(folder, tensor_parallel_size=2), "named") as driver:
        assert {"manta:named:driver", "manta:named:rank0", "manta:named:rank1"} <= set(list_named_actors())
        assert ray.get(driver.health.remote()).ready
        stats = ray.get(driver.stats.remote())
        assert (stats["num_blocks"], stats["free_blocks"]) == (120, 120)
        too_long = Request.create("long", [5] * 1000, SamplingParams())
        assert type(asyncio.run(refusal_of(driver, too_long))) is PromptTooLong
        pid = driver_pid(driver)
        pids = [pid, *rank_pids(driver)]
        sockets = private_sockets(pid)
        assert len(sockets) == 2
        stop_driver(driver)
        assert [p for p in pids if is_ray_worker(p)] == []
        assert [path for path in sockets if os.path.exists(path)] == []
    wait_all_free()


def test_a_model_that_cannot_be_loaded(tmp_path):
    make_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError):
        start_driver(config_of(tmp_path, tensor_parallel_size=2), name="broken")
    wait_all_free()


def test_a_given_group_holds_driver_and_ranks(folder, make_group, expected):
    config = config_of(folder, tensor_parallel_size=2)
    group = make_group(bundles(config))
    with started(config, "grouped", placement_group=group) as driver:
        tokens, _ = generate(driver, requests_of(2))
        assert {key: expected[key][:24] for key in tokens} == tokens
        # Those that were begun beside the driver, and no others.
        names = {name for name in workers_of("manta:grouped") if ":rank" in name}
        assert names == {"manta:grouped:rank0", "manta:grouped:rank1"}


def test_nothing_is_left_of_ranks_whose_driver_does_not_start(tmp_path, make_group):
    make_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    config = config_of(tmp_path, tensor_parallel_size=2)
    group = make_group(bundles(config))
    with pytest.raises(ModelLoadError):
        start_driver(config, name="broken", placement_group=group)
    ray.util.remove_placement_group(group)
    wait_all_free()
    assert not workers_of("manta:broken")


def test_resources_that_never_come(folder, make_group):
    config = config_of(folder, tensor_parallel_size=2, resources_timeout_s=0.5)
    group = make_group([{"CPU": 0.2}, {"CPU": 100}, {"CPU": 0.2}])
    with pytest.raises(
        EngineUnavailable, match=r"waiting for resources: needs 100.4 CPU in 3 bundles, cluster has 4 CPU"
    ):
        start_driver(config, name="starved", placement_group=group)
