"""Clients of a driver over ranks that hash: what they ask, collect and expect."""

import asyncio
import contextlib
import threading

from cluster.driver_client import DriverClient
from cluster.inbox import Call
from cluster.messages import error_of
from engine.request import Request
from engine.sampling_params import SamplingParams
from tests.hash_model import expected_tokens


def make_request(name, length=5, **params):
    params = {"max_tokens": 20, "seed": len(name), **params}
    return Request.create(name, [2 + (len(name) + i) % 90 for i in range(length)], SamplingParams(**params))


class Collector:
    """What a replica would keep: every sample's tokens and end."""

    def __init__(self):
        self.tokens, self.ends, self.errors = {}, {}, {}
        self.batches = []
        self.disconnected = []
        self.changed = asyncio.Event()

    def on_outputs(self, outputs):
        self.batches.append(len(outputs))
        for output in outputs:
            key = (output.request_id, output.index)
            assert key not in self.ends, "output after the end"
            self.tokens.setdefault(key, []).extend(output.token_ids)
            if output.finish_reason is not None:
                self.ends[key] = output.finish_reason
                if output.finish_reason == "error":
                    self.errors[key] = error_of(output)
        self.changed.set()

    def on_disconnect(self, reason):
        self.disconnected.append(reason)
        self.changed.set()

    async def until(self, condition, timeout_s=120):
        async with asyncio.timeout(timeout_s):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


async def join(driver):
    collector = Collector()
    client = await DriverClient.connect(
        driver.ticket, on_outputs=collector.on_outputs, on_disconnect=collector.on_disconnect
    )
    return client, collector


@contextlib.asynccontextmanager
async def standing_still(driver, client):
    """The driver's loop does nothing, between two steps: what the client sends meanwhile it finds all at once."""
    go_on = threading.Event()
    driver.loop.post(None, Call(go_on.wait))
    try:
        yield
        await client.health()  # comes after what was sent before it, and needs no loop
    finally:
        go_on.set()


def assert_expected(collector, requests, model_len=64):
    for request in requests:
        for index, (tokens, reason) in enumerate(expected_tokens(request, model_len)):
            key = (request.request_id, index)
            assert collector.tokens[key] == tokens, key
            assert collector.ends[key] == reason, key


async def assert_no_blocks_used(client, num_blocks=1000):
    stats = await client.stats()
    assert (stats["running"], stats["waiting"]) == (0, 0)
    assert (stats["used_blocks"], stats["free_blocks"]) == (0, num_blocks)
