"""Server-sent events: a response whose events are sent as they come, and which ends when its client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from deployments.http.last_words import leave_words
from engine.errors import EngineUnavailable

DONE = b"data: [DONE]\n\n"
Result = TypeVar("Result")
_GONE = EngineUnavailable("the process that ran this request died; ask again")
_json = msgspec.json.Encoder()


def event(payload: Any) -> bytes:
    """One event with `payload` as JSON."""
    return b"data: " + _json.encode(payload) + b"\n\n"


async def start_stream(
    receive: Receive,
    events: AsyncGenerator[bytes, None],
    *,
    on_error: Callable[[BaseException], bytes],
    headers: dict[str, str] | None = None,
) -> Response:
    """A response that sends `events`, once the first of them is there.

    What the generator raises before that is raised here, and so can still choose the status. on_error makes the data of
    a last event from what it raises later.
    """
    first = await until_disconnect(receive, anext(events))
    return EventStream(first, events, on_error, headers or {}) if first is not None else Response(status_code=499)


class EventStream(Response):
    """Sends `first` and then each item of `events` as it comes. The generator is closed when the client disconnects."""

    def __init__(
        self,
        first: bytes,
        events: AsyncGenerator[bytes, None],
        on_error: Callable[[BaseException], bytes],
        headers: dict[str, str],
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers})
        self.headers["content-type"] = "text/event-stream; charset=utf-8"
        del self.headers["content-length"]
        self._first = first
        self._events = events
        self._on_error = on_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        withdraw = leave_words(scope, receive, self._last_event(_GONE))
        sender = asyncio.ensure_future(self._send_all(send, withdraw))
        leaver = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((sender, leaver), return_when=asyncio.FIRST_COMPLETED)
            if sender.done():
                sender.result()
        finally:
            # Cancelled either by a disconnect seen here, or from outside by whoever runs this response.
            for task in (sender, leaver):
                task.cancel()
            withdraw()
            await asyncio.gather(sender, leaver, return_exceptions=True)

    def _last_event(self, error: BaseException) -> bytes:
        return b"data: " + self._on_error(error) + b"\n\n"

    async def _send_all(self, send: Send, withdraw: Callable[[], None]) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._events) as events:
            try:
                await send(_body(self._first, more=True))
                async for item in events:
                    await send(_body(item, more=True))
            except Exception as error:
                await send(_body(self._last_event(error), more=True))
        withdraw()
        await send(_body(b"", more=False))


async def until_disconnect(receive: Receive, work: Awaitable[Result]) -> Result | None:
    """The result of `work`; None when the client goes away first, and then `work` is cancelled."""
    worker = asyncio.ensure_future(work)
    leaver = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((worker, leaver), return_when=asyncio.FIRST_COMPLETED)
        return worker.result() if worker.done() else None
    finally:
        for task in (worker, leaver):
            task.cancel()
        await asyncio.gather(worker, leaver, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _body(data: bytes, *, more: bool) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}
