"""What every route needs: the service as its caller sees it, this request's id, a parsed body, a model that exists."""

from __future__ import annotations

import base64
import binascii
import logging
from typing import TypeVar

from pydantic import BaseModel
from starlette.requests import Request

from deployments.caller import ApiKeys, Caller
from deployments.http.body import ignored_fields, parse, read_body
from deployments.http.errors import Unauthorized, request_id_of
from deployments.http.openai_types import OpenAIRequest
from deployments.service import ModelService
from engine.errors import ModelNotFound, RequestError

logger = logging.getLogger("ray.serve")

MAX_REQUEST_ID_CHARS = 128
MAX_TOLD_FIELDS = 1000
TENANT_HEADER = "x-manta-tenant"
TIMEOUT_HEADER = "x-request-timeout"
IGNORED_HEADER = "x-manta-ignored-fields"
STAND_INS = ("tgi", "dummy")
"""What clients of Text Generation Inference call the one model of a server."""
Body = TypeVar("Body", bound=BaseModel)
OpenAIBody = TypeVar("OpenAIBody", bound=OpenAIRequest)


def open_service(request: Request) -> ModelService:
    """The service behind this application, for what anybody may ask."""
    service: ModelService = request.app.state.service
    return service


def service_of(request: Request) -> ModelService:
    """The service behind this application, as this request's caller sees it. Raises Unauthorized or RequestError."""
    return open_service(request).seen_by(caller_of(request))


def caller_of(request: Request) -> Caller:
    """Who sent this request, by its headers: the holder of its API key, or else the tenant it names.

    Raises Unauthorized when there are keys and it shows none of them, and RequestError for a bad x-request-timeout.
    """
    state = request.scope.setdefault("state", {})
    caller: Caller | None = state.get("caller")
    if caller is None:
        keys: ApiKeys = request.app.state.keys
        caller = Caller()
        if len(keys):
            holder = keys.holder(_shown_key(request))
            if holder is None:
                raise Unauthorized(
                    "an API key that is known here is needed: authorization: Bearer KEY, or x-api-key: KEY"
                )
            caller = Caller(holder, trusted=True)
        caller.name(request.headers.get(TENANT_HEADER))
        if (timeout := request.headers.get(TIMEOUT_HEADER)) is not None:
            caller.wait(timeout, TIMEOUT_HEADER)
        state["caller"] = caller
    return caller


def _shown_key(request: Request) -> str:
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode("utf-8").partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return request.headers.get("x-api-key", "")


async def body_of(request: Request, kind: type[Body]) -> Body:
    """The request's body as a `kind`. Raises RequestError naming the field at fault, and BodyTooLarge."""
    limit_bytes = int(service_of(request).config.max_body_mib * 2**20)
    return parse(kind, await read_body(request, limit_bytes))


async def read(request: Request, kind: type[OpenAIBody]) -> OpenAIBody:
    """The request's body as a `kind`, for a model that is served. Raises RequestError, and EngineOverloaded."""
    service = service_of(request)
    body = await body_of(request, kind)
    check_model(service, body.model)
    caller = caller_of(request)
    caller.name(body.safety_identifier or body.user)
    if body.timeout is not None:
        caller.wait(body.timeout, "timeout")
    service.check_room()
    return body


def check_model(service: ModelService, name: str | None) -> None:
    """Raise ModelNotFound unless `name` is served; None is the served model, and so are TGI's clients' stand-ins."""
    if name is not None and name not in STAND_INS and not service.serves(name):
        served = ", ".join(service.names)
        raise ModelNotFound(
            f"model {name!r:.200} is not served here; served: {served}", param="model", code="model_not_found"
        )


def answer_headers(request: Request, body: BaseModel) -> dict[str, str]:
    """Names the body's fields that were ignored, and logs each name once."""
    told: set[str] = request.app.state.ignored_fields
    ignored = [name for name in ignored_fields(body) if name.isascii() and name.isprintable()][:20]
    if not ignored:
        return {}
    for name in set(ignored) - told:
        if len(told) < MAX_TOLD_FIELDS:
            told.add(name)
            logger.warning("the request field %r is unknown here and ignored (told once)", name)
    return {IGNORED_HEADER: ", ".join(ignored)[:500]}


def answer_id(request: Request, body: OpenAIRequest, prefix: str) -> str:
    """The id of the answer, which logs and the engine carry too."""
    given = body.request_id
    if given is not None and not (given.isascii() and given.isprintable() and 0 < len(given) <= MAX_REQUEST_ID_CHARS):
        raise RequestError(
            f"request_id: got {given!r:.200}, allowed: 1 to {MAX_REQUEST_ID_CHARS} printable ASCII characters",
            param="request_id",
        )
    return f"{prefix}-{given or request_id_of(request)}"
