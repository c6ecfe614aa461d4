"""The embedded model, served as a person does it: run.sh's launcher in a process, a Ray and a port of its own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from deployments.config import REPOSITORY

START_S = 240.0
STOP_S = 150.0
PATIENCE_S = 200.0


@dataclass
class Served:
    """A launcher that serves, and the environment of a program beside it."""

    url: str
    environment: dict[str, str]
    process: subprocess.Popen[str]
    output: list[str]

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=PATIENCE_S, **options)

    def post(self, path: str, body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=PATIENCE_S)

    def stream(self, path: str, body: Any) -> AbstractContextManager[httpx.Response]:
        return httpx.stream("POST", f"{self.url}{path}", json={**body, "stream": True}, timeout=PATIENCE_S)

    def python(self, program: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a program in a process, and a Ray job, of its own."""
        return subprocess.run(
            [sys.executable, "-c", program],
            env=self.environment | environment,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )

    def processes(self, *titles: str) -> list[psutil.Process]:
        """Ray's below the launcher with one of the words in their title."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.Error):  # it has ended just now
                line = " ".join(process.cmdline())
                if line.startswith("ray::") and any(title in line for title in titles):
                    found.append(process)
        return found

    def driver(self) -> psutil.Process:
        (driver,) = self.processes(":driver", "MantaDriver")
        return driver

    def stats(self) -> dict[str, Any]:
        stats: dict[str, Any] = self.get("/stats").raise_for_status().json()
        return stats

    def wait_idle(self) -> dict[str, Any]:
        """The stats once nothing runs and no block is held."""
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            stats = self.stats()
            if not (stats["running"] or stats["waiting"] or stats["used_blocks"] or stats["unfinished"]):
                return stats
            assert time.monotonic() < deadline_s, f"still busy: {stats}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serve_tiny() -> Iterator[Served]:
    """A Ray of its own: other folders and ports than any other on this machine."""
    folder = Path(tempfile.mkdtemp(prefix="mt-", dir="/tmp"))  # short: Ray puts sockets below it
    content = yaml.safe_load((REPOSITORY / "configs/tiny.yaml").read_text())
    port = content["http_options"]["port"] = free_port()
    shutil.copytree(REPOSITORY / "configs/tiny", folder / "model")
    content["applications"][0]["args"]["model"] = str(folder / "model")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    environment |= {"RAY_TMPDIR": str(folder), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.run", str(path)],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    output: list[str] = []
    ready = threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            output.append(line)
            if line.startswith("curl "):
                ready.set()
        ready.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert ready.wait(START_S), "".join(output)
        assert any(line.startswith("curl ") for line in output), "".join(output)
        yield Served(f"http://127.0.0.1:{port}", environment, process, output)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        reader.join(10)
        shutil.rmtree(folder, ignore_errors=True)
