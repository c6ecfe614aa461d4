"""The driver: one process that owns an engine, its ranks and the sockets of its clients."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.actors import free_name
from cluster.adoption import workers_of
from cluster.engine_loop import EngineLoop
from cluster.framing import Ticket
from cluster.hub import Hub, Peer
from cluster.inbox import Call, ClientGone
from cluster.messages import (
    Abort,
    Ask,
    DriverFacts,
    DriverHealth,
    Outputs,
    Reply,
    Submit,
    Welcome,
    decode_for_driver,
    encode,
)
from cluster.metrics import Buckets, RayMetrics, buckets, snapshot
from cluster.placement import DRIVER_CPUS, place, shortage
from cluster.processes import end_process
from cluster.rank_launcher import RankLauncher
from cluster.ray_executor import RayExecutor
from cluster.recovery import RecoveryPolicy
from cluster.worker_actor import RankFacts, environment, on_thread, set_up_process
from engine.config import EngineConfig
from engine.errors import EngineUnavailable, MantaError
from engine.executor import Executor
from engine.llm_engine import LLMEngine
from engine.model_config import ModelConfig, resolve
from engine.picture import picture
from engine.request import SequenceOutput
from engine.worker.preparation import Preparation

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_CLIENT_BYTES = 64 << 20
"""A client that leaves more than this unread is disconnected, and its requests aborted."""
SAY_EVERY_S = 10.0
EXPORT_EVERY_S = 2.0

CONTROL = "control"
"""Threads that answer while `start` runs."""


class Driver:
    """Serves one engine to the clients of a hub. Needs no Ray: give it any executor."""

    def __init__(
        self,
        name: str,
        config: EngineConfig,
        executor: Executor,
        *,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        policy: RecoveryPolicy | None = None,
        max_client_bytes: int = MAX_CLIENT_BYTES,
        node_id: str = "",
    ) -> None:
        self.name, self._config = name, config
        self._node_id = node_id
        self._started_s = time.monotonic()
        self.engine = LLMEngine(config, executor, vocab_size=vocab_size, eos_token_ids=eos_token_ids)
        self.loop = EngineLoop(self.engine, executor, self._emit, policy=policy)
        self._hub = Hub(self, name="clients", max_unsent_bytes=max_client_bytes)
        self._facts: DriverFacts | None = None
        self.ticket: Ticket | None = None

    def start(self) -> DriverFacts:
        """Load the model on the ranks and begin to serve."""
        capacity = self.engine.start()
        self._facts = DriverFacts(
            name=self.name,
            pid=os.getpid(),
            node_id=self._node_id,
            num_blocks=capacity.num_blocks,
            block_size=capacity.block_size,
            max_model_len=self._config.model_len,
        )
        self.ticket = self._hub.listen_unix()
        self._hub.start()
        self.loop.start()
        return self._facts

    def listen_tcp(self, host: str) -> Ticket:
        """Let clients of other nodes in."""
        return self._hub.listen_tcp(host)

    def stop(self) -> None:
        """End the loop, the ranks and the sockets. Unfinished requests fail with EngineUnavailable. Idempotent."""
        self.loop.stop()
        self.engine.shutdown()
        self._hub.close()

    def stats(self) -> dict[str, Any]:
        """Counters and gauges by name; call it on the loop's thread, between two steps."""
        return {"name": self.name, "uptime_s": time.monotonic() - self._started_s, **snapshot(self.engine)}

    def measured(self) -> tuple[dict[str, Any], dict[str, Buckets]]:
        """What RayMetrics exports; call it where stats is called."""
        return self.stats(), buckets(self.engine.metrics)

    # The hub's thread

    def joined(self, peer: Peer) -> None:
        """Tell a new client what this driver is."""
        assert self._facts is not None, "started"
        logger.info("%s: client %s connected", self.name, peer.hello)
        peer.send(encode(Welcome(self._facts)))

    def received(self, peer: Peer, payload: bytes) -> None:
        """Hand a client's message to the loop; health is told at once, whatever the loop does."""
        message = decode_for_driver(payload)
        if isinstance(message, Submit | Abort):
            self.loop.post(peer, message)
        elif message.topic == "health":
            peer.send(encode(Reply(message.number, msgspec.to_builtins(self.loop.health()))))
        else:
            self._answer(peer, message)

    def gone(self, peer: Peer, reason: str) -> None:
        """Have the loop abort what the client asked for."""
        logger.info("%s: client %s left: %s", self.name, peer.hello, reason)
        self.loop.post(peer, ClientGone())

    def _answer(self, peer: Peer, ask: Ask) -> None:
        """In order with the client's other messages, so that it sees what they did."""

        def answer() -> None:
            body = picture(self.engine) if ask.topic == "picture" else self.stats()
            peer.send(encode(Reply(ask.number, body)))

        self.loop.post(peer, Call(answer))

    # The loop's thread

    def _emit(self, client: Peer, outputs: list[SequenceOutput]) -> None:
        client.send(encode(Outputs(outputs)))  # a client that is gone or too slow is told by `gone`


class MantaDriver:
    """The driver as an actor. Control calls answer while the model loads and while the engine runs."""

    def __init__(
        self,
        name: str,
        config: EngineConfig,
        model_config: ModelConfig,
        group: PlacementGroup | None,
        options: dict[str, Any],
    ) -> None:
        set_up_process(name)
        self._name = name
        self._lock = threading.Lock()
        self._tcp: Ticket | None = None
        self._stopped = threading.Event()
        self._failure = ""
        policy = options.pop("policy", None) or RecoveryPolicy()
        node_id = ray.get_runtime_context().get_node_id()
        self._executor = RayExecutor(
            config,
            model_config,
            placement_group=group,
            name=name.removesuffix(":driver"),
            on_trouble=self._look,
            on_wait=self._waits,
            first_step_s=policy.first_step_s,
            with_spares=True,
            # The ranks of a group that outlives the driver do so too.
            driver=ray.get_runtime_context().get_actor_name() if group is not None else "",
            **options,
        )
        self._driver = Driver(
            name,
            config,
            self._executor,
            vocab_size=model_config.vocab_size,
            eos_token_ids=model_config.eos_token_ids,
            policy=policy,
            node_id=node_id,
        )
        self._started = False

    def __repr__(self) -> str:
        return self._name

    def _look(self) -> None:
        self._driver.loop.look()

    def _waits(self, missing: str) -> None:
        self._driver.loop.waits(missing)

    def start(self) -> DriverFacts:
        """Load and serve. Raises ConfigError, ModelLoadError or EngineUnavailable."""
        try:
            facts = self._driver.start()
        except BaseException as error:
            self._failure = f"{type(error).__name__}: {error}"
            raise
        self._started = True
        quiet_collector()
        threading.Thread(target=self._export, name="manta-metrics", daemon=True).start()
        return facts

    def _export(self) -> None:
        metrics = RayMetrics(self._name)
        while not self._stopped.wait(EXPORT_EVERY_S):
            with contextlib.suppress(EngineUnavailable):
                metrics.export(*self._between_steps(self._driver.measured))

    @on_thread(CONTROL)
    def ticket(self, node_id: str) -> Ticket:
        """Where a client on that node connects."""
        facts, local = self._driver._facts, self._driver.ticket
        if not self._started or facts is None or local is None:
            raise EngineUnavailable(f"{self._name} is not ready", retry_after_s=5)
        if node_id == facts.node_id:
            return local
        with self._lock:
            if self._tcp is None:
                self._tcp = self._driver.listen_tcp(ray.util.get_node_ip_address())
            return self._tcp

    @on_thread(CONTROL)
    def health(self) -> DriverHealth:
        """Whether the driver works, is starting, or why it failed."""
        if self._failure:
            return DriverHealth(state="failed", reason=self._failure)
        if not self._started:
            return DriverHealth(state="starting", reason="the model is loading")
        return self._driver.loop.health()

    @on_thread(CONTROL)
    def stats(self) -> dict[str, Any]:
        """See cluster.metrics.snapshot. Raises EngineUnavailable when the loop does not answer in 5 s."""
        return self._between_steps(self._driver.stats)

    def _between_steps(self, ask: Callable[[], T]) -> T:
        answers: queue.SimpleQueue[T] = queue.SimpleQueue()
        self._driver.loop.post(None, Call(lambda: answers.put(ask())))
        try:
            return answers.get(timeout=5)
        except queue.Empty:
            raise EngineUnavailable(f"{self._name}: the loop is busy or recovering") from None

    @on_thread(CONTROL)
    def pid(self) -> tuple[str, int]:
        """(node id, process id)."""
        return ray.get_runtime_context().get_node_id(), os.getpid()

    @on_thread(CONTROL)
    def rank_facts(self) -> list[RankFacts]:
        """Where the ranks are, in order."""
        return self._executor.rank_facts

    @on_thread(CONTROL)
    def stop(self) -> None:
        """End the engine, the ranks and the sockets; see Driver.stop."""
        self._stopped.set()
        self._driver.stop()


def quiet_collector() -> None:
    """Keep the garbage collector out of the steps: with thousands of sequences a full collection takes 20 ms.

    What start-up made stays for good; the loop's own objects hold no cycles, and a rare collection finds the others.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


def start_driver(
    config: EngineConfig,
    model_config: ModelConfig | None = None,
    *,
    name: str,
    placement_group: PlacementGroup | None = None,
    policy: RecoveryPolicy | None = None,
    timeout_s: float = 3600.0,
) -> Any:
    """Start a driver actor with its ranks and wait until it serves; returns the actor's handle.

    The driver goes into bundle 0 of `placement_group` and rank i into bundle i + 1 (placement.bundles is the layout);
    without a group the ranks get one of their own. It lives as long as the calling process, or until `stop_driver`.
    `name` shows in the dashboard as "manta:NAME:driver" and "manta:NAME:rank0"; make it unique among live drivers.
    Blocks, telling the log how it goes. Raises ConfigError, ModelLoadError, or EngineUnavailable when resources or the
    ranks do not come in time.
    """
    if model_config is None:
        model_config = ModelConfig.load(config)
    config = resolve(config, model_config)
    Preparation(config, model_config).begin()  # while processes come up
    engine_name = f"manta:{name}"
    full_name = f"{engine_name}:driver"
    actor_name = free_name(full_name)
    strategy: Any = "DEFAULT"
    begun: list[Any] = []
    if placement_group is not None:
        placement = place(config, placement_group, name=full_name, timeout_s=config.resources_timeout_s)
        strategy = PlacementGroupSchedulingStrategy(placement_group, 0)
        if not workers_of(engine_name):  # else a driver before this one left them
            begun = RankLauncher(engine_name, config, model_config, placement, actor_name).start_ranks()
    actor = ray.remote(concurrency_groups={CONTROL: 4})(MantaDriver)
    driver = actor.options(
        name=actor_name,
        num_cpus=DRIVER_CPUS,
        scheduling_strategy=strategy,
        runtime_env={"env_vars": environment(config)},
        max_restarts=0,
    ).remote(
        full_name,
        config,
        model_config,
        placement_group,
        {"policy": policy, "load_timeout_s": timeout_s, "begun": begun},
    )
    try:
        _wait_started(driver, full_name, timeout_s, placement_group)
    except BaseException:
        for started in (driver, *begun):
            ray.kill(started)
        raise
    return driver


def stop_driver(driver: Any, *, timeout_s: float = 15.0) -> None:
    """End a driver and its ranks; returns once their processes are gone, or killed. Idempotent."""
    try:
        node_id, pid = ray.get(driver.pid.remote(), timeout=5)
    except Exception:
        node_id, pid = "", 0
    with contextlib.suppress(Exception):
        ray.get(driver.stop.remote(), timeout=timeout_s)
    with contextlib.suppress(Exception):
        ray.kill(driver)
    if node_id == ray.get_runtime_context().get_node_id():
        end_process(pid, 2.0)


def _wait_started(driver: Any, name: str, timeout_s: float, group: PlacementGroup | None) -> None:
    began_s = time.monotonic()
    ready = driver.start.remote()
    while True:
        done, _ = ray.wait([ready], timeout=SAY_EVERY_S)
        waited_s = time.monotonic() - began_s
        if done:
            break
        if waited_s > timeout_s:
            raise EngineUnavailable(f"{name} was not ready after {timeout_s:g} s")
        logger.info("%s: starting (%.0f s)%s", name, waited_s, f": {shortage(group)}" if group else "")
    try:
        ray.get(ready)
    except Exception as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, MantaError):
            raise cause from error
        raise EngineUnavailable(f"{name} did not start: {error}") from error
