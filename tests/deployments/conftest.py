"""The embedded model behind the real HTTP application, on a real socket, without Ray."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import torch
import uvicorn

from cluster.driver import Driver
from cluster.driver_client import DriverClient
from deployments.config import AppConfig, check
from deployments.http.asgi import create_app
from deployments.service import ModelService
from engine.local_executor import LocalExecutor
from engine.model_config import ModelConfig, resolve
from engine.step import StepPlan, StepResult
from engine.tokenizer import Tokenizer, default_sampling

ARGS: dict[str, Any] = {
    "model": "configs/tiny",
    "served_model_name": ["tiny", "tiny-alias"],
    "device": "cpu",
    "dtype": "float32",
    "max_num_seqs": 16,
    "max_model_len": 256,
    "num_blocks": 128,
    "max_body_mib": 2,
}


class MeteredExecutor(LocalExecutor):
    """Runs all plans, or only so many as a test lets it; the others wait, and the engine's loop is free meanwhile."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._allowed: int | None = None
        self._kept: deque[tuple[StepPlan, Future[StepResult]]] = deque()
        self._lock = threading.RLock()

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        future: Future[StepResult] = Future()
        with self._lock:
            self._kept.append((plan, future))
            self._run_allowed()
        return future

    def allow(self, steps: int | None) -> None:
        """Run so many more, or with None all."""
        with self._lock:
            self._allowed = steps
            self._run_allowed()

    def _run_allowed(self) -> None:
        while self._kept and self._allowed != 0:
            plan, future = self._kept.popleft()
            self._allowed = None if self._allowed is None else self._allowed - 1
            super().submit(plan).add_done_callback(lambda done, future=future: _copy(done, future))


def _copy(done: Future[StepResult], future: Future[StepResult]) -> None:
    if (error := done.exception()) is not None:
        future.set_exception(error)
    else:
        future.set_result(done.result())


@dataclass
class LocalServer:
    """A running server: where it is, and what is behind it."""

    url: str
    service: ModelService
    driver: Driver
    executor: MeteredExecutor
    http: httpx.Client
    """Keeps its connections: making one costs more than most requests here."""

    def stats(self) -> dict[str, Any]:
        answer: dict[str, Any] = self.http.get("/stats").raise_for_status().json()
        return answer

    def wait(self, reached: Callable[[dict[str, Any]], Any], timeout_s: float = 100.0) -> dict[str, Any]:
        """The stats once they are as wanted."""
        deadline_s = time.monotonic() + timeout_s
        while not reached(stats := self.stats()):
            assert time.monotonic() < deadline_s, stats
        return stats

    def wait_idle(self) -> dict[str, Any]:
        """The stats once nothing runs and no block is held."""
        return self.wait(
            lambda stats: not (stats["running"] or stats["waiting"] or stats["used_blocks"] or stats["unfinished"])
        )

    @contextlib.contextmanager
    def steps(self, count: int) -> Iterator[None]:
        """From idle, the engine does so many steps and no more until the block ends, however fast it is.

        It answers meanwhile, and takes requests and aborts.
        """
        self.wait_idle()
        self.executor.allow(count)
        try:
            yield
        finally:
            self.executor.allow(None)


class _Server(uvicorn.Server):
    """Listens on a free port, tells when it does, and leaves signals alone."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = threading.Event()

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @property
    def port(self) -> int:
        port: int = self.servers[0].sockets[0].getsockname()[1]
        return port


@pytest.fixture(scope="session")
def config() -> AppConfig:
    checked = check(ARGS)
    return resolve(checked, ModelConfig.load(checked))


@pytest.fixture(scope="session")
def server(config: AppConfig) -> Iterator[LocalServer]:
    torch.set_num_threads(1)
    model_config = ModelConfig.load(config)
    executor = MeteredExecutor(config.engine, model_config)
    driver = Driver(
        "test",
        config.engine,
        executor,
        vocab_size=model_config.vocab_size,
        eos_token_ids=model_config.eos_token_ids,
    )
    driver.start()
    service = ModelService(
        config,
        Tokenizer.load(config),
        vocab_size=model_config.vocab_size,
        sampling_defaults=default_sampling(config),
    )
    web = _Server(uvicorn.Config(create_app(service), host="127.0.0.1", port=0, log_level="error", lifespan="off"))

    async def serve() -> None:
        client = await DriverClient.connect(driver.ticket, on_outputs=service.deliver)
        service.attach(client)
        await web._serve()
        await client.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert web.listening.wait(100), "the server did not start"
    url = f"http://127.0.0.1:{web.port}"
    with httpx.Client(base_url=url, timeout=200) as http:
        yield LocalServer(url, service, driver, executor, http)
    web.should_exit = True
    thread.join(10)
    driver.stop()
