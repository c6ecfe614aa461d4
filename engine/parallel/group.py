"""connect: put a rank in touch with the others of its engine."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch._C._distributed_c10d import Store

from engine.errors import ExecutorDied
from engine.parallel.communicator import Communicator, Gloo, Solo
from engine.parallel.meeting import meet

logger = logging.getLogger(__name__)


def connect(rank: int, size: int, address: str, device: str, timeout_s: float = 60.0) -> Communicator:
    """Join the group of `size` ranks that meet at `address` ("host:port", served by rank 0).

    Blocks until all have come. `device` ("cpu" or "cuda") decides what carries the tensors; a GPU rank's device is the
    current one of the calling thread. Raises ExecutorDied when they do not meet within timeout_s.
    """
    assert 0 <= rank < size
    if size == 1:
        return Solo()
    if device == "cpu":
        return Gloo(rank, size, address, timeout_s)
    return _connect_gpus(rank, size, address, timeout_s)


def _connect_gpus(rank: int, size: int, address: str, timeout_s: float) -> Communicator:
    """NCCL, with peer memory for small messages where every rank is on one host and can map it."""
    from engine.parallel.nccl import Nccl
    from engine.parallel.peer_memory import PeerMemory, forced_method

    method = forced_method()
    try:
        store = meet(rank, size, address, timeout_s)
        nccl = Nccl(rank, size, store, torch.device("cuda", torch.cuda.current_device()), timeout_s)
    except (RuntimeError, OSError, ValueError) as error:
        raise ExecutorDied(
            f"rank {rank} of {size} did not meet the others at {address} within {timeout_s:g} s: {error}",
            ranks=(rank,),
        ) from error
    if method == "nccl" or not _one_host(rank, size, store):
        return nccl
    try:
        return PeerMemory(nccl, store, method)
    except RuntimeError as error:
        if method is not None:
            raise
        logger.warning("rank %d: no peer memory, all-reduces go through NCCL: %s", rank, error)
        return nccl


def _one_host(rank: int, size: int, store: Store) -> bool:
    """Whether all ranks run on one host and number its GPUs alike: peer memory tells devices apart by their index."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    host = boot.read_text().strip() if boot.exists() else f"rank {rank}"
    store.set(f"host/{rank}", f"{host} {torch.cuda.current_device()}")
    places = [store.get(f"host/{other}").decode().rsplit(" ", 1) for other in range(size)]
    hosts, devices = zip(*places, strict=True)
    return len(set(hosts)) == 1 and len(set(devices)) == size
