"""Faults of the ranks under 32 streams, greedy and sampled, one sample and two: no token changes, no block leaks."""

import asyncio
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from cluster.driver import Driver
from cluster.ray_executor import RayExecutor
from cluster.recovery import RecoveryPolicy
from cluster.worker_actor import MantaWorker
from engine.config import EngineConfig
from engine.errors import RequestFailed
from engine.model_config import ModelConfig, resolve
from engine.request import Request
from engine.sampling_params import SamplingParams
from tests.checkpoints import make_checkpoint
from tests.streams import Streams, undisturbed

pytestmark = pytest.mark.ray

MANY = 20


class FaultyWorker:
    """Does in a step what a file beside the model says, once; and dies of every request called poison."""

    def __init__(self, worker, rank):
        self._worker, self._rank = worker, rank
        self._order = Path(worker._model_config.folder) / f"fault{rank}"

    def submit(self, plan, masks=None):
        if self._order.exists():
            fault = self._order.read_text()
            self._order.unlink()
            if fault == "raise":
                raise RuntimeError("a step that cannot be")
            threading.Event().wait()
        if self._rank == 1 and any(new.request_id == "poison" for new in plan.new):
            os.kill(os.getpid(), signal.SIGKILL)
        return self._worker.submit(plan, masks)

    def __getattr__(self, name):
        return getattr(self._worker, name)


class FaultyRank(MantaWorker):
    def _load(self, rank, meeting, timeout_s):
        return FaultyWorker(super()._load(rank, meeting, timeout_s), rank)


class HeldExecutor(RayExecutor):
    """When it was told to, keeps the engine waiting before a step in which MANY sequences go on, until told again."""

    holds = False

    def hold(self):
        self.held, self.go_on, self.holds = threading.Event(), threading.Event(), True

    def submit(self, plan):
        if self.holds and plan.num_decodes >= MANY:
            self.holds = False
            self.held.set()
            self.go_on.wait()
        return super().submit(plan)


def requests_of(max_tokens=60):
    """24 requests of 32 samples; more than the cache can hold at once."""
    return [
        Request.create(
            f"request{i}",
            [3 + (7 * i + j) % 190 for j in range(2 + 2 * i)],
            SamplingParams(
                temperature=float(i % 2), seed=i, n=1 + (i % 3 == 2), max_tokens=max_tokens, ignore_eos=True
            ),
        )
        for i in range(24)
    ]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_checkpoint(folder)
    settings = {"device": "cpu", "dtype": "float32", "num_blocks": 120, "max_num_seqs": 24}
    return EngineConfig(model=str(folder), tensor_parallel_size=2, **settings)


@pytest.fixture(scope="module")
def expected(config):
    tokens = undisturbed(config, requests_of())
    assert len(tokens) == 32
    return tokens


@pytest.fixture(scope="module")
def served(config, ray_job):  # noqa: ARG001
    """A driver in this process over two ranks, and its executor."""
    model_config = ModelConfig.load(config)
    resolved = resolve(config, model_config)
    loop = []
    executor = HeldExecutor(
        resolved,
        model_config,
        name="manta:faults",
        worker_class=FaultyRank,
        with_spares=True,
        on_trouble=lambda: loop[0].look(),
    )
    driver = Driver(
        "faults",
        resolved,
        executor,
        vocab_size=model_config.vocab_size,
        eos_token_ids=model_config.eos_token_ids,
        policy=RecoveryPolicy(max_failures=100, max_recoveries=3),
    )
    loop.append(driver.loop)
    driver.start()
    yield driver, executor
    driver.stop()


class Faults:
    """What can happen to the ranks."""

    def __init__(self, served, config):
        self._driver, self._executor = served
        self._folder = Path(config.model)

    def kill(self, *ranks, number=signal.SIGKILL):
        for pid in [facts.pid for rank, facts in enumerate(self._executor.rank_facts) if rank in ranks]:
            os.kill(pid, number)

    def order(self, rank, fault):
        (self._folder / f"fault{rank}").write_text(fault)

    def kill_again_in_the_recovery(self):
        before, (first, second) = self._driver.loop.health().recoveries, [f.pid for f in self._executor.rank_facts]
        os.kill(first, signal.SIGKILL)
        self._executor.go_on.set()
        while self._driver.loop.health().recoveries == before:
            time.sleep(0.001)
        os.kill(second, signal.SIGKILL)  # which outlived the first


FAULTS = {
    "killed": lambda faults: faults.kill(1),
    "two at once": lambda faults: faults.kill(0, 1),
    "again in the recovery": lambda faults: faults.kill_again_in_the_recovery(),
    "raises": lambda faults: faults.order(1, "raise"),
    "hangs before a collective": lambda faults: faults.order(0, "hang"),
    "stopped": lambda faults: faults.kill(1, number=signal.SIGSTOP),
}


async def generate(served, requests, disturb):
    """The streams of `requests` once they are over, and the recoveries meanwhile; the engine waits for `disturb`."""
    driver, executor = served
    streams = Streams(requests)
    if disturb is not None:
        executor.hold()
    await streams.join(driver.ticket)
    before = driver.loop.health().recoveries
    if disturb is not None:
        try:
            assert await asyncio.to_thread(executor.held.wait, 60)
            await asyncio.to_thread(disturb)
        finally:
            executor.go_on.set()
    stats = await streams.finish()
    assert driver.loop.health().ready
    return streams, stats["recoveries"] - before


@pytest.mark.parametrize("fault", FAULTS)
def test_no_token_changes(served, config, expected, fault):
    disturb = lambda: FAULTS[fault](Faults(served, config))
    streams, recoveries = asyncio.run(generate(served, requests_of(), disturb))
    assert streams.tokens == expected
    assert recoveries >= 1
    assert not streams.errors


def test_a_poisonous_request_is_failed_alone(served, expected):
    poison = Request.create("poison", [5, 6, 7], SamplingParams(n=2, max_tokens=20))
    streams, recoveries = asyncio.run(generate(served, [*requests_of(), poison], None))
    assert {sample: streams.tokens[sample] for sample in expected} == expected
    assert set(streams.errors) == {("poison", 0), ("poison", 1)}
    assert all(type(error) is RequestFailed and error.http_status == 500 for error in streams.errors.values())
    assert "failed 3 times while it ran this request" in str(streams.errors["poison", 0])
    assert recoveries >= 3  # one that had to be tried again counts twice
