"""Hold one thread of another process still until that process is gone: `python -m scripts.chaos_hold THREAD_ID`.

The process lives and its other threads run: so a rank looks that hangs in a collective. Prints "held" when it is.
"""

from __future__ import annotations

import ctypes
import os
import sys

PTRACE_SEIZE, PTRACE_INTERRUPT = 0x4206, 0x4207
WAIT_FOR_THREADS = 0x40000000
"""__WALL: wait for threads of other processes, too."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long] * 4
_libc.ptrace.restype = ctypes.c_long


def hold(thread_id: int) -> None:
    """Stop the thread and return when it has ended. Raises OSError where this is not permitted."""
    for request in (PTRACE_SEIZE, PTRACE_INTERRUPT):
        if _libc.ptrace(request, thread_id, 0, 0) < 0:
            raise OSError(ctypes.get_errno(), f"thread {thread_id} cannot be held: {os.strerror(ctypes.get_errno())}")
    print("held", flush=True)
    while True:
        _, status = os.waitpid(thread_id, WAIT_FOR_THREADS)
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            return


if __name__ == "__main__":
    hold(int(sys.argv[1]))
