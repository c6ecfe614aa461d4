"""connect: put a rank in touch with the others of its engine."""

from __future__ import annotations

from engine.parallel.communicator import Communicator, Gloo, Solo


def connect(rank: int, size: int, address: str, device: str, timeout_s: float = 60.0) -> Communicator:
    """Join the group of `size` ranks that meet at `address` ("host:port", served by rank 0).

    Blocks until all have come. `device` ("cpu") decides what carries the tensors. Raises ExecutorDied when they do not
    meet within timeout_s.
    """
    assert 0 <= rank < size
    if size == 1:
        return Solo()
    if device == "cpu":
        return Gloo(rank, size, address, timeout_s)
    raise ValueError(f"no communicator for {size} ranks on {device!r}")
