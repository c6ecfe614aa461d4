"""How long streams pause when something dies: `python -m scripts.pauses [--tp 2] [--spares N] [--shape llama3-8b]`.

Sixteen streams through a driver's socket, as a replica has them: of the embedded model on CPUs, or on GPUs of a model
of some shape with random weights. One row a fault: the longest gap between two steps, how many ranks were kept, and how
many streams ended with the tokens of the undisturbed run. In bfloat16, on GPUs, these may differ: a resumed stream
computes its past as a prompt, whose sums are rounded otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import ray
from tqdm import tqdm

from cluster.driver import start_driver, stop_driver
from cluster.driver_client import DriverClient
from cluster.placement import bundles
from engine.config import EngineConfig
from engine.model_config import ModelConfig, resolve
from engine.request import Request, SequenceOutput
from engine.sampling_params import SamplingParams
from engine.step import pack
from scripts.model_shapes import SHAPES, model_folder

FAULTS = ("rank killed", "rank stopped", "driver killed")
NUM_STREAMS = 16
LIMIT_S = 300.0


class Streams:
    """What a replica holds of its requests, while drivers come and go."""

    def __init__(self, requests: list[Request]) -> None:
        self.requests = requests
        self.tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
        self.open = set(self.tokens)
        self.times_s: list[float] = []
        self._changed = asyncio.Event()
        self.client: DriverClient | None = None
        self.lost = asyncio.Event()

    async def join(self, driver: Any) -> None:
        """Hand the driver every unfinished request with its tokens so far."""
        self.client = await DriverClient.connect(driver, on_outputs=self._take, on_disconnect=lambda _: self.lost.set())
        for request in self.requests:
            if request.request_id in self.open:
                resume = (pack(self.tokens[request.request_id]),)
                self.client.submit(msgspec.structs.replace(request, resume=resume))

    async def until(self, reached: Callable[[], bool]) -> None:
        async with asyncio.timeout(LIMIT_S):
            while not reached():
                self._changed.clear()
                await self._changed.wait()

    async def leave(self) -> None:
        if self.client is not None:
            await self.client.close()

    def longest_gap_s(self) -> float:
        return max(late - early for early, late in itertools.pairwise(self.times_s))

    def _take(self, outputs: list[SequenceOutput]) -> None:
        self.times_s.append(time.perf_counter())
        for output in outputs:
            assert output.error is None, output.error
            self.tokens[output.request_id] += output.token_ids
            if output.finish_reason is not None:
                self.open.discard(output.request_id)
        self._changed.set()


class Engine:
    """A driver and its ranks in a placement group that outlives them, as a replica's does."""

    def __init__(self, config: EngineConfig) -> None:
        self._model_config = ModelConfig.load(config)
        self.config = resolve(config, self._model_config)
        self._group = ray.util.placement_group(bundles(self.config))
        self._start()

    def ranks(self) -> list[int]:
        return [facts.pid for facts in ray.get(self.driver.rank_facts.remote())]

    def stop(self) -> None:
        stop_driver(self.driver)

    async def strike(self, fault: str, rank: int, streams: Streams) -> None:
        """Do what `fault` says to a rank's process or to the driver's, at once, and then what a replica does."""
        if fault != "driver killed":
            os.kill(rank, signal.SIGKILL if fault == "rank killed" else signal.SIGSTOP)
            return
        os.kill(self._pid, signal.SIGKILL)
        await streams.lost.wait()
        await asyncio.to_thread(self.stop)
        await asyncio.to_thread(self._start)
        await streams.join(self.driver)

    def _start(self) -> None:
        self.driver = start_driver(self.config, self._model_config, name="pauses", placement_group=self._group)
        _, self._pid = ray.get(self.driver.pid.remote())


def requests_of(max_tokens: int) -> list[Request]:
    return [
        Request.create(
            f"r{number}", [5 + number, 6, 7], SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        )
        for number in range(NUM_STREAMS)
    ]


async def measure(engine: Engine, faults: list[str], max_tokens: int, settle_s: float) -> list[str]:
    """Rows of the table."""
    expected: dict[str, list[int]] = {}
    rows = []
    for fault in tqdm(["", *faults], desc="faults", leave=False):
        streams = Streams(requests_of(max_tokens))
        before = engine.ranks()
        await streams.join(engine.driver)
        await streams.until(lambda: all(len(tokens) > 20 for tokens in streams.tokens.values()))  # noqa: B023
        if fault:
            await engine.strike(fault, before[-1], streams)
        await streams.until(lambda: not streams.open)  # noqa: B023
        await streams.leave()
        expected = expected or streams.tokens
        if fault:
            kept = len(set(before) & set(engine.ranks()))
            same = sum(streams.tokens[name] == tokens for name, tokens in expected.items())
            gap_s = streams.longest_gap_s()
            rows.append(f"| {fault} | {gap_s:.2f} s | {kept} of {len(before)} | {same} of {NUM_STREAMS} |")
        await asyncio.sleep(settle_s)
    return rows


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=sorted(SHAPES), help="on GPUs, with random weights; default: tiny, on CPUs")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--spares", type=int, help="warm_spares")
    parser.add_argument("--faults", default=",".join(FAULTS))
    parser.add_argument("--max-tokens", type=int, default=400)
    parser.add_argument("--settle-s", type=float, default=8.0, help="before the next fault: the next spare starts")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    settings: dict[str, Any] = {"model": "configs/tiny", "device": "cpu", "dtype": "float32", "max_model_len": 512}
    if options.shape:
        folder = model_folder(options.shape, Path(tempfile.gettempdir()) / "manta-shapes")
        settings = {"model": folder, "load_format": "dummy", "device": "cuda"}
    config = EngineConfig.from_args(tensor_parallel_size=options.tp, warm_spares=options.spares, **settings)
    ray.init(address="local", include_dashboard=False, log_to_driver=False, namespace="pauses")
    try:
        engine = Engine(config)
        try:
            rows = asyncio.run(measure(engine, options.faults.split(","), options.max_tokens, options.settle_s))
        finally:
            engine.stop()
    finally:
        ray.shutdown()
    print("| fault | longest pause | ranks kept | identical |\n|---|---|---|---|")
    print("\n".join(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
