"""MantaWorker: one rank in its own process; a thin actor over engine.worker.worker.Worker."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import msgspec
import ray

from cluster.framing import Ticket
from cluster.gpu import bind_device, open_gpu
from cluster.peers import Peers
from cluster.rank_loop import Progress, RankLoop, StepWorker
from cluster.step_channel import QueueLink, RankLink, SocketLink
from engine.config import EngineConfig
from engine.executor import CacheCapacity
from engine.model_config import ModelConfig

if TYPE_CHECKING:
    from engine.parallel.communicator import Communicator

logger = logging.getLogger(__name__)

ROOT = str(Path(__file__).resolve().parent.parent)

DEVICE = "device"  # one thread: everything that touches the device, in order; `run_loop` holds it while it runs
PLANS = "plans"  # one thread: step plans by actor calls instead of a socket
ANSWERS = "answers"
CONCURRENCY_GROUPS = {DEVICE: 1, PLANS: 1, ANSWERS: 1}

GUARD_EVERY_S = 5.0
ORPHAN_S = 60.0

Method = TypeVar("Method", bound=Callable[..., Any])


def on_thread(group: str) -> Callable[[Method], Method]:
    """Run a method of the actor in one of its concurrency groups."""
    decorate: Callable[[Method], Method] = ray.method(concurrency_group=group)
    return decorate


class RankWorker(StepWorker, Protocol):
    """What the actor needs of engine.worker.worker.Worker."""

    def measure(self) -> CacheCapacity:
        """What cache this rank can hold, beside its weights and the largest step."""
        ...

    def allocate(self, capacity: CacheCapacity) -> None:
        """Make the cache."""
        ...

    def close(self) -> None:
        """Leave the group and let go of the memory."""
        ...


class RankFacts(msgspec.Struct, frozen=True):
    """Where a rank is."""

    pid: int
    node_id: str
    node_ip: str
    gpu_ids: tuple[str, ...] = ()


class RankState(msgspec.Struct, frozen=True):
    """What a worker process is, told to a driver that did not start it."""

    rank: int | None
    """None: a spare."""
    facts: RankFacts
    purpose: str
    capacity: CacheCapacity | None
    idle: bool
    """It is no spare, and runs no loop."""
    at: tuple[int, int] | None
    """See RankLoop.at."""


class MantaWorker:
    """Holds one rank. Control calls (default group) answer while the loop runs.

    A rank that is to outlive its driver knows the driver's name: it waits for another driver, and ends after a while.
    """

    def __init__(
        self, name: str, config: EngineConfig, model_config: ModelConfig, rank: int | None, driver: str = ""
    ) -> None:
        self._name, self._rank = name, rank
        self._config, self._model_config = config, model_config
        self._worker: RankWorker | None = None
        self._capacity: CacheCapacity | None = None
        self._loop: RankLoop | None = None
        self._peers: Peers | None = None
        self._queue_link = QueueLink()
        self._stage = "started"
        context = ray.get_runtime_context()
        gpu_ids = tuple(str(gpu) for gpu in ray.get_gpu_ids())
        self._facts = RankFacts(os.getpid(), context.get_node_id(), ray.util.get_node_ip_address(), gpu_ids)
        set_up_process(name)
        self._guard = DriverGuard(driver) if driver else None
        threading.Thread(target=self._import_ahead, name="manta-imports", daemon=True).start()
        if rank is not None and config.device == "cuda":
            threading.Thread(target=open_gpu, args=(gpu_ids,), name="manta-gpu", daemon=True).start()

    def __repr__(self) -> str:
        return self._name

    def facts(self) -> RankFacts:
        """Where this process is."""
        return self._facts

    def become(self, rank: int, name: str, gpu_ids: tuple[str, ...]) -> RankFacts:
        """Let a spare be a rank from now on, on the GPU that was its predecessor's."""
        assert self._rank is None, f"rank {self._rank} already"
        self._rank, self._name = rank, name
        self._facts = msgspec.structs.replace(self._facts, gpu_ids=gpu_ids)
        set_up_process(name)
        return self._facts

    def state(self) -> RankState:
        """What this process is, for a driver that did not start it."""
        at = self._loop.at if self._loop is not None else None
        purpose = purpose_of(self._config, self._model_config)
        return RankState(self._rank, self._facts, purpose, self._capacity, self._stage == "idle", at)

    def serve(self, driver: str) -> None:
        """Live as long as that driver, and a while longer."""
        if self._guard is not None:
            self._guard.driver = driver

    def leave(self) -> None:
        """Leave the group of ranks, so that those who wait in a collective are told."""
        if self._peers is not None:
            self._peers.close()

    def _import_ahead(self) -> None:
        """Import what loading will need, while the process waits to be told where the ranks meet."""
        if self._rank is None:
            with contextlib.suppress(OSError):  # the running ranks come first
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 5)
        with contextlib.suppress(Exception):  # loading will say what is wrong
            from engine.models.registry import find_model

            importlib.import_module("engine.worker.worker")
            find_model(self._model_config.architecture).load_class()
            if self._config.device == "cuda" and self._config.tensor_parallel_size > 1:
                importlib.import_module("torch.distributed._symmetric_memory")
                importlib.import_module("cupy.cuda.nccl")

    def progress(self) -> Progress:
        """How far the rank is; answers while it computes."""
        return self._loop.progress if self._loop is not None else Progress()

    def free_address(self, host: str) -> str:
        """A free "host:port" of this node, for the ranks to meet at."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.bind((host, 0))
            return f"{host}:{sock.getsockname()[1]}"

    @on_thread(DEVICE)
    def load(self, meeting: str, timeout_s: float) -> CacheCapacity:
        """Meet the other ranks at `meeting`, load this rank's share and measure what cache it can hold."""
        assert self._rank is not None, "a spare has no rank"
        self._stage = "importing"
        bind_device(self._config.device, self._facts.gpu_ids)
        self._worker = self._load(self._rank, meeting, timeout_s)
        self._stage = "measuring memory"
        return self._worker.measure()

    def _connect(self, rank: int, meeting: str, timeout_s: float) -> Communicator:
        from engine.parallel.group import connect

        self._stage = "meeting the other ranks"
        return connect(rank, self._config.tensor_parallel_size, meeting, self._config.device, timeout_s)

    @on_thread(DEVICE)
    def rejoin(self, meeting: str, timeout_s: float) -> None:
        """Meet the other ranks again, some of them new; this rank's weights and cache stay."""
        peers, rank = self._peers, self._rank
        if peers is not None and rank is not None:
            peers.reconnect(lambda: self._connect(rank, meeting, timeout_s))

    def _load(self, rank: int, meeting: str, timeout_s: float) -> RankWorker:
        from engine.worker.worker import Worker

        config, model_config = self._config, self._model_config
        if not Path(model_config.folder).is_dir():
            model_config = ModelConfig.load(config)  # this node has its own copy
        group = self._connect(rank, meeting, timeout_s)
        if config.device == "cpu":
            group = self._peers = Peers(group)
        worker = Worker(config, model_config, rank, group)
        self._stage = "loading weights"
        worker.load(progress=rank == 0)
        return worker

    @on_thread(DEVICE)
    def allocate(self, capacity: CacheCapacity) -> None:
        """Make a cache of that size, for `run_loop`; it stays through a `rejoin`."""
        assert self._worker is not None, "load first"
        self._stage = "allocating the cache"
        bind_device(self._config.device, self._facts.gpu_ids)
        self._worker.allocate(capacity)
        self._capacity = capacity
        self._stage = "ready"

    @on_thread(DEVICE)
    def run_loop(self, ticket: Ticket | None) -> str:
        """Run plans until the link ends or a step fails; says why it ended. Raises OSError when no driver is there."""
        assert self._worker is not None and self._rank is not None, "load first"
        bind_device(self._config.device, self._facts.gpu_ids)
        link: RankLink
        if ticket is not None:
            link = SocketLink.open(ticket, self._rank)
        else:
            link = self._queue_link
        self._loop = RankLoop(
            self._worker,
            link,
            self._rank,
            bind=lambda: bind_device(self._config.device, self._facts.gpu_ids),
            peers=self._peers,
        )
        self._stage = "running"
        try:
            return self._loop.run()
        finally:
            self._stage = "idle"
            link.close()

    @on_thread(PLANS)
    def open_queue(self) -> None:
        """Begin a new link of actor calls; what an older one left behind is forgotten."""
        self._queue_link = QueueLink()

    @on_thread(PLANS)
    def push_plan(self, payload: bytes | None) -> None:
        """Queue a plan for the loop; see ActorChannel."""
        self._queue_link.push_plan(payload)

    @on_thread(ANSWERS)
    def take_answer(self) -> bytes | None:
        """The loop's next answer; see ActorChannel."""
        return self._queue_link.take_answer()

    @on_thread(DEVICE)
    def close(self) -> None:
        """Leave the group and let go of the memory."""
        if self._worker is not None:
            with contextlib.suppress(Exception):
                self._worker.close()
        self._worker = None


class DriverGuard:
    """Ends this process a while after its driver is gone: nobody else would, and it holds the memory of a device."""

    def __init__(self, driver: str, *, every_s: float = GUARD_EVERY_S, patience_s: float = ORPHAN_S) -> None:
        self.driver = driver
        """The name of its actor."""
        self._every_s, self._patience_s = every_s, patience_s
        threading.Thread(target=self._watch, name="manta-guard", daemon=True).start()

    def _watch(self) -> None:
        missing_s = 0.0
        while missing_s < self._patience_s:
            time.sleep(self._every_s)
            try:
                ray.get_actor(self.driver)
                missing_s = 0.0
            except ValueError:
                missing_s += self._every_s
            except Exception:
                logger.warning("the cluster does not say whether %s lives", self.driver, exc_info=True)
        logger.error("%s is gone for %g s: leaving", self.driver, missing_s)
        os._exit(1)


def purpose_of(config: EngineConfig, model_config: ModelConfig) -> str:
    """Equal for workers that can take each other's place."""
    return f"{config.model_dump_json()} {getattr(model_config, 'folder', '')}"


def environment(config: EngineConfig) -> dict[str, str]:
    """Environment variables of a rank's process."""
    path = [ROOT, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    out = {"PYTHONPATH": os.pathsep.join(dict.fromkeys(path)), "TOKENIZERS_PARALLELISM": "false"}
    if config.device == "cuda":
        # Each rank sees every GPU and takes its own; no NVLink multicast (see bind_device).
        out |= {
            "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
            "NCCL_NVLS_ENABLE": "0",
            "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
        }
    if "OMP_NUM_THREADS" not in os.environ:
        cores = (os.cpu_count() or 1) // (2 * config.tensor_parallel_size) if config.device == "cpu" else 4
        out["OMP_NUM_THREADS"] = str(max(1, cores))
    return out


def set_up_process(name: str) -> None:
    """Let threads take turns quickly, and log to stderr, which Ray shows under the actor's name.

    MANTA_LOG_LEVEL sets how much is logged.
    """
    faulthandler.enable()
    sys.setswitchinterval(0.001)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {name} %(message)s"))
    level = os.environ.get("MANTA_LOG_LEVEL", "INFO").upper()
    for package in ("cluster", "engine", "kernels"):
        logger = logging.getLogger(package)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False


def actor_class(worker_class: type[MantaWorker] = MantaWorker) -> Any:
    """MantaWorker, or a subclass, as a Ray actor class."""
    return ray.remote(concurrency_groups=CONCURRENCY_GROUPS)(worker_class)


def spare_class(worker_class: type[MantaWorker] = MantaWorker) -> Any:
    """The same for spares: another name, by which their processes are told apart."""
    return actor_class(type("MantaSpare", (worker_class,), {}))
