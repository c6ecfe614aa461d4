"""What every route needs: the service, this request's id, a parsed body, a model name that exists."""

from __future__ import annotations

import logging
from typing import TypeVar

from starlette.requests import Request

from deployments.http.body import parse, read_body
from deployments.http.errors import request_id_of
from deployments.http.openai_types import GenerationRequest
from deployments.service import ModelService
from engine.errors import ModelNotFound, RequestError

logger = logging.getLogger("ray.serve")

MAX_REQUEST_ID_CHARS = 128
IGNORED_HEADER = "x-manta-ignored-fields"
STAND_INS = ("tgi", "dummy")
"""What clients of Text Generation Inference call the one model of a server."""
Body = TypeVar("Body", bound=GenerationRequest)
_told: set[str] = set()


def service_of(request: Request) -> ModelService:
    """The service behind this application."""
    service: ModelService = request.app.state.service
    return service


async def read(request: Request, kind: type[Body]) -> Body:
    """The request's body as a `kind`, for a model that is served. Raises RequestError."""
    service = service_of(request)
    body = parse(kind, await read_body(request, int(service.config.max_body_mib * 2**20)))
    check_model(service, body.model)
    return body


def check_model(service: ModelService, name: str | None) -> None:
    """Raise ModelNotFound unless `name` is served; None is the served model, and so are TGI's clients' stand-ins."""
    if name is not None and name not in STAND_INS and not service.serves(name):
        served = ", ".join(service.names)
        raise ModelNotFound(
            f"model {name!r:.200} is not served here; served: {served}", param="model", code="model_not_found"
        )


def answer_headers(body: GenerationRequest) -> dict[str, str]:
    """Names the body's fields that were ignored, and logs each name once."""
    ignored = [name for name in body.ignored if name.isascii() and name.isprintable()][:20]
    if not ignored:
        return {}
    for name in set(ignored) - _told:
        if len(_told) < 1000:
            _told.add(name)
            logger.warning("the request field %r is unknown here and ignored (told once)", name)
    return {IGNORED_HEADER: ", ".join(ignored)[:500]}


def answer_id(request: Request, body: GenerationRequest, prefix: str) -> str:
    """The id of the answer, which logs and the engine carry too."""
    given = body.request_id
    if given is not None and not (given.isascii() and given.isprintable() and 0 < len(given) <= MAX_REQUEST_ID_CHARS):
        raise RequestError(
            f"request_id: got {given!r:.200}, allowed: 1 to {MAX_REQUEST_ID_CHARS} printable ASCII characters",
            param="request_id",
        )
    return f"{prefix}-{given or request_id_of(request)}"
