"""Hub: the listening end of framed sockets, for ranks and for clients; one thread, senders never block."""

from __future__ import annotations

import contextlib
import hmac
import logging
import os
import selectors
import shutil
import socket
import tempfile
import threading
import time
from collections import deque
from typing import Any, Protocol

import msgspec

from cluster.framing import (
    MAX_FRAME_BYTES,
    READ_BYTES,
    TOKEN_BYTES,
    FrameBuffer,
    FrameError,
    Ticket,
    frame,
    new_token,
    prepare,
)

logger = logging.getLogger(__name__)

HELLO_LIMIT_BYTES = 4096
HELLO_TIMEOUT_S = 5.0
MAX_STRANGERS = 64


class HubHandler(Protocol):
    """What a hub's owner does; every method runs on the hub's thread and must not block."""

    def joined(self, peer: Peer) -> None:
        """`peer` showed the token; `peer.hello` is what it said. Raising refuses it."""
        ...

    def received(self, peer: Peer, payload: bytes) -> None:
        """One frame of a joined peer. Raising drops the peer."""
        ...

    def gone(self, peer: Peer, reason: str) -> None:
        """Once for every joined peer, whoever closed."""
        ...


class Peer:
    """One connected socket. `send` may be called from any thread and never blocks."""

    def __init__(self, hub: Hub, sock: socket.socket) -> None:
        self.hello: Any = None
        self.key: Any = None
        """For the handler's own use."""
        self.joined = False
        self.since_s = time.monotonic()
        self.sock = sock
        self.buffer = FrameBuffer(HELLO_LIMIT_BYTES)
        self._hub = hub
        self._lock = threading.Lock()
        self._unsent: deque[memoryview] = deque()
        self._unsent_bytes = 0
        self._closing: str | None = None

    @property
    def unsent_bytes(self) -> int:
        """What was sent and waits for the peer to read."""
        return self._unsent_bytes

    @property
    def closing(self) -> str | None:
        """Why this side gave the peer up, if it did."""
        return self._closing

    def send(self, payload: bytes) -> bool:
        """Send or queue one frame; False when the peer is gone, or is dropped now because it reads too slowly."""
        with self._lock:
            if self._closing is not None:
                return False
            rest = memoryview(frame(payload))
            if not self._unsent:
                try:
                    rest = rest[self.sock.send(rest) :]
                except BlockingIOError:
                    pass
                except OSError as error:
                    self._give_up(f"send failed: {error}")
                    return False
                if not rest:
                    return True
            if self._unsent_bytes + len(rest) > self._hub.max_unsent_bytes:
                self._give_up(f"reads too slowly: {self._unsent_bytes + len(rest)} bytes wait for it")
                return False
            self._unsent.append(rest)
            self._unsent_bytes += len(rest)
        self._hub.wake()
        return True

    def flush(self) -> None:
        """Send what is queued, as far as it goes without blocking."""
        with self._lock:
            while self._unsent and self._closing is None:
                try:
                    sent = self.sock.send(self._unsent[0])
                except BlockingIOError:
                    return
                except OSError as error:
                    self._give_up(f"send failed: {error}")
                    return
                self._unsent_bytes -= sent
                self._unsent[0] = self._unsent[0][sent:]
                if not self._unsent[0]:
                    self._unsent.popleft()

    def close(self, reason: str = "closed") -> None:
        """Give the peer up; the hub's thread then tells the handler that it is gone."""
        with self._lock:
            if self._closing is None:
                self._give_up(reason)

    def _give_up(self, reason: str) -> None:
        self._closing = reason
        self._unsent.clear()
        self._unsent_bytes = 0
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)  # the hub's thread reads the end of the stream, and closes it
        self._hub.wake()


class Hub:
    """Accepts peers that know the token and hands their frames to `handler`.

    Unix sockets live in a private directory (0700) that `close` removes. A peer that leaves more than
    `max_unsent_bytes` unread is dropped: memory stays bounded and no sender ever waits.
    """

    def __init__(self, handler: HubHandler, *, name: str = "hub", max_unsent_bytes: int = 64 << 20) -> None:
        self.token = new_token()
        self.max_unsent_bytes = max_unsent_bytes
        self._handler = handler
        self._name = name
        self._selector = selectors.DefaultSelector()
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._selector.register(self._wake_out, selectors.EVENT_READ, None)
        self._listeners: list[socket.socket] = []
        self._folder: str | None = None
        self._peers: set[Peer] = set()
        self._stopping = False
        self._thread: threading.Thread | None = None

    def listen_unix(self) -> Ticket:
        """Listen on this node only."""
        self._folder = tempfile.mkdtemp(prefix="manta-")
        path = os.path.join(self._folder, "s")
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.bind(path)
        return self._listen(sock, f"unix:{path}")

    def listen_tcp(self, host: str) -> Ticket:
        """Listen on one address of this machine, on a port of the system's choice."""
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        sock.bind((host, 0))
        return self._listen(sock, f"tcp:{host}:{sock.getsockname()[1]}")

    def _listen(self, sock: socket.socket, address: str) -> Ticket:
        sock.listen(128)
        sock.setblocking(False)
        self._listeners.append(sock)
        self._selector.register(sock, selectors.EVENT_READ, sock)
        self.wake()
        return Ticket(address, self.token)

    def start(self) -> None:
        """Serve on a thread of its own, until `close`."""
        self._thread = threading.Thread(target=self._run, name=f"manta-{self._name}", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Have the hub's thread look at its sockets. From any thread; never blocks."""
        with contextlib.suppress(OSError):
            self._wake_in.send(b"\0")

    def close(self) -> None:
        """Drop every peer and stop listening. Idempotent; not from the hub's own thread."""
        if self._stopping:
            return
        self._stopping = True
        if self._thread is not None:
            self.wake()
            self._thread.join(10)
        else:
            self._clean_up()

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._serve_once()
        except Exception:
            logger.exception("%s: the socket thread failed", self._name)
        finally:
            self._clean_up()

    def _serve_once(self) -> None:
        strangers = [peer for peer in self._peers if not peer.joined]
        for selected, events in self._selector.select(HELLO_TIMEOUT_S if strangers else None):
            subject = selected.data
            if subject is None:
                with contextlib.suppress(OSError):
                    self._wake_out.recv(4096)
            elif isinstance(subject, Peer):
                if events & selectors.EVENT_WRITE:
                    subject.flush()
                if events & selectors.EVENT_READ:
                    self._read(subject)
            else:
                self._accept(subject)
        for peer in strangers:
            if not peer.joined and time.monotonic() - peer.since_s > HELLO_TIMEOUT_S:
                self._drop(peer, "no hello")
        for peer in list(self._peers):
            if peer.closing is not None:
                self._drop(peer, peer.closing)
            else:
                wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if peer.unsent_bytes else 0)
                if self._selector.get_key(peer.sock).events != wanted:
                    self._selector.modify(peer.sock, wanted, peer)

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError:
            return
        if sum(not peer.joined for peer in self._peers) >= MAX_STRANGERS:
            sock.close()
            return
        prepare(sock)
        sock.setblocking(False)
        peer = Peer(self, sock)
        self._peers.add(peer)
        self._selector.register(sock, selectors.EVENT_READ, peer)

    def _read(self, peer: Peer) -> None:
        try:
            data = peer.sock.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._drop(peer, str(error))
            return
        if not data:
            self._drop(peer, peer.closing or "end of stream")
            return
        try:
            peer.buffer.feed(data)
            while peer in self._peers and (payload := peer.buffer.take()) is not None:
                if peer.joined:
                    self._handler.received(peer, payload)
                else:
                    self._admit(peer, payload)
        except FrameError as error:
            self._drop(peer, str(error))
        except Exception as error:
            logger.exception("%s: a message could not be handled", self._name)
            self._drop(peer, f"message refused: {error}")

    def _admit(self, peer: Peer, hello: bytes) -> None:
        if not hmac.compare_digest(hello[:TOKEN_BYTES], self.token):
            raise FrameError("wrong token")
        peer.hello = msgspec.msgpack.decode(hello[TOKEN_BYTES:])
        peer.buffer.limit_bytes = MAX_FRAME_BYTES
        self._handler.joined(peer)
        peer.joined = True

    def _drop(self, peer: Peer, reason: str) -> None:
        if peer not in self._peers:
            return
        self._peers.discard(peer)
        peer.close(reason)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(peer.sock)
        peer.sock.close()
        if peer.joined:
            try:
                self._handler.gone(peer, reason)
            except Exception:
                logger.exception("%s: the end of a peer could not be handled", self._name)
        else:
            logger.warning("%s: a connection was refused: %s", self._name, reason)

    def _clean_up(self) -> None:
        for peer in list(self._peers):
            self._drop(peer, "closed")
        for sock in self._listeners:
            sock.close()
        self._selector.close()
        self._wake_in.close()
        self._wake_out.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
