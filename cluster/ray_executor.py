"""RayExecutor: an Executor whose ranks are Ray actors."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgspec
import ray
from ray.util.placement_group import PlacementGroup

from cluster.actors import summary
from cluster.placement import Placement, place
from cluster.rank_group import RankGroup
from cluster.rank_launcher import RankLauncher
from cluster.rank_loop import FAULT, decode_fault
from cluster.stall_watch import StallWatch
from cluster.step_channel import ActorChannel, SocketChannel, StepChannel
from cluster.step_clock import PlanSizes, StepClock, StepSize
from cluster.worker_actor import MantaWorker, RankFacts, environment
from engine.config import EngineConfig
from engine.errors import ConfigError, ExecutorDied
from engine.executor import CacheCapacity
from engine.model_config import ModelConfig
from engine.step import StepMasks, StepPlan, StepResult, decode_result, encode

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 60.0


class _Pending(msgspec.Struct):
    """A step in flight."""

    plan: tuple[int, int]
    size: StepSize
    submitted_s: float
    future: Any


class RayExecutor:
    """Runs step plans on one worker actor a rank, and knows within milliseconds when one dies.

    Where Ray is not initialised yet, it is (see start_ray). The actors live in `placement_group` (laid out as
    placement.bundles says), or in a group of their own. `on_trouble` is called, on some thread, when a rank is lost:
    ask `check` then. `on_wait` is called by the thread that starts or restarts, about once a second while resources
    are missing: what it raises ends the wait. `first_step_s` is what a step may take that compiles kernels.

    With the name of a `driver`, this process's, the actors outlive it, and those that an earlier one left are used, or
    those that were `begun` for it (see RankLauncher.start_ranks).
    `with_spares`: processes wait to replace ranks that die, see config.warm_spares. `config` is resolved.
    """

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        *,
        placement_group: PlacementGroup | None = None,
        name: str | None = None,
        on_trouble: Callable[[], None] = lambda: None,
        on_wait: Callable[[str], None] = lambda _: None,
        load_timeout_s: float = 3600.0,
        first_step_s: float = 300.0,
        driver: str = "",
        begun: Sequence[Any] = (),
        with_spares: bool = False,
        worker_class: type[MantaWorker] = MantaWorker,
    ) -> None:
        self._config, self._model_config = config, model_config
        self._given_group = placement_group
        self.name = name or f"manta:{Path(model_config.folder).name}"
        self._on_trouble, self._on_wait = on_trouble, on_wait
        self._load_timeout_s = load_timeout_s
        self._worker_class = worker_class
        self._driver, self._begun, self._with_spares = driver, begun, with_spares
        self._owns_ray = False
        self._placement: Placement | None = None
        self._group: RankGroup | None = None
        self._channel: StepChannel | None = None
        self._lock = threading.Lock()
        self._pending: deque[_Pending] = deque()
        self._last_result_s = 0.0
        on_cpu = config.device == "cpu"
        self._clock = StepClock(first_s=first_step_s, floor_s=10.0 if on_cpu else 5.0)
        self._sizes = PlanSizes()
        self._watch = StallWatch(on_cpu=on_cpu)
        self._died: ExecutorDied | None = None
        self._generation = 0
        self._complete = False
        self._cut = False
        """The failure was told by a rank whose collective failed."""
        self._shut_down = False

    # Life

    def start(self) -> CacheCapacity:
        if not ray.is_initialized():
            start_ray(self._config)
            self._owns_ray = True
        try:
            self._placement = place(
                self._config, self._given_group, name=self.name, timeout_s=self._config.resources_timeout_s
            )
            launcher = RankLauncher(
                self.name, self._config, self._model_config, self._placement, self._driver, self._worker_class
            )
            self._group = RankGroup(
                launcher,
                load_timeout_s=self._load_timeout_s,
                on_wait=self._on_wait,
                begun=self._begun,
                with_spares=self._with_spares,
            )
            if self._driver and not self._begun:
                self._group.adopt()
            return self._bring_up()
        except BaseException:
            self.shutdown()
            raise

    def restart(self) -> CacheCapacity:
        """Replace the ranks that failed, in their places, and those that cannot go on without them."""
        assert self._group is not None and not self._shut_down, "start first"
        failed = self._died.ranks if self._died is not None else ()
        self._die(ExecutorDied("the executor is restarting"))
        self._close_channel()
        self._group.drop_failed(failed, keep=self._complete, cut=self._cut)
        self._cut = False
        return self._bring_up()

    def shutdown(self) -> None:
        if self._shut_down:
            return
        self._shut_down = True
        self._die(ExecutorDied("the executor was shut down"))
        self._close_channel()
        if ray.is_initialized():
            if self._group is not None:
                self._group.end()
            if self._placement is not None:
                with contextlib.suppress(Exception):
                    self._placement.release()
        if self._owns_ray:
            ray.shutdown()

    @property
    def rank_facts(self) -> list[RankFacts]:
        """Where the ranks are now."""
        return self._group.facts if self._group is not None else []

    def _bring_up(self) -> CacheCapacity:
        assert self._group is not None
        self._generation += 1
        self._complete = False
        capacity = self._group.bring_up()
        self._open_channel(self._group)
        self._complete = True
        return capacity

    def _open_channel(self, group: RankGroup) -> None:
        listener = _Listener(self, self._generation)
        if self._config.step_channel == "socket":
            here = ray.get_runtime_context().get_node_id()
            channel: StepChannel = SocketChannel(
                len(group.ranks), listener, node_id=here, node_ip=ray.util.get_node_ip_address()
            )
        else:
            channel = ActorChannel(group.actors, listener)
        with self._lock:
            self._died = None
            self._last_result_s = time.monotonic()
            self._sizes = PlanSizes()
            self._channel = channel
        group.open_loops(channel.tickets([facts.node_id for facts in group.facts]))
        deadline_s = time.monotonic() + CONNECT_TIMEOUT_S
        while not channel.wait_ready(0.1):
            self._check_loops()
            if self._died is not None:
                raise self._died
            if time.monotonic() > deadline_s:
                raise ExecutorDied(f"the ranks did not open their step channel in {CONNECT_TIMEOUT_S:g} s")

    def _close_channel(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    # Steps

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        future: Future[StepResult] = Future()
        step = _Pending((plan.epoch, plan.step), self._sizes.size(plan), time.monotonic(), future)
        payload = encode(plan)
        with self._lock:
            died, channel = self._died, self._channel
            if died is None and channel is not None:
                self._pending.append(step)
        if died is not None or channel is None:
            future.set_exception(died or ExecutorDied("the executor is not running"))
        else:
            channel.send(payload)
        return future

    def send_masks(self, masks: StepMasks) -> None:
        with self._lock:
            channel = self._channel if self._died is None else None
        if channel is not None:
            channel.send(encode(masks))  # of a step that has failed otherwise: nobody waits for them

    def check(self) -> None:
        """Raise ExecutorDied if a rank is dead, or a step takes so long that one must be stuck. Never blocks."""
        if self._died is None:
            self._check_loops()
            self._check_stuck()
        if self._died is not None:
            raise self._died

    def _check_loops(self) -> None:
        ended = self._group.ended() if self._group is not None else None
        if ended is not None:
            self._die(ExecutorDied(f"rank {ended[0]} left: {ended[1]}", ranks=(ended[0],)))

    def _check_stuck(self) -> None:
        with self._lock:
            if not self._pending:
                return
            oldest = self._pending[0]
        now_s, group = time.monotonic(), self._group
        assert group is not None
        if not self._watch.begin((self._generation, oldest.plan), now_s):
            return
        answers = group.progress()
        if frozen := group.frozen():
            self._die(
                ExecutorDied(f"ranks {frozen} are frozen, {self._watch.waited_s:.1f} s into a step", ranks=frozen)
            )
            return
        stall = self._watch.judge(answers, self._clock.stuck_s(oldest.size), self._clock.first_s, now_s)
        if stall is not None:
            self._die(ExecutorDied(f"step {oldest.plan} is stuck: {stall.reason}", ranks=stall.ranks))

    def _die(self, error: ExecutorDied) -> None:
        """Note a failure, once, and fail what is in flight."""
        with self._lock:
            if self._died is not None:
                return
            self._died = error
            pending, self._pending = list(self._pending), deque()
        for step in pending:
            step.future.set_exception(error)

    def _heard(self, generation: int, rank: int, payload: bytes) -> None:
        if generation != self._generation:
            return
        if payload[:1] == FAULT:
            fault = decode_fault(payload[1:])
            logger.error("%s: rank %d failed in step %d:\n%s", self.name, rank, fault.step, fault.trace)
            said = f"failed in step {fault.step}: {fault.error}"
            if fault.peer:
                self._cut = self._cut or self._died is None
                self._die(ExecutorDied(f"rank {rank} {said}"))  # whoever is at fault, it is not this rank
                self._on_trouble()
            else:
                self._lost(generation, rank, said)
            return
        result = decode_result(payload[1:])
        now_s = time.monotonic()
        with self._lock:
            if not self._pending:
                return
            step = self._pending.popleft()
            took_s = now_s - max(step.submitted_s, self._last_result_s)
            self._last_result_s = now_s
        assert step.plan == (result.epoch, result.step), f"answer {result.epoch}:{result.step} to {step.plan}"
        self._clock.observe(step.size, took_s)
        step.future.set_result(result)

    def _lost(self, generation: int, rank: int, reason: str) -> None:
        if generation != self._generation:
            return
        self._die(ExecutorDied(f"rank {rank}: {reason}", ranks=(rank,)))
        self._on_trouble()


class _Listener:
    """Hears one generation of ranks; an older one's last words are dropped."""

    def __init__(self, executor: RayExecutor, generation: int) -> None:
        self._executor, self._generation = executor, generation

    def received(self, rank: int, payload: bytes) -> None:
        self._executor._heard(self._generation, rank, payload)

    def lost(self, rank: int, reason: str) -> None:
        self._executor._lost(self._generation, rank, reason)


def start_ray(config: EngineConfig) -> None:
    """Join the cluster that RAY_ADDRESS names; without it, start a Ray of this machine that ends with this process."""
    options: dict[str, Any] = {
        "logging_level": logging.ERROR,
        "runtime_env": {"env_vars": {"PYTHONPATH": environment(config)["PYTHONPATH"]}},
    }
    if not os.environ.get("RAY_ADDRESS"):
        cpus = max(os.cpu_count() or 1, config.tensor_parallel_size)
        options |= {"address": "local", "include_dashboard": False, "num_cpus": cpus}
    try:
        ray.init(**options)
    except Exception as error:
        raise ConfigError(
            "tensor_parallel_size",
            config.tensor_parallel_size,
            f"more than 1 needs Ray, which could not start: {summary(error)}",
        ) from error
