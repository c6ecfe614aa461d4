"""The embedded model behind the real HTTP application, on a real socket, without Ray."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
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


@dataclass
class LocalServer:
    """A running server: where it is, and what is behind it."""

    url: str
    service: ModelService
    driver: Driver
    http: httpx.Client
    """Keeps its connections: making one costs more than most requests here."""

    def stats(self) -> dict[str, Any]:
        answer: dict[str, Any] = self.http.get("/stats").raise_for_status().json()
        return answer

    def wait_idle(self, timeout_s: float = 10.0) -> dict[str, Any]:
        """The stats once nothing runs and no block is held."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            stats = self.stats()
            if not (stats["running"] or stats["waiting"] or stats["used_blocks"] or stats["unfinished"]):
                return stats
            assert time.monotonic() < deadline_s, f"still busy: {stats}"


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
    driver = Driver(
        "test",
        config.engine,
        LocalExecutor(config.engine, model_config),
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
    assert web.listening.wait(30), "the server did not start"
    url = f"http://127.0.0.1:{web.port}"
    with httpx.Client(base_url=url, timeout=60) as http:
        yield LocalServer(url, service, driver, http)
    web.should_exit = True
    thread.join(10)
    driver.stop()
