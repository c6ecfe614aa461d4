"""Serve a configuration on this machine until Ctrl-C: `python -m scripts.run [CONFIG] [KEY=VALUE ...]`.

Checks the file first. Uses the Ray head that runs here (RAY_ADDRESS, or the last `ray start`) or starts one, with the
environment in which Serve streams fastest; then `serve run`. At the end takes down what it started, and only that.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import yaml

from deployments.config import IMPORT_PATH, REPOSITORY, check_file, parse_overrides, read_args
from engine.errors import MantaError
from engine.model_config import ModelConfig, resolve
from engine.worker.preparation import Preparation
from scripts.stop import stop_serving

BIN = Path(sys.executable).parent
START_TIMEOUT_S = 180.0
"""Of Ray, and of the first answer: on a machine that has better things to do they take a minute."""
SAY_EVERY_S = 10.0
QUESTION = "What is 17 + 25?"
# Serve reads these when its processes start, so they have to be there before the head is.
SERVE_ENVIRONMENT = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "1",
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
    # An idle replica that is told to stop waits this long for load balancers to forget it: 30 s, if not said otherwise.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
    # A request whose replica died before it said anything goes to another one: that costs tokens, and changes nothing.
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    # Past replicas that are dead, but not known to be: the first request that cannot connect to one finds it out.
    "RAY_SERVE_HAPROXY_RETRIES": "5",
    "RAY_SERVE_HAPROXY_OBSERVE_ERROR_LIMIT": "1",
    # For that it must fit into a buffer: in 256 KiB, 32k tokens of most texts do. A connection takes 0.45 MiB then.
    "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(256 << 10),
    # Every change of replicas has a new HAProxy take over; the old one ends streams that still run after this long.
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "3600",
    "RAY_SERVE_HAPROXY_BINARY_PATH": str(REPOSITORY / "scripts/haproxy.sh"),
    "MANTA_PYTHON": sys.executable,
    "RAY_USAGE_STATS_ENABLED": "0",
    # A worker process a core, which nobody asked for, would start while the model does: 2.5 s of a start on 16 cores.
    "RAY_prestart_worker_first_driver": "0",
    "TOKENIZERS_PARALLELISM": "false",
}

_HAPROXY_FILES = {
    "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "haproxy.cfg",
    "RAY_SERVE_HAPROXY_SOCKET_PATH": "haproxy.sock",
    "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": "",
    "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "haproxy-state",
}
_SHORT_TMP = "/tmp" if os.access("/tmp", os.W_OK) else None
"""HAProxy's socket lies below, behind a node's id of 56 characters; a socket's path has 107 at most."""
_HAPROXY_PORTS = {"RAY_SERVE_HAPROXY_STATS_PORT": 8404, "RAY_SERVE_HAPROXY_METRICS_PORT": 9101}


class StartFailed(Exception):
    """The application cannot be brought up; the message says why."""


def say(message: str) -> None:
    print(f"manta: {message}", flush=True)


class Head:
    """The Ray head to use: the one found running, or one started here and ended by `close`."""

    def __init__(self, folder: Path) -> None:
        """folder holds HAProxy's files of a head started here."""
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.address = _running_head()
        self.environment = {**os.environ, **{k: os.environ.get(k, v) for k, v in SERVE_ENVIRONMENT.items()}}
        self.environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
        for name, file in _HAPROXY_FILES.items():
            self.environment.setdefault(name, str(folder / file))
        for name, port in _HAPROXY_PORTS.items():
            self.environment.setdefault(name, str(_free_port(port)))

    def start(self) -> None:
        """Start a head unless one runs. Raises StartFailed."""
        if self.address is not None:
            say(f"using the Ray head at {self.address}")
            return
        _make_token(self.environment)
        dashboard = _free_port(8265)
        command = [str(BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats"]
        command += [f"--port={_free_port(6379)}", f"--ray-client-server-port={_free_port(10001)}"]
        command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
        log = self._folder / "ray.log"
        say(f"starting Ray (dashboard at http://127.0.0.1:{dashboard})")
        with log.open("wb") as out:
            # Its own session: a Ctrl-C here must not reach it before Serve is down.
            self._process = subprocess.Popen(
                command, env=self.environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while b"block forever" not in log.read_bytes():
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                raise StartFailed(f"Ray did not start:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.1)
        self.address = _running_head()

    def close(self) -> None:
        """End the head if it was started here, and every process below it."""
        if self._process is None:
            return
        try:
            family = psutil.Process(self._process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            family = []
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=20)
        _end(family)
        # HAProxy leaves its parent; it is known by its configuration file in our folder.
        _end([p for p in psutil.process_iter(["cmdline"]) if str(self._folder) in " ".join(p.info["cmdline"] or ())])
        if self._process.poll() is None:
            self._process.kill()


class Application:
    """The applications of one checked configuration, on a head."""

    def __init__(self, content: dict[str, Any], head: Head) -> None:
        self._content, self._head = content, head
        options = content.get("http_options") or {}
        host = options.get("host", "0.0.0.0")
        self.host = "127.0.0.1" if host in ("0.0.0.0", "::") else host
        self.port = int(options.get("port", 8000))
        ours = [a for a in content["applications"] if a["import_path"] == IMPORT_PATH]
        self.name: str = ours[0].get("name", "default")
        prefix = ours[0].get("route_prefix") or "/"
        self.url = f"http://{self.host}:{self.port}{prefix.rstrip('/')}"

    def start(self, path: str) -> None:
        """`serve run` the file and wait until it answers. Raises StartFailed."""
        # Without an address Ray finds the head by itself, and only then takes the user's token along.
        command = [str(BIN / "serve"), "run", "--non-blocking", path]
        done = subprocess.run(
            command, env=self._head.environment, cwd=REPOSITORY, capture_output=True, text=True, check=False
        )
        if done.returncode != 0 or "Submitted deploy config" not in done.stdout + done.stderr:
            raise StartFailed(f"serve run failed:\n{(done.stdout + done.stderr)[-3000:]}")
        self._connect()
        self._wait_running()
        self._wait_answering()

    def watch(self) -> None:
        """Return never; raise StartFailed when the application is gone."""
        while True:
            time.sleep(1.0)
            if not self._status():
                raise StartFailed(f"application {self.name!r} was taken down")

    def close(self) -> None:
        """Take Serve down, after the requests in flight."""
        import ray

        if ray.is_initialized():
            stop_serving([self.name])
            ray.shutdown()

    def _connect(self) -> None:
        os.environ["RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP"] = "1"
        import ray

        ray.init(address="auto", namespace="serve", log_to_driver=False, logging_level="ERROR")
        _take_signals()

    def _status(self) -> Any:
        from ray import serve

        return serve.status().applications.get(self.name)

    def _wait_running(self) -> None:
        began_s = said_s = time.monotonic()
        while True:
            status = self._status()
            state = str(getattr(status, "status", "NOT_STARTED")).rpartition(".")[2]
            if state == "RUNNING":
                return
            if state in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise StartFailed(_cause(status))
            if time.monotonic() - said_s >= SAY_EVERY_S:
                said_s = time.monotonic()
                say(f"{self.name} is loading ({said_s - began_s:.0f} s)")
            time.sleep(0.2)

    def _wait_answering(self) -> None:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError) as error:
                if time.monotonic() > deadline_s:
                    raise StartFailed(f"{self.url}/health does not answer: {error}") from None
            time.sleep(0.2)

    def introduce(self) -> None:
        """Print how to talk to it."""
        with urllib.request.urlopen(f"{self.url}/v1/models", timeout=START_TIMEOUT_S) as answer:
            model = yaml.safe_load(answer.read())["data"][0]["id"]
        chat = f'[{{"role": "user", "content": "{QUESTION}"}}]'
        curl = f'-H \'Content-Type: application/json\' -d \'{{"model": "{model}", "messages": {chat}}}\''
        python = f'from ray import serve; print(serve.get_app_handle("{self.name}").remote({chat}).result())'
        say(f"{model} is served at {self.url}; Ctrl-C ends it. Try, in another terminal:")
        print(f"\ncurl {self.url}/v1/chat/completions {curl}")
        print(f"\n{os.path.relpath(sys.executable)} -c '{python}'\n", flush=True)


def _running_head() -> str | None:
    """RAY_ADDRESS, or where the last `ray start` on this machine listens, if it does."""
    if os.environ.get("RAY_ADDRESS"):
        return os.environ["RAY_ADDRESS"]
    file = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / "ray" / "ray_current_cluster"
    try:
        address = file.read_text().strip()
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=1):
            return address
    except (OSError, ValueError):
        return None


def _free_port(wanted: int) -> int:
    """`wanted`, or any other port that nobody listens on."""
    for port in (wanted, 0):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return int(probe.getsockname()[1])
    raise StartFailed("no free port")


def _make_token(environment: dict[str, str]) -> None:
    """Make the user a Ray token when there is none: Ray listens on every interface, and lets in who knows it."""
    command = [str(BIN / "ray"), "get-auth-token", "--generate"]
    if "RAY_AUTH_MODE" not in environment and subprocess.run(command, capture_output=True, check=False).returncode:
        say("no Ray token could be made: Ray runs without authentication")


def _cause(status: Any) -> str:
    """The line that matters of a failed application's message, which is a traceback or several."""
    messages = [status.message, *(d.message for d in status.deployments.values())]
    lines = [line.strip() for message in messages for line in (message or "").splitlines() if line.strip()]
    for line in reversed(lines):
        if "engine.errors." in line:
            return str(line.partition("engine.errors.")[2])
    return "\n".join(lines[-15:])


def _end(processes: list[psutil.Process]) -> None:
    """Terminate, then kill."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=5)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()


def _take_signals() -> None:
    """Let SIGINT and SIGTERM end this program the long way. Again after ray.init, which takes SIGTERM for itself."""
    for number in (signal.SIGINT, signal.SIGTERM):  # set even where a shell started this with SIGINT ignored
        signal.signal(number, _interrupt)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def prepare(content: dict[str, Any]) -> None:
    """Let GPU kernels be compiled while Ray and Serve start."""
    for application in content["applications"]:
        if application["import_path"] == IMPORT_PATH:
            config = read_args(application["args"]).engine
            model_config = ModelConfig.load(config)
            Preparation(resolve(config, model_config), model_config).begin()


def main(arguments: list[str]) -> int:
    """Serve until interrupted; 0 after Ctrl-C, 1 when the application fails, 2 for a bad configuration."""
    path = arguments.pop(0) if arguments and "=" not in arguments[0] else "configs/tiny.yaml"
    try:
        content = check_file(path, parse_overrides(arguments))
    except MantaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _take_signals()
    prepare(content)
    folder = Path(tempfile.mkdtemp(prefix="manta-", dir=_SHORT_TMP))
    written = folder / Path(path).name
    written.write_text(yaml.safe_dump(content, sort_keys=False))
    head = Head(folder)
    application = Application(content, head)
    try:
        head.start()
        say(f"deploying {path}")
        application.start(str(written))
        application.introduce()
        application.watch()
    except StartFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        say("shutting down")
    finally:
        with contextlib.suppress(KeyboardInterrupt):
            application.close()
        head.close()
        shutil.rmtree(folder, ignore_errors=True)
    say("ended")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
