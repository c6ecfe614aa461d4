"""The ASGI application: every route, one error shape, a request id on every answer."""

from __future__ import annotations

import logging
import secrets

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.caller import ApiKeys
from deployments.http import anthropic, health, openai, openapi, pages, responses, tgi, tokenization
from deployments.http.context import MAX_REQUEST_ID_CHARS
from deployments.http.errors import on_error, openai_response
from deployments.http.last_words import LastWords
from deployments.http.responses_store import ResponseStore
from deployments.service import ModelService
from engine.errors import MantaError

logger = logging.getLogger("ray.serve")

ROUTES = [
    *health.ROUTES,
    *openai.ROUTES,
    *responses.ROUTES,
    *tokenization.ROUTES,
    *anthropic.ROUTES,
    *tgi.ROUTES,
    *pages.ROUTES,
    *openapi.ROUTES,
]


def create_app(
    service: ModelService, *, echo_request_id: bool = True, last_words: LastWords | None = None
) -> Starlette:
    """The application that serves `service` over HTTP. Without echo_request_id the server around it does that.

    last_words end the streams with an error event should this process die; without, they are cut. Raises ConfigError
    when its API keys cannot be read.
    """
    app = Starlette(
        routes=ROUTES,
        middleware=[Middleware(Frame, echo_request_id=echo_request_id)],
        exception_handlers={MantaError: on_error, HTTPException: on_error},
    )
    app.state.service = service
    app.state.last_words = last_words
    app.state.responses = ResponseStore()
    app.state.ignored_fields = set()
    app.state.keys = ApiKeys.load(service.config.api_keys_file)
    if not len(app.state.keys):
        logger.info("no API keys: whoever reaches the port may use it")
    app.router.redirect_slashes = False
    return app


class Frame:
    """Around every request: gives it the client's x-request-id, or makes one; turns a bug of ours into a 500."""

    def __init__(self, app: ASGIApp, *, echo_request_id: bool) -> None:
        self.app = app
        self.echo_request_id = echo_request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        request_id = given.decode("latin-1")[:MAX_REQUEST_ID_CHARS] if given else secrets.token_hex(16)
        scope.setdefault("state", {})["request_id"] = request_id
        headers = [(b"x-request-id", request_id.encode("latin-1"))] if self.echo_request_id else []

        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message = {**message, "headers": [*message["headers"], *headers]}
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            logger.exception("request %s failed", request_id)
            if started:
                raise
            await openai_response(error)(scope, receive, send_with_id)
