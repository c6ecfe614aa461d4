"""WorkerActor: one rank in its own process; a thin actor over engine.worker.worker.Worker."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec
import ray

from cluster.framing import Ticket
from cluster.peers import Peers
from cluster.rank_loop import Progress, RankLoop, StepWorker
from cluster.step_channel import QueueLink, RankLink, SocketLink
from engine.config import EngineConfig
from engine.executor import CacheCapacity
from engine.model_config import ModelConfig

logger = logging.getLogger(__name__)

ROOT = str(Path(__file__).resolve().parent.parent)

DEVICE = "device"  # one thread: everything that touches the device, in order; `run_loop` holds it while it runs
PLANS = "plans"  # one thread: step plans by actor calls instead of a socket
ANSWERS = "answers"
CONCURRENCY_GROUPS = {DEVICE: 1, PLANS: 1, ANSWERS: 1}

Method = TypeVar("Method", bound=Callable[..., Any])


def on_thread(group: str) -> Callable[[Method], Method]:
    """Run a method of the actor in one of its concurrency groups."""
    decorate: Callable[[Method], Method] = ray.method(concurrency_group=group)
    return decorate


class RankWorker(StepWorker, Protocol):
    """What the actor needs of engine.worker.worker.Worker."""

    def measure(self) -> CacheCapacity: ...

    def allocate(self, capacity: CacheCapacity) -> None: ...

    def close(self) -> None: ...


class RankFacts(msgspec.Struct, frozen=True):
    """Where a rank is."""

    pid: int
    node_id: str
    node_ip: str


class MantaWorker:
    """Holds one rank. Control calls (default group) answer while the loop runs."""

    def __init__(self, name: str, config: EngineConfig, model_config: ModelConfig, rank: int) -> None:
        self._name, self._rank = name, rank
        self._config, self._model_config = config, model_config
        self._worker: RankWorker | None = None
        self._loop: RankLoop | None = None
        self._peers: Peers | None = None
        self._queue_link = QueueLink()
        self._stage = "started"
        set_up_process(name)

    def __repr__(self) -> str:
        return self._name

    def facts(self) -> RankFacts:
        context = ray.get_runtime_context()
        return RankFacts(os.getpid(), context.get_node_id(), ray.util.get_node_ip_address())

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
        config = self._config
        bind_device(config)
        self._stage = "importing"
        self._worker = self._load(meeting, timeout_s)
        self._stage = "measuring memory"
        return self._worker.measure()

    @on_thread(DEVICE)
    def rejoin(self, meeting: str, timeout_s: float) -> None:
        """Meet the other ranks again, some of them new; this rank's weights and cache stay."""
        from engine.parallel.group import connect

        config = self._config
        self._stage = "meeting the other ranks"
        if self._peers is not None:
            self._peers.reconnect(
                lambda: connect(self._rank, config.tensor_parallel_size, meeting, config.device, timeout_s)
            )

    def _load(self, meeting: str, timeout_s: float) -> RankWorker:
        from engine.parallel.communicator import Communicator
        from engine.parallel.group import connect
        from engine.worker.worker import Worker

        config, model_config = self._config, self._model_config
        if not Path(model_config.folder).is_dir():
            model_config = ModelConfig.load(config)  # this node has its own copy
        self._stage = "meeting the other ranks"
        group: Communicator = connect(self._rank, config.tensor_parallel_size, meeting, config.device, timeout_s)
        if config.device == "cpu":
            group = self._peers = Peers(group)
        worker = Worker(config, model_config, self._rank, group)
        self._stage = "loading weights"
        worker.load(progress=self._rank == 0)
        return worker

    @on_thread(DEVICE)
    def allocate(self, capacity: CacheCapacity) -> None:
        assert self._worker is not None, "load first"
        self._stage = "allocating the cache"
        bind_device(self._config)
        self._worker.allocate(capacity)
        self._stage = "ready"

    @on_thread(DEVICE)
    def run_loop(self, ticket: Ticket | None) -> str:
        """Run plans until the link ends; says why it did. A failed step raises its error."""
        assert self._worker is not None, "load first"
        bind_device(self._config)
        link: RankLink
        if ticket is not None:
            link = SocketLink.open(ticket, self._rank)
        else:
            link = self._queue_link
        self._loop = RankLoop(self._worker, link, self._rank, bind=lambda: bind_device(self._config), peers=self._peers)
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
        self._queue_link.push_plan(payload)

    @on_thread(ANSWERS)
    def take_answer(self) -> bytes | None:
        return self._queue_link.take_answer()

    @on_thread(DEVICE)
    def close(self) -> None:
        """Leave the group and let go of the memory."""
        if self._worker is not None:
            with contextlib.suppress(Exception):
                self._worker.close()
        self._worker = None


def bind_device(config: EngineConfig) -> None:
    """Make this rank's GPU the current device of the calling thread; nothing on a CPU.

    Every process sees all GPUs of its node (peer memory needs that); Ray says which one is this rank's.
    """
    if config.device != "cuda":
        return
    import torch

    torch.cuda.set_device(device_index([str(i) for i in ray.get_gpu_ids()], os.environ.get("CUDA_VISIBLE_DEVICES")))


def device_index(assigned: list[str], visible: str | None) -> int:
    """The CUDA index of the GPU Ray assigned, among those the process sees."""
    assert len(assigned) == 1, f"one GPU a rank, not {assigned}"
    if visible is None or assigned[0] not in visible.split(","):
        return int(assigned[0])
    return visible.split(",").index(assigned[0])


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
