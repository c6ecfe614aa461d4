"""Preparation: kernels compiled in a process beside the start, from its first moment on, on all cores.

A start on a GPU would otherwise compile them one after another as they are first launched, for many seconds. `begin` as
early as can be, on the machine of the ranks; `wait` before the first launch. What was prepared once is not prepared
again: a stamp in Triton's cache says so, until the model, the configuration, the code or the packages change.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import logging
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path

from engine.config import EngineConfig
from engine.model_config import ModelConfig

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent.parent
TIMEOUT_S = 120.0
POLL_S = 0.01
_SHAPING = ("dtype", "max_model_len", "tensor_parallel_size", "block_size", "max_num_seqs", "max_num_batched_tokens")
_SWITCHES = ("MANTA_KERNELS", "MANTA_PDL", "MANTA_ALL_REDUCE")


class Preparation:
    """Of one resolved configuration on this machine. Costs nothing where the device is a CPU."""

    def __init__(self, config: EngineConfig, model_config: ModelConfig) -> None:
        self._config, self._model_config = config, model_config
        self._needed = config.device == "cuda" and os.environ.get("MANTA_PREPARE", "1") != "0"
        self._stamp = cache_folder() / "manta" / _digest(config, model_config) if self._needed else Path()

    @property
    def _lock(self) -> Path:
        return self._stamp.with_suffix(".lock")

    @property
    def done(self) -> bool:
        """Nothing is left to compile, or nothing ever was."""
        return not self._needed or self._stamp.exists()

    def begin(self) -> None:
        """Start to compile, unless it was done before or is under way. Returns at once; no error is raised."""
        if self.done:
            return
        from engine.worker.rehearsal_task import Task

        path = [str(ROOT), os.environ.get("PYTHONPATH")]
        try:
            self._lock.parent.mkdir(parents=True, exist_ok=True)
            with self._lock.open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The process and those that it forks hold the lock for as long as one of them lives.
                process = subprocess.Popen(
                    [sys.executable, "-m", "engine.worker.rehearsal"],
                    stdin=subprocess.PIPE,
                    pass_fds=[lock.fileno()],
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))},
                    start_new_session=True,
                )
            threading.Thread(target=process.wait, name="manta-preparation", daemon=True).start()
            assert process.stdin is not None
            with process.stdin as pipe:
                pickle.dump(Task(self._config, self._model_config, self._stamp, time.time()), pipe)
        except BlockingIOError:
            return  # under way
        except OSError as error:
            logger.warning("kernels will be compiled as they are needed: %s", error)

    def wait(self, timeout_s: float = TIMEOUT_S) -> float:
        """Return once what is under way is over; the seconds it took."""
        began_s = time.monotonic()
        if self.done:
            return 0.0
        with contextlib.suppress(OSError), self._lock.open("w") as lock:
            while time.monotonic() - began_s < timeout_s:
                try:
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(POLL_S)
        return time.monotonic() - began_s


def cache_folder() -> Path:
    """Where Triton keeps what it has compiled."""
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    return Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache")


def _digest(config: EngineConfig, model_config: ModelConfig) -> str:
    """Of all that decides what is compiled."""
    shaping = [config.enforce_eager, *(getattr(config, key) for key in _SHAPING)]
    parts = [repr(shaping), repr(sorted(model_config.raw.items())), *(os.environ.get(key, "") for key in _SWITCHES)]
    parts += [f"{name} {_version(name)}" for name in ("torch", "triton")]
    files = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    for folder in ("kernels", "engine/layers", "engine/models", "engine/worker"):
        files += sorted(path for path in (ROOT / folder).iterdir() if path.suffix in (".py", ".cu"))
    parts += [path.read_text(errors="replace") for path in files]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
