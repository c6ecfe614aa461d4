"""Inbox: what the engine's loop is told, by any thread, and how it sleeps until there is something to do."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import msgspec

from cluster.messages import Abort, Submit

Client = Hashable


class ClientGone(msgspec.Struct):
    """A client left: everything it has running is aborted."""


class Call(msgspec.Struct):
    """Run a function on the loop's thread, between two steps."""

    function: Callable[[], None]


Message = Submit | Abort | ClientGone | Call


class Inbox:
    """Messages in their order, and one sleeper. Only `take`, `wait` and `pause` are the loop's own."""

    def __init__(self) -> None:
        self._messages: deque[tuple[Any, Message]] = deque()
        self._wake = threading.Condition()
        self._awake = False
        self.closed = False

    def post(self, client: Client, message: Message) -> None:
        """Queue a message of `client`, and wake who waits."""
        self._messages.append((client, message))
        self.wake()

    def wake(self) -> None:
        """Let `wait` end, this or the next: something happened."""
        with self._wake:
            self._awake = True
            self._wake.notify()

    def close(self) -> None:
        """End every wait and pause, and those to come."""
        self.closed = True
        self.wake()

    def take(self) -> Iterator[tuple[Any, Message]]:
        """Messages with their clients, those too that come meanwhile."""
        while self._messages:
            yield self._messages.popleft()

    def wait(self, timeout_s: float) -> None:
        """Sleep until something happens that was not known at the last wait's end, or for so long."""
        with self._wake:
            if not self._awake and not self.closed:
                self._wake.wait(timeout_s)
            self._awake = False

    def pause(self, seconds: float) -> bool:
        """Sleep so long, whatever happens. True, and at once, when the inbox is closed."""
        until_s = time.monotonic() + seconds
        with self._wake:
            while not self.closed and (left_s := until_s - time.monotonic()) > 0:
                self._wake.wait(left_s)
        return self.closed
