"""A served model of its own to break: started by the launcher, beside any other on the machine."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, Self

import psutil
import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
START_S = 240.0
STOP_S = 90.0
TITLES = {"driver": ("MantaDriver", ":driver"), "replica": ("ServeReplica",)}
"""What stands in the command lines of our processes' kinds."""


class Site:
    """configs/tiny.yaml with some keys changed, served until the `with` block ends."""

    def __init__(self, **changes: Any) -> None:
        self._changes = changes
        self.output: list[str] = []

    def __enter__(self) -> Self:
        self._folder = Path(tempfile.mkdtemp(prefix="mc-", dir="/tmp"))  # short: Ray puts sockets below it
        content = yaml.safe_load((REPOSITORY / "configs/tiny.yaml").read_text(encoding="utf-8"))
        content["http_options"]["port"] = port = free_port()
        content["applications"][0]["args"] |= self._changes
        self.args: dict[str, Any] = content["applications"][0]["args"]
        self.path = path = self._folder / "app.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        self.url, self.application = f"http://127.0.0.1:{port}", content["applications"][0]["name"]
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        environment |= {"RAY_TMPDIR": str(self._folder), "TMPDIR": str(self._folder), "PYTHONUNBUFFERED": "1"}
        self.environment = environment
        self._process = subprocess.Popen(
            [sys.executable, "-m", "scripts.run", str(path)],
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        ready = threading.Event()
        threading.Thread(target=self._read, args=(ready,), daemon=True).start()
        if not ready.wait(START_S) or self._process.poll() is not None:
            self.__exit__()
            raise RuntimeError("the server did not start:\n" + "".join(self.output[-40:]))
        return self

    def __exit__(self, *exc: object) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.pid != os.getpid() and process.environ().get("RAY_TMPDIR") == str(self._folder):
                    process.kill()  # stopped ones, and any that outlived the launcher
        shutil.rmtree(self._folder, ignore_errors=True)

    def processes(self, kind: str) -> list[psutil.Process]:
        """Our live processes of a kind in TITLES, oldest first."""
        found: list[tuple[float, int, psutil.Process]] = []
        for process in self._family():
            with contextlib.suppress(psutil.Error):
                line = " ".join(process.cmdline())
                if line.startswith("ray::") and any(title in line for title in TITLES[kind]):
                    found.append((process.create_time(), process.pid, process))
        found.sort(key=lambda entry: entry[:2])
        return [process for _, _, process in found]

    def _family(self) -> list[psutil.Process]:
        try:
            family: list[psutil.Process] = psutil.Process(self._process.pid).children(recursive=True)
            return family
        except psutil.NoSuchProcess:
            return []

    def _read(self, ready: threading.Event) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.output.append(line)
            if line.startswith("curl "):
                ready.set()
        ready.set()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
