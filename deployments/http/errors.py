"""The one error table: what any exception means to an HTTP client."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from deployments.http.answers import JsonResponse
from engine.errors import EngineUnavailable, MantaError, RequestError

logger = logging.getLogger("ray.serve")


class BodyTooLarge(RequestError):
    """A request body above the configured limit."""

    http_status = 413


class NotSupported(RequestError):
    """A field that this server knows and cannot obey."""


class Unauthorized(RequestError):
    """A call without an API key that is known here."""

    http_status = 401
    kind = "authentication_error"

    def __init__(self, message: str) -> None:
        super().__init__(message, code="invalid_api_key")


class ErrorBody(msgspec.Struct):
    """OpenAI's `error` object."""

    message: str
    type: str
    param: str | None = None
    code: str | int | None = None


class Failure(msgspec.Struct):
    """What is told of an exception, whatever the dialect."""

    status: int
    body: ErrorBody
    headers: dict[str, str] = {}


_HTTP_TYPES = {404: "not_found_error", 405: "method_not_allowed_error"}
_json = msgspec.json.Encoder()


def failure_of(error: BaseException) -> Failure:
    """Status, text and headers for `error`. What is not meant for clients becomes a bare 500."""
    if isinstance(error, MantaError):
        headers = {}
        retry_after_s = getattr(error, "retry_after_s", None)
        if retry_after_s is not None:
            headers["retry-after"] = str(max(1, round(retry_after_s)))
        if isinstance(error, Unauthorized):
            headers["www-authenticate"] = (
                'Bearer realm="manta", Basic realm="manta"'  # Basic: what a browser can ask for
            )
        param, code = getattr(error, "param", None), getattr(error, "code", None)
        return Failure(error.http_status, ErrorBody(str(error), error.kind, param, code), headers)
    if isinstance(error, HTTPException):
        kind = _HTTP_TYPES.get(error.status_code, "invalid_request_error")
        return Failure(error.status_code, ErrorBody(error.detail, kind), dict(error.headers or {}))
    return Failure(500, ErrorBody("internal server error; the server's log has the details", "internal_server_error"))


def in_terms_of(error: RequestError, names: Mapping[str, str]) -> RequestError:
    """`error`, told of the field that the caller knows by another name than the engine does."""
    if error.param is not None and (name := names.get(error.param)) is not None:
        if error.param != "prompt":  # that one is a word of its messages, too
            error.args = (str(error).replace(error.param, name),)
        error.param = name
    return error


def openai_json(error: BaseException) -> bytes:
    """OpenAI's error object as JSON, for a body or an event."""
    return _json.encode({"error": failure_of(error).body})


def openai_response(error: BaseException) -> Response:
    """The response that ends a request in `error`."""
    failure = failure_of(error)
    return JsonResponse({"error": failure.body}, failure.status, failure.headers)


async def on_error(request: Request, error: Exception) -> Response:
    """Starlette's exception handler, for what is raised on purpose."""
    if isinstance(error, HTTPException) and error.status_code in (404, 405):
        what = "no such route" if error.status_code == 404 else "method not allowed"
        error = HTTPException(error.status_code, f"{what}: {request.method} {request.url.path}", error.headers)
    refused = isinstance(error, EngineUnavailable)  # its cause is told once, where it lies
    if isinstance(error, MantaError) and error.http_status >= 500 and not refused:
        logger.warning("request %s failed: %s", request_id_of(request), error)
    return openai_response(error)


def request_id_of(request: Request) -> str:
    """The id that asgi.py gave this request."""
    state: dict[str, Any] = request.scope.get("state") or {}
    return str(state.get("request_id", "-"))
