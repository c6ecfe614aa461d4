"""meet: the store through which the ranks of a group find each other."""

from __future__ import annotations

import socket
import time
from datetime import timedelta

from torch._C._distributed_c10d import TCPStore

_RETRY_S = 0.01


def meet(rank: int, size: int, address: str, timeout_s: float) -> TCPStore:
    """Join the store at `address` ("host:port"), which rank 0 serves; the others wait until it does.

    torch's own client pauses for most of a second when it comes before the server; here nobody asks it to.
    Raises OSError, RuntimeError or ValueError when there is no store there within timeout_s.
    """
    host, _, port_digits = address.rpartition(":")
    port = int(port_digits)
    timeout = timedelta(seconds=timeout_s)
    if rank > 0:
        _await_server(host, port, timeout_s)
        return TCPStore(host, port, size, is_master=False, timeout=timeout, wait_for_workers=False)
    with socket.create_server(("", port), backlog=max(128, size)) as server:
        listening = server.detach()  # the store closes it
    return TCPStore(
        host, port, size, is_master=True, timeout=timeout, wait_for_workers=False, master_listen_fd=listening
    )


def address_towards(address: str) -> str:
    """This machine's own address on the way to `address`."""
    host, _, port = address.rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing
        probe.connect((host, int(port)))
        own: str = probe.getsockname()[0]
        return own


def _await_server(host: str, port: int, timeout_s: float) -> None:
    """Return once something listens there. Raises OSError after timeout_s."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            with socket.create_connection((host, port), timeout=timeout_s) as probe:
                if probe.getsockname() != probe.getpeername():  # a free port can answer itself
                    return
        except OSError:
            if time.monotonic() >= deadline_s:
                raise
        time.sleep(_RETRY_S)
