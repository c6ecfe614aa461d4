"""StepChannel: how step plans reach the ranks and how answers come back. Sockets, or plain actor calls.

Measured on a 2-core machine (see scripts.bench): a socket takes tens of microseconds a step, an actor call about a
millisecond; both keep several steps in flight. Compiled graphs are not used: a compiled rank spins a whole core.
"""

from __future__ import annotations

import logging
import queue
import threading
from typing import Any, Protocol

import msgspec
import ray

from cluster.framing import Connection, Ticket, dial
from cluster.hub import Hub, Peer

logger = logging.getLogger(__name__)


class ChannelHandler(Protocol):
    """Who hears from the ranks; every method runs on the channel's thread and must not block."""

    def received(self, rank: int, payload: bytes) -> None:
        """One answer of a rank, in the order in which it gave them."""
        ...

    def lost(self, rank: int, reason: str) -> None:
        """Once for a rank whose end is gone, unless the channel itself was closed."""
        ...


class StepChannel(Protocol):
    """The driver's end, to all ranks."""

    def tickets(self, node_ids: list[str]) -> list[Ticket | None]:
        """For each rank what `SocketLink.open` needs on its node; None: the rank gets its plans by actor calls."""
        ...

    def wait_ready(self, timeout_s: float) -> bool:
        """Whether every rank's end is connected, within the time."""
        ...

    def send(self, payload: bytes) -> None:
        """Queue one payload for every rank, in order; never blocks. A lost rank is told to the handler."""
        ...

    def close(self) -> None:
        """End the channel; the ranks' ends read None. Idempotent."""
        ...


class RankLink(Protocol):
    """A rank's end."""

    def receive(self, timeout_s: float | None = None) -> bytes | None:
        """The next payload; None when the channel is closed or the driver is gone. Blocks.

        Raises TimeoutError when none came for timeout_s.
        """
        ...

    def send(self, payload: bytes) -> None:
        """Answer the driver. Raises OSError when it is gone."""
        ...

    def close(self) -> None:
        """End the link; `receive` gives None. Idempotent."""
        ...


class SocketChannel:
    """Unix sockets to ranks on this node, TCP to others; the loss of a rank shows within milliseconds as EOF."""

    def __init__(self, size: int, handler: ChannelHandler, *, node_id: str = "", node_ip: str = "127.0.0.1") -> None:
        self._size, self._handler = size, handler
        self._node_id, self._node_ip = node_id, node_ip
        self._peers: list[Peer | None] = [None] * size
        self._ready = threading.Event()
        self._closed = False
        self._hub = Hub(self, name="steps", max_unsent_bytes=1 << 30)

    def tickets(self, node_ids: list[str]) -> list[Ticket | None]:
        here = self._hub.listen_unix()
        away = self._hub.listen_tcp(self._node_ip) if any(n != self._node_id for n in node_ids) else here
        self._hub.start()
        return [here if node_id == self._node_id else away for node_id in node_ids]

    def wait_ready(self, timeout_s: float) -> bool:
        return self._ready.wait(timeout_s)

    def send(self, payload: bytes) -> None:
        for peer in self._peers:
            assert peer is not None, "not every rank is connected"
            peer.send(payload)

    def close(self) -> None:
        self._closed = True
        self._hub.close()

    def joined(self, peer: Peer) -> None:
        rank = int(peer.hello)
        if not 0 <= rank < self._size or self._peers[rank] is not None:
            raise ValueError(f"rank {rank} is not awaited")
        peer.key = rank
        self._peers[rank] = peer
        if all(self._peers):
            self._ready.set()

    def received(self, peer: Peer, payload: bytes) -> None:
        self._handler.received(peer.key, payload)

    def gone(self, peer: Peer, reason: str) -> None:
        if not self._closed:
            self._handler.lost(peer.key, reason)


class SocketLink(Connection):
    """A rank's end of a SocketChannel."""

    @classmethod
    def open(cls, ticket: Ticket, rank: int) -> SocketLink:
        """Connect to the driver as that rank. Raises OSError."""
        return cls(dial(ticket, rank))


class ActorChannel:
    """Plain actor calls: `push_plan(payload)` hands a rank its plan, `take_answer()` waits for what it says.

    The actors must run `push_plan` calls in the order they were made (one thread) and `take_answer` beside them.
    """

    def __init__(self, actors: list[Any], handler: ChannelHandler) -> None:
        self._actors, self._handler = actors, handler
        self._closed = False
        self._thread = threading.Thread(target=self._read, name="manta-steps", daemon=True)

    def tickets(self, node_ids: list[str]) -> list[Ticket | None]:
        ray.get([actor.open_queue.remote() for actor in self._actors])
        self._thread.start()
        return [None] * len(node_ids)

    def wait_ready(self, timeout_s: float) -> bool:  # noqa: ARG002
        return True  # calls made early wait in the actor's queue

    def send(self, payload: bytes) -> None:
        for actor in self._actors:
            actor.push_plan.remote(payload)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for actor in self._actors:
            actor.push_plan.remote(None)
        self._thread.join(2)

    def _read(self) -> None:
        waits = {actor.take_answer.remote(): rank for rank, actor in enumerate(self._actors)}
        while waits and not self._closed:
            ready, _ = ray.wait(list(waits), num_returns=1, timeout=0.5)
            for ref in ready:
                rank = waits.pop(ref)
                try:
                    payload = ray.get(ref)
                except Exception as error:
                    if not self._closed:
                        self._handler.lost(rank, f"{type(error).__name__}: {error}")
                    continue
                if payload is not None:
                    waits[self._actors[rank].take_answer.remote()] = rank
                    self._handler.received(rank, payload)


class QueueLink:
    """A rank's end of an ActorChannel: two queues between its loop and its actor's methods."""

    def __init__(self) -> None:
        self._plans: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def push_plan(self, payload: bytes | None) -> None:
        """The driver's call; None ends the link."""
        self._plans.put(payload)

    def take_answer(self) -> bytes | None:
        """The driver's call; blocks. None when the link is closed."""
        return self._answers.get()

    def receive(self, timeout_s: float | None = None) -> bytes | None:
        try:
            return self._plans.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError from None

    def send(self, payload: bytes) -> None:
        self._answers.put(payload)

    def close(self) -> None:
        self._plans.put(None)
        self._answers.put(None)


class RankFault(msgspec.Struct):
    """A rank's last word: what went wrong in its loop."""

    step: int
    error: str
    trace: str
    peer: bool = False
    """The fault lies with another rank: a collective failed."""
