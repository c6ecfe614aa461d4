"""What `scripts.chaos` does to a served model, by name: from outside, with signals, ptrace and requests."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import json
import os
import random
import re
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import ray
from ray import serve
from ray.util import list_named_actors

from deployments.app import build
from scripts.chaos_site import REPOSITORY, Site

SYS_PIDFD_GETFD = 438
FLOOD_REQUESTS = 400
FLOOD_TOKENS = 4
FLOOD_ANSWER_S = 120.0
SAMPLE_S = 0.5
ANSWER_S = 5.0
DRIVER_NAME = re.compile(r"^manta:.*:driver(\.\d+)?$")
HELD_S = 60.0
"""A rank that hangs longer has not been noticed."""


@dataclass
class Flood:
    """What became of a flood's requests."""

    accepted: int = 0
    refused: int = 0
    """429 with Retry-After."""
    wrong: int = 0
    """Anything else."""


class Faults:
    """The faults, by name."""

    def __init__(self, site: Site, seed: int, names: list[str]) -> None:
        """`names` are those to choose from, of FAULTS."""
        self.site, self.rng = site, random.Random(seed)
        self.flood_total = Flood()
        self._num_rolls = 0
        self._names = names

    def names(self) -> list[str]:
        """One round of all of them, in a seeded order."""
        return self.rng.sample(self._names, len(self._names))

    async def inject(self, name: str) -> None:
        await FAULTS[name](self)

    async def kill_rank(self) -> None:
        self.rng.choice(await ranks()).kill()

    async def stop_rank(self) -> None:
        self.rng.choice(await ranks()).send_signal(signal.SIGSTOP)

    async def kill_two(self) -> None:
        for process in self.rng.sample(await ranks(), 2):
            process.kill()

    async def kill_again(self) -> None:
        await self.kill_rank()
        await asyncio.sleep(self.rng.uniform(0.5, 2.0))
        for process in (await ranks())[:1]:
            process.kill()

    async def cut_ranks(self) -> None:
        """Cut the connections between two ranks: the collective of the step that runs raises."""
        while not cut_between(await ranks()):
            await asyncio.sleep(0.1)

    async def hang_rank(self) -> None:
        """Hold the thread that computes, and nothing else, until the rank is replaced."""
        rank = self.rng.choice(await ranks())
        thread = await busiest_thread(rank.pid)
        command = [sys.executable, "-m", "scripts.chaos_hold", str(thread)]
        holder = await asyncio.create_subprocess_exec(*command, cwd=REPOSITORY, stdout=asyncio.subprocess.PIPE)
        assert holder.stdout is not None
        assert await holder.stdout.readline() == b"held\n"
        try:
            async with asyncio.timeout(HELD_S):
                await holder.wait()
        except TimeoutError:
            holder.kill()  # and the rank goes on

    async def kill_driver(self) -> None:
        self.rng.choice(self.site.processes("driver")).kill()

    async def kill_replica(self) -> None:
        self.rng.choice(self.site.processes("replica")).kill()

    async def flood(self) -> None:
        """One tenant asks more at once than may wait: it is refused, at once and with when to come back."""
        body = json.dumps({"prompt": "a", "max_tokens": FLOOD_TOKENS, "ignore_eos": True}).encode()
        host = self.site.url.removeprefix("http://")
        head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\nx-manta-tenant: flood\r\nconnection: close\r\n"
        request = f"{head}content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body
        total = self.flood_total
        drivers = self.site.processes("driver")
        for driver in drivers:
            driver.suspend()  # a quick one might keep up with the flood
        asked = [asyncio.ensure_future(_answer(host, request)) for _ in range(FLOOD_REQUESTS)]
        await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)  # refused: nobody else is answered
        for driver in drivers:
            driver.resume()
        for answer in await asyncio.gather(*asked):
            accepted = b" 200 " in answer[:20]
            refused = b" 429 " in answer[:20] and b"\r\nretry-after:" in answer.lower()
            total.accepted += accepted
            total.refused += refused
            total.wrong += not accepted and not refused

    async def roll(self) -> None:
        """Deploy the application again, with a change that needs new replicas."""
        self._num_rolls += 1
        changed = build({**self.site.args, "max_waiting_requests": 1024 + self._num_rolls})
        await asyncio.to_thread(serve.run, changed, name=self.site.application, route_prefix="/")


FAULTS: dict[str, Callable[[Faults], Awaitable[None]]] = {
    "rank killed": Faults.kill_rank,
    "driver killed": Faults.kill_driver,
    "rank stopped": Faults.stop_rank,
    "two ranks killed at once": Faults.kill_two,
    "rank killed again during the recovery": Faults.kill_again,
    "rank raising in a step": Faults.cut_ranks,
    "rank hung in a step": Faults.hang_rank,
    "flood": Faults.flood,
    "replica killed": Faults.kill_replica,
    "configuration rolled": Faults.roll,
}
NO_FAULT, OF_SEVERAL = "configuration rolled", "replica killed"
"""What should harm nobody, and what harms only where there are other replicas."""


async def _answer(host: str, request: bytes) -> bytes:
    """All that comes back on a connection of its own; empty when nothing does.

    By hand: a client that queues hundreds of requests at once (httpx: 7 s for 400) would hold up the streams beside it.
    """
    try:
        async with asyncio.timeout(FLOOD_ANSWER_S):
            reader, writer = await asyncio.open_connection(*host.split(":"))
            with contextlib.closing(writer):
                writer.write(request)
                return await reader.read()
    except OSError:  # TimeoutError is one
        return b""


async def ranks() -> list[psutil.Process]:
    """The live ranks of every engine, as their drivers know them: a spare that became one does not look like it."""
    return await asyncio.to_thread(_ranks)


def _ranks() -> list[psutil.Process]:
    found = []
    for named in list_named_actors(all_namespaces=True):
        if not DRIVER_NAME.search(named["name"]):
            continue
        with contextlib.suppress(Exception):  # it is ending, or starting
            driver = ray.get_actor(named["name"], named["namespace"])
            for facts in ray.get(driver.rank_facts.remote(), timeout=ANSWER_S):
                with contextlib.suppress(psutil.Error):
                    found.append(psutil.Process(facts.pid))
    return found


def cut_between(processes: list[psutil.Process]) -> int:
    """Shut down the TCP connections that two of these processes have with each other; how many ends there were."""
    ends: dict[tuple[object, object], tuple[int, int]] = {}
    for process in processes:
        for connection in process.net_connections("tcp"):
            if connection.status == psutil.CONN_ESTABLISHED:
                ends[connection.laddr, connection.raddr] = (process.pid, connection.fd)
    shared = [end for (here, there), end in ends.items() if (there, here) in ends]
    with contextlib.ExitStack() as held:
        # All are taken before one is cut: at the first cut the ranks close the others.
        connections = [held.enter_context(found) for pid, fd in shared if (found := borrowed(pid, fd)) is not None]
        for connection in connections:
            with contextlib.suppress(OSError):  # its process has ended it just now
                connection.shutdown(socket.SHUT_RDWR)
    return len(connections)


def borrowed(pid: int, fd: int) -> socket.socket | None:
    """A socket of another process as one of ours; None when it is closed by now. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    try:
        copy = libc.syscall(SYS_PIDFD_GETFD, process, fd, 0)
    finally:
        os.close(process)
    if copy < 0 and ctypes.get_errno() in (errno.EBADF, errno.ESRCH):
        return None
    if copy < 0:
        raise OSError(ctypes.get_errno(), f"descriptor {fd} of process {pid} cannot be had")
    return socket.socket(fileno=copy)


async def busiest_thread(pid: int) -> int:
    """The thread of a process that computes most, by half a second's measure."""
    before = _ticks(pid)
    await asyncio.sleep(SAMPLE_S)
    after = _ticks(pid)
    return max(after, key=lambda thread: after[thread] - before.get(thread, 0))


def _ticks(pid: int) -> dict[int, int]:
    """Processor time of each thread, in clock ticks."""
    used = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        fields = (task / "stat").read_text().rpartition(")")[2].split()
        used[int(task.name)] = int(fields[11]) + int(fields[12])
    return used
