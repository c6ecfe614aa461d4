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
from engine.llm_engine import LLMEngine
from engine.local_executor import LocalExecutor
from engine.model_config import ModelConfig, resolve
from engine.request import Request
from engine.sampling_params import SamplingParams
from tests.checkpoints import make_checkpoint

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_checkpoint(path)
    return path


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
    """The tokens of an undisturbed run in this process."""
    config = config_of(folder)
    model_config = ModelConfig.load(config)
    config = resolve(config, model_config)
    executor = LocalExecutor(config, model_config)
    engine = LLMEngine(config, executor, vocab_size=model_config.vocab_size, eos_token_ids=model_config.eos_token_ids)
    engine.start()
    tokens = {}
    for request in requests_of(12, 60):
        engine.add_request(request)
    while engine.has_unfinished:
        for output in engine.step():
            tokens.setdefault((output.request_id, output.index), []).extend(output.token_ids)
    engine.shutdown()
    return tokens


async def generate(driver, requests, *, disturb=None):
    """All tokens of `requests`; runs `disturb` once every sample has its first, and no beam search its end."""
    tokens, ended, changed = {}, set(), asyncio.Event()

    def on_outputs(outputs):
        for output in outputs:
            key = (output.request_id, output.index)
            assert output.finish_reason in (None, "length"), output.error
            tokens.setdefault(key, []).extend(output.token_ids)
            if output.finish_reason is not None:
                ended.add(key)
        changed.set()

    client = await DriverClient.connect(driver, on_outputs=on_outputs, on_disconnect=lambda _: changed.set())
    for request in requests:
        client.submit(request)
    wanted = sum(request.params.num_sequences for request in requests)
    beams = {request.request_id for request in requests if request.params.use_beam_search}
    samples = sum(request.params.num_sequences for request in requests if request.request_id not in beams)
    async with asyncio.timeout(90):
        while len(ended) < wanted:
            await changed.wait()
            changed.clear()
            assert not client.closed
            if disturb is not None and len(tokens) >= samples:
                assert not any(request_id in beams for request_id, _ in tokens)
                await asyncio.to_thread(disturb)
                disturb = None
    stats = await client.stats()
    await client.close()
    assert disturb is None
    assert (stats["running"], stats["waiting"], stats["used_blocks"]) == (0, 0, 0)
    return tokens, stats


def rank_pids(driver):
    return [facts.pid for facts in ray.get(driver.rank_facts.remote())]


def wait_all_free(timeout_s=60):
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
    driver = start_driver(config_of(folder, tensor_parallel_size=ranks, step_channel=channel), name="same")
    try:
        tokens, _ = asyncio.run(generate(driver, requests_of(12, 60)))
        assert tokens == expected
    finally:
        stop_driver(driver)


def test_killed_and_frozen_ranks_change_no_token(folder, expected):
    driver = start_driver(config_of(folder, tensor_parallel_size=2), name="faulty")
    try:
        faults = [(0, signal.SIGKILL), (1, signal.SIGSTOP)]
        for number, fault in enumerate(faults):
            before = rank_pids(driver)
            disturb = lambda: os.kill(before[fault[0]], fault[1])  # noqa: B023
            tokens, stats = asyncio.run(generate(driver, requests_of(12, 60), disturb=disturb))
            assert tokens == expected
            assert stats["recoveries"] == number + 1
            after = rank_pids(driver)
            assert [rank for rank in (0, 1) if before[rank] != after[rank]] == [fault[0]]
        health = ray.get(driver.health.remote())
        assert (health.ready, health.recoveries) == (True, 2)
    finally:
        stop_driver(driver)


def test_names_and_control_calls_and_the_end(folder):
    driver = start_driver(config_of(folder, tensor_parallel_size=2), name="named")
    assert {"manta:named:driver", "manta:named:rank0", "manta:named:rank1"} <= set(list_named_actors())
    assert ray.get(driver.health.remote()).ready
    stats = ray.get(driver.stats.remote())
    assert (stats["num_blocks"], stats["free_blocks"]) == (120, 120)
    _, pid = ray.get(driver.pid.remote())
    pids = [pid, *rank_pids(driver)]
    sockets = private_sockets(pid)
    assert len(sockets) == 2
    began_s = time.monotonic()
    stop_driver(driver)
    assert time.monotonic() - began_s < 10
    assert [p for p in pids if is_ray_worker(p)] == []
    assert [path for path in sockets if os.path.exists(path)] == []
    stop_driver(driver)
    wait_all_free()


def test_errors_of_requests_and_of_loading(folder, tmp_path):
    driver = start_driver(config_of(folder), name="errors")

    async def main():
        errors = []
        client = await DriverClient.connect(driver, on_outputs=lambda outputs: errors.extend(map(error_of, outputs)))
        client.submit(Request.create("long", [5] * 1000, SamplingParams()))
        while not errors:
            await client.stats()
        assert type(errors[0]) is PromptTooLong
        await client.close()

    asyncio.run(main())
    stop_driver(driver)
    make_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError):
        start_driver(config_of(tmp_path, tensor_parallel_size=2), name="broken")
    wait_all_free()


def test_a_given_group_holds_driver_and_ranks(folder, expected):
    config = config_of(folder, tensor_parallel_size=2)
    group = ray.util.placement_group(bundles(config), strategy=STRATEGY)
    driver = start_driver(config, name="grouped", placement_group=group)
    try:
        tokens, _ = asyncio.run(generate(driver, requests_of(2)))
        assert {key: expected[key][:24] for key in tokens} == tokens
        # Those that were begun beside the driver, and no others.
        names = {name for name in workers_of("manta:grouped") if ":rank" in name}
        assert names == {"manta:grouped:rank0", "manta:grouped:rank1"}
    finally:
        stop_driver(driver)
        ray.util.remove_placement_group(group)


def test_nothing_is_left_of_ranks_whose_driver_does_not_start(tmp_path):
    make_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    config = config_of(tmp_path, tensor_parallel_size=2)
    group = ray.util.placement_group(bundles(config), strategy=STRATEGY)
    with pytest.raises(ModelLoadError):
        start_driver(config, name="broken", placement_group=group)
    ray.util.remove_placement_group(group)
    wait_all_free()
    assert not workers_of("manta:broken")


def test_resources_that_never_come(folder):
    config = config_of(folder, tensor_parallel_size=2, resources_timeout_s=0.5)
    group = ray.util.placement_group([{"CPU": 0.2}, {"CPU": 100}, {"CPU": 0.2}])
    with pytest.raises(
        EngineUnavailable, match=r"waiting for resources: needs 100.4 CPU in 3 bundles, cluster has 4 CPU"
    ):
        start_driver(config, name="starved", placement_group=group)
    ray.util.remove_placement_group(group)
