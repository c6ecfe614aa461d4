"""A client that goes away, and one that is too slow: what it had running ends, and its blocks are free."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

LONG = {"prompt": "Count:", "n": 8, "temperature": 1.0, "ignore_eos": True, "max_tokens": 240}
STEPS = 20
MOST_TOKENS = 8 * (STEPS + 3)
"""What may be drawn before a client leaves, and by the steps that are in flight then."""


def drawn(server: Any) -> int:
    return int(server.stats()["generated_tokens"])


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_leaving_a_stream(server: Any, path: str) -> None:
    body = {**LONG, "messages": [{"role": "user", "content": "Count."}], "stream": True}
    before = drawn(server)
    with server.steps(STEPS):
        with httpx.stream("POST", f"{server.url}{path}", json=body, timeout=100) as answer:
            lines = answer.iter_lines()
            for _ in range(20):
                next(lines)
            assert server.stats()["running"] == 8
        server.wait(lambda stats: not stats["unfinished"])
    stats = server.wait_idle()
    assert stats["generated_tokens"] - before <= MOST_TOKENS
    assert stats["free_blocks"] == stats["num_blocks"]


def test_leaving_before_the_answer(server: Any) -> None:
    before = drawn(server)

    async def main() -> None:
        async with httpx.AsyncClient(timeout=200) as client:
            request = asyncio.create_task(client.post(f"{server.url}/v1/completions", json=LONG, timeout=100))
            while not (await client.get(f"{server.url}/stats")).json()["running"]:
                await asyncio.sleep(0)
            request.cancel()
            with pytest.raises(asyncio.CancelledError):
                await request

    with server.steps(STEPS):
        asyncio.run(main())
        server.wait(lambda stats: not stats["unfinished"])
    assert server.wait_idle()["generated_tokens"] - before <= MOST_TOKENS


def test_many_leave_at_once(server: Any) -> None:
    """More streams than slots, all dropped at their first event: nothing is left, and the next answer is right."""

    async def one(client: httpx.AsyncClient, number: int) -> None:
        body = {**LONG, "n": 1, "stream": True, "prompt": f"Count {number}:"}
        async with client.stream("POST", f"{server.url}/v1/completions", json=body, timeout=200) as answer:
            async for _ in answer.aiter_lines():
                return

    async def main() -> None:
        async with httpx.AsyncClient(timeout=200, limits=httpx.Limits(max_connections=64)) as client:
            await asyncio.gather(*[one(client, number) for number in range(48)])

    asyncio.run(main())
    stats = server.wait_idle()
    assert stats["free_blocks"] == stats["num_blocks"]
    body = {"messages": [{"role": "user", "content": "What is 20 + 30?"}]}
    answer = server.http.post("/v1/chat/completions", json=body)
    assert answer.json()["choices"][0]["message"]["content"] == "20 + 30 = 50"


def test_deadline(server: Any) -> None:
    """A request that takes longer than it may is aborted and answered with an error."""
    config = server.service.config
    server.service.config = config.replace(request_timeout_s=0.05)
    try:
        with server.steps(STEPS):
            answer = server.http.post("/v1/completions", json=LONG)
    finally:
        server.service.config = config
    assert answer.status_code == 504
    assert answer.json()["error"]["type"] == "timeout_error"
    server.wait_idle()
