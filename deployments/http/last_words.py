"""LastWords: what the clients of running streams are told when this process dies.

A killed process sends nothing, and a proxy in front of it can only cut its streams. So a second process holds each
stream's connection open and knows the event to end it with; see keeper.py. A stream costs two messages to it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from starlette.types import Receive, Scope

from deployments.http.keeper import LEAVE, TAKE_BACK

logger = logging.getLogger("ray.serve")

KEEPER = Path(__file__).with_name("keeper.py")


class LastWords:
    """The replica's end of the socket to its keeper. All methods but `start` belong to one event loop."""

    def __init__(self, link: socket.socket) -> None:
        """Use `start`."""
        self._link: socket.socket | None = link
        self._numbers = itertools.count(1)
        self._left: set[int] = set()
        self._unsent: deque[bytes] = deque()
        self._waits = False
        """The loop calls `_flush` when the link takes more."""

    @classmethod
    def start(cls) -> Self | None:
        """Start the keeper and wait until it has left this process's family: a few hundredths of a second.

        None, and a line in the log, where no process can be started.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                subprocess.run(
                    [sys.executable, "-I", "-S", str(KEEPER), str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                    cwd="/",
                    check=True,
                )
        except (OSError, subprocess.SubprocessError) as error:
            ours.close()
            logger.warning("no keeper of last words (%s): should this process die, its streams are cut", error)
            return None
        ours.setblocking(False)
        return cls(ours)

    def leave(self, connection: int, words: bytes) -> int:
        """Have `words`, as bytes of HTTP, end the connection of that file descriptor should this process die.

        Returns a number for `take_back`; 0 when the keeper cannot take it now, and then the stream goes without.
        """
        if self._link is None or self._unsent:
            return 0
        number = next(self._numbers)
        try:
            socket.send_fds(self._link, [LEAVE + number.to_bytes(8) + words], [connection])
        except OSError as error:
            self._failed(error)
            return 0
        self._left.add(number)
        return number

    def take_back(self, number: int) -> None:
        """The stream is over: idempotent. Until then the keeper's copy holds its connection open."""
        if number in self._left and self._link is not None:
            self._left.discard(number)
            self._unsent.append(TAKE_BACK + number.to_bytes(8))
            if not self._waits:
                self._flush()

    def close(self) -> None:
        """Let the keeper go, which ends what was left to it. Idempotent."""
        if self._link is not None:
            if self._waits:
                asyncio.get_running_loop().remove_writer(self._link)
            self._link.close()
            self._link = None

    def _flush(self) -> None:
        """Send what waits; what does not fit now, when there is room."""
        while self._unsent and self._link is not None:
            try:
                self._link.send(self._unsent[0])
            except OSError as error:
                self._failed(error)
                break
            self._unsent.popleft()
        if self._link is not None and self._waits != bool(self._unsent):
            loop = asyncio.get_running_loop()
            if self._unsent:
                loop.add_writer(self._link, self._flush)
            else:
                loop.remove_writer(self._link)
            self._waits = bool(self._unsent)

    def _failed(self, error: OSError) -> None:
        if isinstance(error, BrokenPipeError | ConnectionError):
            logger.warning("the keeper of last words is gone (%s): streams end without one", error)
            self.close()


def leave_words(scope: Scope, receive: Receive, event: bytes) -> Callable[[], None]:
    """Have `event` end the stream that answers this request should this process die; the result takes it back.

    Take it back before the response is whole. Without a keeper, or a connection to write on, nothing is done.
    """
    last_words: LastWords | None = getattr(scope["app"].state, "last_words", None)
    connection = connection_of(receive) if last_words is not None else None
    if last_words is None or connection is None:
        return lambda: None
    number = last_words.leave(connection, last_chunks(event))
    return lambda: last_words.take_back(number)


def connection_of(receive: Any) -> int | None:
    """The file descriptor of the connection that a request came on; None where there is none to write on.

    uvicorn's `receive` is a method of the object that has the transport, and Serve's holds that one (seen in 2.60).
    """
    while not hasattr(receive, "__self__"):
        receive = getattr(receive, "_receive", None)
        if receive is None:
            return None
    transport = getattr(receive.__self__, "transport", None)
    if transport is None or transport.is_closing() or transport.get_extra_info("sslcontext") is not None:
        return None
    connection = transport.get_extra_info("socket")
    return None if connection is None else int(connection.fileno())


def last_chunks(body: bytes) -> bytes:
    """`body` as the last chunk of a chunked response, and its end."""
    return b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
