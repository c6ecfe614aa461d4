"""What the kernel knows of processes and threads of this node."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from pathlib import Path

logger = logging.getLogger(__name__)


def end_process(pid: int, patience_s: float) -> None:
    """Wait for a Ray worker process of this node to end, and kill it when it does not (a stopped one never would)."""
    deadline_s = time.monotonic() + patience_s
    killed = False
    while is_ray_worker(pid):
        if time.monotonic() > deadline_s:
            if killed:
                logger.warning("process %d does not end", pid)
                return
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            killed, deadline_s = True, deadline_s + 5
        time.sleep(0.005)


def is_ray_worker(pid: int) -> bool:
    """Whether `pid` is a live process that Ray started; a process id may have been given to another."""
    try:
        return b"ray::" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def process_state(pid: int, thread: int | None = None) -> str:
    """One letter, of a process or of one of its threads; empty when there is none.

    R running or waiting for a core, S sleeping, D waiting for a disk, T stopped, Z dead and not yet reaped.
    """
    path = f"/proc/{pid}/stat" if thread is None else f"/proc/{pid}/task/{thread}/stat"
    try:
        return Path(path).read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def has_children(pid: int) -> bool:
    """Whether a process has child processes: compilers, say."""
    try:
        return any(path.read_text().strip() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    except OSError:
        return False
