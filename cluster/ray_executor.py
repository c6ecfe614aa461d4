"""RayExecutor: an Executor whose ranks are Ray actors."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgspec
import ray
from ray.util.placement_group import PlacementGroup

from cluster.placement import Placement, place, rank_bundle, wait_for
from cluster.rank_loop import FAULT, decode_fault
from cluster.recovery import StepClock
from cluster.step_channel import ActorChannel, SocketChannel, StepChannel
from cluster.worker_actor import MantaWorker, RankFacts, actor_class, environment
from engine.config import EngineConfig
from engine.errors import ConfigError, ExecutorDied, MantaError
from engine.executor import CacheCapacity
from engine.model_config import ModelConfig
from engine.step import StepMasks, StepPlan, StepResult, decode_result, encode, unpack

logger = logging.getLogger(__name__)

PING_TIMEOUT_S = 1.0
MEET_TIMEOUT_S = 120.0
SAY_EVERY_S = 5.0


class _Pending(msgspec.Struct):
    """A step in flight."""

    plan: tuple[int, int]
    num_tokens: int
    submitted_s: float
    future: Any


class RayExecutor:
    """Runs step plans on one worker actor a rank, and knows within milliseconds when one dies.

    Without a running Ray it starts a local one. The actors live in `placement_group` (laid out as placement.bundles
    says), or in a group of their own. `on_trouble` is called, on some thread, when a rank is lost: ask `check` then.
    `config` is resolved.
    """

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        *,
        placement_group: PlacementGroup | None = None,
        name: str | None = None,
        on_trouble: Callable[[], None] | None = None,
        resources_timeout_s: float = 600.0,
        load_timeout_s: float = 3600.0,
        worker_class: type[MantaWorker] = MantaWorker,
    ) -> None:
        self._config, self._model_config = config, model_config
        self._group = placement_group
        self.name = name or f"manta:{Path(model_config.folder).name}"
        self._on_trouble = on_trouble or (lambda: None)
        self._resources_timeout_s, self._load_timeout_s = resources_timeout_s, load_timeout_s
        self._worker_class = worker_class
        self._owns_ray = False
        self._placement: Placement | None = None
        self._ranks: list[Any] = []
        self._facts: list[RankFacts] = []
        self._loops: list[Any] = []
        self._channel: StepChannel | None = None
        self._lock = threading.Lock()
        self._pending: deque[_Pending] = deque()
        self._last_result_s = 0.0
        self._clock = StepClock()
        self._died: ExecutorDied | None = None
        self._generation = 0
        self._shut_down = False

    # Life

    def start(self) -> CacheCapacity:
        if not ray.is_initialized():
            start_local_ray(self._config)
            self._owns_ray = True
        try:
            self._placement = place(self._config, self._group, name=self.name, timeout_s=self._resources_timeout_s)
            return self._bring_up()
        except BaseException:
            self.shutdown()
            raise

    def restart(self) -> CacheCapacity:
        """Replace all ranks, in the same places."""
        assert self._placement is not None and not self._shut_down, "start first"
        self._take_down(ExecutorDied("the executor is restarting"))
        return self._bring_up()

    def shutdown(self) -> None:
        if self._shut_down:
            return
        self._shut_down = True
        self._take_down(ExecutorDied("the executor was shut down"))
        if self._placement is not None:
            with contextlib.suppress(Exception):
                self._placement.release()
        if self._owns_ray:
            ray.shutdown()

    @property
    def rank_facts(self) -> list[RankFacts]:
        """Where the ranks are now."""
        return list(self._facts)

    def _bring_up(self) -> CacheCapacity:
        assert self._placement is not None
        began_s = time.monotonic()
        self._generation += 1
        wait_for(self._placement.group, name=self.name, timeout_s=self._resources_timeout_s)  # a node may be gone
        self._spawn()
        self._facts = self._gather("starting", [rank.facts.remote() for rank in self._ranks], self._resources_timeout_s)
        one_node = len({facts.node_id for facts in self._facts}) == 1
        meeting = ray.get(
            self._ranks[0].free_address.remote("127.0.0.1" if one_node else self._facts[0].node_ip), timeout=30
        )
        loads = [rank.load.remote(meeting, MEET_TIMEOUT_S) for rank in self._ranks]
        capacities: list[CacheCapacity] = self._gather("loading", loads, self._load_timeout_s)
        capacity = least(capacities)
        self._gather("allocating", [rank.allocate.remote(capacity) for rank in self._ranks], self._load_timeout_s)
        self._open_channel()
        logger.info(
            "%s: %d ranks ready in %.1f s, %d blocks of %d tokens",
            self.name,
            len(self._ranks),
            time.monotonic() - began_s,
            capacity.num_blocks,
            capacity.block_size,
        )
        return capacity

    def _spawn(self) -> None:
        assert self._placement is not None
        actor, resources = actor_class(self._worker_class), rank_bundle(self._config)
        self._ranks = []
        for rank in range(self._config.tensor_parallel_size):
            name = f"{self.name}:rank{rank}"
            self._ranks.append(
                actor.options(
                    name=name if self._generation == 1 else f"{name}.{self._generation}",
                    num_cpus=resources["CPU"],
                    num_gpus=resources.get("GPU", 0),
                    scheduling_strategy=self._placement.strategy(rank),
                    runtime_env={"env_vars": environment(self._config)},
                    max_restarts=0,
                ).remote(name, self._config, self._model_config, rank)
            )

    def _gather(self, what: str, refs: list[Any], timeout_s: float) -> list[Any]:
        """The results of one call a rank; tells the log what is slow. Raises what a rank raised, or ExecutorDied."""
        began_s, waiting = time.monotonic(), list(refs)
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1, timeout=SAY_EVERY_S)
            for ref in done:
                rank = refs.index(ref)
                try:
                    ray.get(ref)
                except Exception as error:
                    cause = getattr(error, "cause", None)
                    if isinstance(cause, MantaError):
                        raise cause from error
                    raise ExecutorDied(f"rank {rank} failed while {what}: {_summary(error)}", ranks=(rank,)) from error
            waited_s = time.monotonic() - began_s
            if waiting and waited_s >= timeout_s:
                slow = tuple(refs.index(ref) for ref in waiting)
                raise ExecutorDied(f"ranks {slow} did not finish {what} in {timeout_s:g} s", ranks=slow)
            if waiting and not done:
                logger.info("%s: %s: %d of %d ranks left (%.0f s)", self.name, what, len(waiting), len(refs), waited_s)
        return list(ray.get(refs))

    def _open_channel(self) -> None:
        size, listener = len(self._ranks), _Listener(self, self._generation)
        if self._config.step_channel == "socket":
            here = ray.get_runtime_context().get_node_id()
            channel: StepChannel = SocketChannel(size, listener, node_id=here, node_ip=ray.util.get_node_ip_address())
        else:
            channel = ActorChannel(self._ranks, listener)
        with self._lock:
            self._died = None
            self._last_result_s = time.monotonic()
        tickets = channel.tickets([facts.node_id for facts in self._facts])
        self._loops = [rank.run_loop.remote(ticket) for rank, ticket in zip(self._ranks, tickets)]
        self._channel = channel
        deadline_s = time.monotonic() + 60
        while not channel.wait_ready(0.5):
            self._check_loops()
            if time.monotonic() > deadline_s:
                raise ExecutorDied("the ranks did not open their step channel in 60 s")

    def _take_down(self, reason: ExecutorDied) -> None:
        """End the channel and every rank. Bounded: what does not leave is killed."""
        self._die(reason)
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()
        ranks, self._ranks = self._ranks, []
        loops, self._loops = self._loops, []
        if not ray.is_initialized():
            return
        if loops and self._shut_down:
            ray.wait(loops, num_returns=len(loops), timeout=2)
        for rank in ranks:
            with contextlib.suppress(Exception):
                ray.kill(rank)
        here = ray.get_runtime_context().get_node_id()
        for facts in self._facts:
            if facts.node_id == here:
                end_process(facts.pid, 2.0 if self._shut_down else 0.3)
        self._facts = []

    # Steps

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        future: Future[StepResult] = Future()
        tokens = int(unpack(plan.num_tokens).sum()) if plan.num_tokens else 0
        step = _Pending((plan.epoch, plan.step), tokens, time.monotonic(), future)
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
        """Raise ExecutorDied if a rank is dead, or a step takes so long that one must be stuck. May take a second."""
        if self._died is None:
            self._check_loops()
            self._check_stuck()
        if self._died is not None:
            raise self._died

    def _check_loops(self) -> None:
        """A run_loop task that is over tells of a dead or failed rank."""
        done, _ = ray.wait(self._loops, num_returns=len(self._loops), timeout=0)
        for ref in done:
            rank = self._loops.index(ref)
            try:
                reason = ray.get(ref)
            except Exception as error:
                reason = _summary(error)
            self._die(ExecutorDied(f"rank {rank} left: {reason}", ranks=(rank,)))

    def _check_stuck(self) -> None:
        with self._lock:
            if not self._pending:
                return
            oldest = self._pending[0]
            age_s = time.monotonic() - max(oldest.submitted_s, self._last_result_s)
        if age_s < self._clock.suspect_s(oldest.num_tokens):
            return
        silent = self._silent_ranks()
        if silent and oldest in self._pending:
            silent = tuple(rank for rank in self._silent_ranks() if rank in silent)  # a second chance
        if silent and oldest in self._pending:
            self._die(ExecutorDied(f"ranks {silent} answer nothing, {age_s:.1f} s into a step", ranks=silent))
        elif age_s > self._clock.stuck_s(oldest.num_tokens):
            self._die(ExecutorDied(f"step {oldest.plan} has run for {age_s:.1f} s: the ranks live but are stuck"))

    def _silent_ranks(self) -> tuple[int, ...]:
        pings = [rank.ping.remote() for rank in self._ranks]
        answered, _ = ray.wait(pings, num_returns=len(pings), timeout=PING_TIMEOUT_S)
        return tuple(rank for rank, ping in enumerate(pings) if ping not in answered)

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
            self._lost(generation, rank, f"failed in step {fault.step}: {fault.error}")
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
        self._clock.observe(step.num_tokens, took_s)
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


def least(capacities: list[CacheCapacity]) -> CacheCapacity:
    """What every rank can hold."""
    sizes = {capacity.block_size for capacity in capacities}
    assert len(sizes) == 1, f"ranks disagree on the block size: {sizes}"
    return CacheCapacity(
        num_blocks=min(capacity.num_blocks for capacity in capacities),
        block_size=sizes.pop(),
        num_host_blocks=min(capacity.num_host_blocks for capacity in capacities),
    )


def start_local_ray(config: EngineConfig) -> None:
    """A Ray of this machine alone, on loopback, for offline use; it ends with this process."""
    try:
        ray.init(
            address="local",
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            configure_logging=True,
            logging_level=logging.ERROR,
            log_to_driver=True,
            num_cpus=max(os.cpu_count() or 1, config.tensor_parallel_size),
            runtime_env={"env_vars": {"PYTHONPATH": environment(config)["PYTHONPATH"]}},
        )
    except Exception as error:
        raise ConfigError(
            "tensor_parallel_size",
            config.tensor_parallel_size,
            f"more than 1 needs Ray, which could not start: {_summary(error)}",
        ) from error


def end_process(pid: int, timeout_s: float) -> None:
    """Wait for a Ray worker process of this node to end, and kill it when it does not (a stopped one never would)."""
    deadline_s = time.monotonic() + timeout_s
    killed = False
    while _is_ray_worker(pid):
        if time.monotonic() > deadline_s:
            if killed:
                logger.warning("process %d does not end", pid)
                return
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            killed, deadline_s = True, deadline_s + 5
        time.sleep(0.01)


def _is_ray_worker(pid: int) -> bool:
    """Whether `pid` is a live process that Ray started; a process id may have been given to another."""
    try:
        return b"ray::" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _summary(error: BaseException) -> str:
    """One line of an error that came through Ray."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        return f"{type(cause).__name__}: {cause}"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
