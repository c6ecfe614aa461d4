"""Engines to measure on GPUs: LLMEngine stepped in this process, and one behind a Ray driver."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import EngineConfig
from engine.model_config import ModelConfig
from engine.request import Request, SequenceOutput
from engine.worker.preparation import Preparation
from engine.worker.start_log import StartLog
from scripts.bench_gpu_cases import Timeline

Started = Callable[[float, str], None]
"""Told how many seconds a start took, and where they went."""


@dataclass(frozen=True)
class Run:
    """Runs requests to their end. `at_step` is called before each step, where the steps are taken here."""

    drive: Callable[[list[Request], Callable[[int], None] | None], Timeline]
    unrecorded: Callable[[], int]
    """How many CUDA graphs the engine has yet to record while it is left alone."""

    def __call__(self, requests: list[Request], at_step: Callable[[int], None] | None = None) -> Timeline:
        return self.drive(requests, at_step)


@contextmanager
def offline(config: EngineConfig, model_config: ModelConfig, started: Started) -> Iterator[Run]:
    """LLMEngine over ranks of this process (one GPU) or over Ray's, stepped here."""
    from engine.llm_engine import LLMEngine
    from engine.local_executor import LocalExecutor

    began_s = time.perf_counter()
    executor: Any
    if config.tensor_parallel_size == 1:
        executor = LocalExecutor(config, model_config)
    else:
        from cluster.ray_executor import RayExecutor

        executor = RayExecutor(config, model_config)
    engine = LLMEngine(config, executor, vocab_size=model_config.vocab_size, eos_token_ids=model_config.eos_token_ids)
    engine.start()
    started(time.perf_counter() - began_s, "")

    def drive(requests: list[Request], at_step: Callable[[int], None] | None) -> Timeline:
        timeline = Timeline(time.perf_counter())
        for request in requests:
            engine.add_request(request)
        while engine.has_unfinished:
            if at_step is not None:
                at_step(len(timeline.steps))
            timeline.note(engine.step())
        return timeline

    try:
        # Several ranks have recorded all before they are ready.
        yield Run(drive, lambda: executor.unrecorded if config.tensor_parallel_size == 1 else 0)
    finally:
        engine.shutdown()


@contextmanager
def through_ray(config: EngineConfig, model_config: ModelConfig, started: Started) -> Iterator[Run]:
    """A driver actor and its worker actors, over the driver's socket."""
    log = StartLog(fresh_s=0)
    began_s = time.perf_counter()
    Preparation(config, model_config).begin()
    import ray

    from cluster.driver import start_driver, stop_driver
    from cluster.driver_client import DriverClient
    from cluster.placement import bundles

    log.part("imports")
    if not ray.is_initialized():
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # as scripts.run does
        ray.init(address="local", include_dashboard=False, log_to_driver=True, logging_level="WARNING")
    log.part("Ray")
    group = ray.util.placement_group(bundles(config))  # as a replica of Serve has one
    name = f"bench-{Path(model_config.folder).name}"
    driver = start_driver(config, model_config, name=name, placement_group=group)
    log.part("driver and ranks")
    started(time.perf_counter() - began_s, str(log))

    async def drive(requests: list[Request]) -> Timeline:
        done = asyncio.Event()
        timeline = Timeline(0)

        def note(outputs: list[SequenceOutput]) -> None:
            timeline.note(outputs)
            if timeline.finished == len(requests):
                done.set()

        client = await DriverClient.connect(driver, on_outputs=note)
        timeline.started_s = time.perf_counter()
        for request in requests:
            client.submit(request)
        await done.wait()
        await client.close()
        return timeline

    try:
        rank = ray.get_actor(f"manta:{name}:rank0")
        yield Run(
            lambda requests, _: asyncio.run(drive(requests)), lambda: int(ray.get(rank.progress.remote()).unrecorded)
        )
    finally:
        stop_driver(driver)
        ray.util.remove_placement_group(group)


ENGINES = {"offline": offline, "ray": through_ray}
