"""Answers: a response as JSON, and what a call answers, whole or as server-sent events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from deployments.http.sse import start_stream, until_disconnect

_json = msgspec.json.Encoder()


class JsonResponse(Response):
    """A response whose body is `content` as JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return _json.encode(content)


class Answering(Protocol):
    """A call that has been started."""

    async def answer(self) -> Any:
        """The whole answer."""
        ...

    def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events."""
        ...


async def answer(
    request: Request,
    call: Answering,
    *,
    stream: bool | None,
    on_error: Callable[[BaseException], bytes],
    headers: dict[str, str],
) -> Response:
    """What `call` answers, until the client goes away. on_error makes the data of the last event of a broken stream."""
    if stream:
        return await start_stream(request.receive, call.events(), on_error=on_error, headers=headers)
    return JsonResponse(await until_disconnect(request.receive, call.answer()), headers=headers)
