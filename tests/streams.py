"""Streams of a driver, as a replica has them: what was asked and what came, faults in the middle of them and all."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import msgspec
import ray

from cluster.driver import start_driver, stop_driver
from cluster.driver_client import DriverClient
from cluster.messages import error_of
from engine.config import EngineConfig
from engine.errors import MantaError
from engine.llm_engine import LLMEngine
from engine.local_executor import LocalExecutor
from engine.model_config import ModelConfig, resolve
from engine.request import Request, SequenceOutput
from engine.step import pack

Sample = tuple[str, int]
"""A request's id and which of its samples."""
PATIENCE_S = 200.0
"""A test that hangs ends before pytest ends it, and cleans up."""


def undisturbed(config: EngineConfig, requests: Sequence[Request]) -> dict[Sample, list[int]]:
    """The tokens that one rank in this process gives, and no Ray."""
    config = config.replace(tensor_parallel_size=1)
    model_config = ModelConfig.load(config)
    config = resolve(config, model_config)
    executor = LocalExecutor(config, model_config)
    engine = LLMEngine(config, executor, vocab_size=model_config.vocab_size, eos_token_ids=model_config.eos_token_ids)
    engine.start()
    tokens: dict[Sample, list[int]] = {}
    for request in requests:
        engine.add_request(request)
    while engine.has_unfinished:
        for output in engine.step():
            tokens.setdefault((output.request_id, output.index), []).extend(output.token_ids)
    engine.shutdown()
    return tokens


@contextlib.contextmanager
def started(config: EngineConfig, name: str, **options: Any) -> Iterator[Any]:
    """A driver actor and its ranks, ended with the block whatever happens in it."""
    driver = start_driver(config, name=name, **options)
    try:
        yield driver
    finally:
        stop_driver(driver)


def driver_pid(driver: Any) -> int:
    _, pid = ray.get(driver.pid.remote())
    return int(pid)


def rank_pids(driver: Any) -> list[int]:
    return [facts.pid for facts in ray.get(driver.rank_facts.remote())]


class Streams:
    """What a replica holds of its requests, while drivers come and go."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = list(requests)
        self.tokens: dict[Sample, list[int]] = {
            (request.request_id, index): [] for request in requests for index in range(request.params.num_sequences)
        }
        self.open = set(self.tokens)
        self.errors: dict[Sample, MantaError] = {}
        self.wrong: list[Sample] = []
        """Got something after their end."""
        self._ended: set[Sample] = set()
        """With the driver they are at now."""
        self._changed = asyncio.Event()
        self._brake: tuple[Callable[[], bool], int] | None = None

    async def join(self, driver: Any) -> None:
        """Hand a driver, or who listens at a ticket, every unfinished request with its tokens so far."""
        self.lost, self._ended = asyncio.Event(), set()
        self.client = await DriverClient.connect(driver, on_outputs=self._take, on_disconnect=self._leave)
        for request in self.requests:
            samples = [(request.request_id, index) for index in range(request.params.num_sequences)]
            if self.open.intersection(samples):
                resume = tuple(pack(self.tokens[sample]) for sample in samples)
                self.client.submit(msgspec.structs.replace(request, resume=resume if any(resume) else ()))

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    def all_grow(self) -> Callable[[], bool]:
        """Whether every stream that is open has got more tokens than it has now."""
        had = {sample: len(tokens) for sample, tokens in self.tokens.items()}
        return lambda: all(len(self.tokens[sample]) > had[sample] for sample in self.open)

    @contextlib.asynccontextmanager
    async def stopped(self, pid: int, when: Callable[[], bool]) -> AsyncIterator[None]:
        """Stop the driver's process the moment `when` holds, until the block ends.

        Nobody watches the ranks meanwhile, and no more is asked of them: what is done to them befalls streams in their
        middle, however fast they are and however long it takes.
        """
        self._brake = (when, pid)
        await self.until(lambda: self._brake is None)
        try:
            assert self.open
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):  # that was it what befell them
                os.kill(pid, signal.SIGCONT)

    async def finish(self) -> dict[str, Any]:
        """The driver's stats once every stream has ended. Nothing is left of them there."""
        await self.until(lambda: not self.open or self.lost.is_set())
        assert not self.lost.is_set() and not self.wrong
        stats = await self.client.stats()
        await self.client.close()
        assert (stats["running"], stats["waiting"], stats["used_blocks"]) == (0, 0, 0)
        return stats

    def _take(self, outputs: list[SequenceOutput]) -> None:
        for output in outputs:
            sample = (output.request_id, output.index)
            # One that had ended at another driver ends once more, without tokens, when its request is resumed.
            if sample in self._ended or (sample not in self.open and output.token_ids):
                self.wrong.append(sample)
            self.tokens[sample] += output.token_ids
            if output.error is not None:
                self.errors[sample] = error_of(output)
            if output.finish_reason is not None:
                self._ended.add(sample)
                self.open.discard(sample)
        if self._brake is not None and self._brake[0]():
            os.kill(self._brake[1], signal.SIGSTOP)
            self._brake = None
        self._changed.set()

    def _leave(self, _: str) -> None:
        self.lost.set()
        self._changed.set()
