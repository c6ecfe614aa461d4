"""Clients that leave, do not read, or do not speak properly harm nobody but themselves."""

import asyncio

import msgspec
import pytest

from cluster.driver_client import DriverClient
from cluster.framing import Connection, Ticket, dial
from cluster.messages import Submit, Welcome, decode_for_client, encode
from engine.errors import EngineUnavailable
from tests.driver_clients import assert_expected, assert_no_blocks_used, join, make_request
from tests.fakes import HashExecutor, engine_config


def test_a_client_that_goes_away_frees_its_blocks_and_no_others(make_driver):
    async def main():
        config = engine_config(max_model_len=50_000)
        driver = make_driver(HashExecutor(config, 50_000), config=config)  # room for all, however long this takes
        staying, kept = await join(driver)
        leaving, lost = await join(driver)
        staying.submit(make_request("stays", ignore_eos=True, max_tokens=40_000))
        for i in range(4):
            leaving.submit(make_request(f"leaves{i}", ignore_eos=True, max_tokens=40_000))
        await lost.until(lambda: len(lost.tokens) == 4)
        staying.abort("leaves0")  # not its own
        assert (await staying.stats())["running"] == 5
        await leaving.close()
        assert lost.disconnected == []
        while (await staying.stats())["running"] != 1:
            assert not staying.closed
        already = len(kept.tokens["stays", 0])
        await kept.until(lambda: len(kept.tokens["stays", 0]) > already)
        staying.abort("stays")
        await assert_no_blocks_used(staying, 50_000)
        await staying.close()

    asyncio.run(main())


def test_a_client_that_does_not_read_is_dropped_and_harms_nobody(make_driver):
    async def main():
        driver = make_driver(max_model_len=50_000, max_client_bytes=100_000)
        lazy = Connection(dial(driver.ticket, "lazy"))
        for i in range(4):
            lazy.send(encode(Submit(make_request(f"lazy{i}", ignore_eos=True, max_tokens=40_000))))
        client, collector = await join(driver)
        while not (stats := await client.stats())["generated_tokens"] or stats["running"]:
            assert not client.closed
        request = make_request("fine", ignore_eos=True, max_tokens=10)
        client.submit(request)
        await collector.until(lambda: collector.ends)
        assert_expected(collector, [request])
        await assert_no_blocks_used(client)
        assert isinstance(decode_for_client(lazy.receive()), Welcome)
        lazy.close()
        await client.close()

    asyncio.run(main())


def test_a_malformed_message_drops_its_sender_only(make_driver):
    async def main():
        driver = make_driver()
        client, collector = await join(driver)
        broken = Connection(dial(driver.ticket, "broken"))
        assert isinstance(decode_for_client(broken.receive()), Welcome)
        broken.send(msgspec.msgpack.encode(["submit", {"prompt": 3}]))
        assert broken.receive() is None
        request = make_request("fine")
        client.submit(request)
        await collector.until(lambda: collector.ends)
        assert_expected(collector, [request])
        await client.close()

    asyncio.run(main())


def test_nobody_there():
    async def main():
        with pytest.raises(EngineUnavailable, match="cannot be reached"):
            await DriverClient.connect(Ticket("unix:/nonexistent/socket", b"x" * 32), on_outputs=print)

    asyncio.run(main())


def test_a_wrong_token_is_not_let_in(make_driver):
    async def main():
        ticket = Ticket(make_driver().ticket.address, b"x" * 32)
        with pytest.raises(EngineUnavailable):
            await DriverClient.connect(ticket, on_outputs=print)

    asyncio.run(main())
