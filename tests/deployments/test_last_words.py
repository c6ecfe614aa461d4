"""Last words: a process that is killed in the middle of its streams, and what their clients see."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from deployments.config import REPOSITORY
from deployments.http.keeper import LEAVE, TAKE_BACK, keep, speak
from deployments.http.last_words import KEEPER, connection_of, last_chunks

MARK = "MANTA_TEST_MARK"
PROGRAM = """
import asyncio, sys
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from deployments.http.errors import openai_json
from deployments.http.last_words import LastWords
from deployments.http.sse import DONE, event, start_stream

async def stream(request: Request) -> Response:
    async def events():
        for number in range(int(request.query_params["count"])):
            yield event({"number": number})
            await asyncio.sleep(0)
        if "done" in request.query_params:
            yield DONE
        else:
            await asyncio.Event().wait()
    return await start_stream(request.receive, events(), on_error=openai_json)

app = Starlette(routes=[Route("/", stream)])
app.state.last_words = LastWords.start()
server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", loop=sys.argv[1]))

async def main():
    serving = asyncio.ensure_future(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    print(server.servers[0].sockets[0].getsockname()[1], flush=True)
    await serving

with asyncio.Runner(loop_factory=uvicorn.Config(app, loop=sys.argv[1]).get_loop_factory()) as runner:
    runner.run(main())
"""


@pytest.fixture(params=["asyncio", "uvloop"])
def served(request: pytest.FixtureRequest) -> Iterator[tuple[str, subprocess.Popen[str], psutil.Process]]:
    """A server of endless streams: where it is, its process, its keeper's."""
    mark = secrets.token_hex(8)
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, request.param],
        cwd=REPOSITORY,
        env={**os.environ, MARK: mark},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        url = f"http://127.0.0.1:{int(process.stdout.readline())}"
        yield url, process, keeper_of(mark)
    finally:
        process.kill()
        process.wait(100)


def keeper_of(mark: str) -> psutil.Process:
    """The keeper of the server that was started with this mark in its environment."""
    for process in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(psutil.Error):
            if str(KEEPER) in (process.info["cmdline"] or ()) and process.environ().get(MARK) == mark:
                return process
    raise AssertionError("no keeper")


def until(what: Any, timeout_s: float = 100.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def held(keeper: psutil.Process) -> int:
    """Client connections that a keeper holds open, beside its link."""
    sockets = 0
    for fd in Path(f"/proc/{keeper.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed just now
            sockets += str(fd.readlink()).startswith("socket:")
    return sockets - 1


def test_a_killed_process_says_so_on_every_stream(served: Any) -> None:
    url, process, keeper = served
    with httpx.Client(base_url=url, timeout=200) as http, ExitStack() as stack:
        streams = [stack.enter_context(http.stream("GET", f"/?count={n}")).iter_lines() for n in (1, 30, 500)]
        seen = [[line for _, line in zip(range(2 * n), lines)] for n, lines in zip((1, 30, 500), streams)]
        until(lambda: held(keeper) == 3)
        process.kill()
        for number, lines in enumerate(streams):
            seen[number] += list(lines)  # ends, and is whole: a cut one raises
        for count, lines in zip((1, 30, 500), seen):
            data = [json.loads(line[6:]) for line in lines if line]
            assert [d.get("number") for d in data[:-1]] == list(range(count))
            assert data[-1]["error"]["type"] == "service_unavailable_error"
            assert "died" in data[-1]["error"]["message"]
    keeper.wait(100)


def test_streams_that_end_are_not_held(served: Any) -> None:
    url, process, keeper = served
    with httpx.Client(base_url=url, timeout=200) as http:
        for _ in range(100):
            assert http.get("/?count=3&done=1").text.endswith("data: [DONE]\n\n")
        until(lambda: held(keeper) == 0)
        with http.stream("GET", "/?count=2") as answer:
            lines = answer.iter_lines()
            next(lines)
            until(lambda: held(keeper) == 1)
        until(lambda: held(keeper) == 0)  # the client left
        # A connection that its server closes is closed for the client, too.
        answer = http.get("/?count=3&done=1", headers={"connection": "close"})
        assert answer.text.endswith("data: [DONE]\n\n")
    process.kill()
    keeper.wait(100)


def test_a_keeper_that_dies_takes_nothing_along(served: Any) -> None:
    url, _, keeper = served
    keeper.kill()
    with httpx.Client(base_url=url, timeout=200) as http:
        for _ in range(3):
            assert http.get("/?count=3&done=1").text.endswith("data: [DONE]\n\n")


def test_what_a_keeper_does() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pairs = [socket.socketpair() for _ in range(3)]
    for number, (connection, _) in enumerate(pairs):
        socket.send_fds(ours, [LEAVE + number.to_bytes(8) + b"bye %d" % number], [connection.fileno()])
        connection.close()
    ours.send(TAKE_BACK + (1).to_bytes(8))
    ours.send(TAKE_BACK + (7).to_bytes(8))
    ours.close()
    left = keep(theirs)
    assert sorted(left) == [0, 2]
    assert pairs[1][1].recv(100) == b"", "taken back: closed without a word"
    pairs[2][1].close()
    for connection, words in left.values():
        speak(connection, words)  # one of them to nobody
    assert pairs[0][1].recv(100) == b"bye 0" and pairs[0][1].recv(100) == b""


def test_connections_that_cannot_be_written_on() -> None:
    async def receive() -> None: ...

    assert connection_of(receive) is None
    assert last_chunks(b"data: x\n\n") == b"9\r\ndata: x\n\n\r\n0\r\n\r\n"
