"""The process beside a replica that speaks when the replica cannot: run by last_words.py, standard library only.

It holds the connections of the streams that run, and what to write on each. When the socket to the replica ends, the
replica is dead: every client is told, and this process ends too.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import sys

MAX_MESSAGE_BYTES = 64 << 10
LEAVE, TAKE_BACK = b"+", b"-"
"""The first byte of a message; then a number of 8 bytes, and of LEAVE the words, with the connection beside them."""


def keep(link: socket.socket) -> dict[int, tuple[int, bytes]]:
    """Follow the replica until it dies; what it left then: connections and the words for each, by number."""
    held: dict[int, tuple[int, bytes]] = {}
    while True:
        try:
            message, fds, _, _ = socket.recv_fds(link, MAX_MESSAGE_BYTES, 1)
        except ConnectionResetError:
            return held
        if not message:
            return held
        number = int.from_bytes(message[1:9])
        if message[:1] == LEAVE and fds:
            held[number] = (fds[0], message[9:])
        elif message[:1] == TAKE_BACK and number in held:
            os.close(held.pop(number)[0])


def speak(connection: int, words: bytes) -> None:
    """Write the words and end the connection. A client that does not read gets a cut connection instead."""
    with socket.socket(fileno=connection) as ours, contextlib.suppress(OSError):
        ours.setblocking(False)
        ours.send(words)
        ours.shutdown(socket.SHUT_WR)


def main(link_fd: int) -> None:
    if os.fork():
        os._exit(0)  # the rest is no child of the replica: Ray ends those together with it
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    for connection, words in keep(socket.socket(fileno=link_fd)).values():
        speak(connection, words)


if __name__ == "__main__":
    main(int(sys.argv[1]))
