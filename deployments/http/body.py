"""Request bodies: read under a limit, parsed into pydantic types, every fault a RequestError that names the field."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from deployments.http.errors import BodyTooLarge
from engine.errors import RequestError

Body = TypeVar("Body", bound=BaseModel)


async def read_body(request: Request, limit_bytes: int) -> bytes:
    """The whole body. Raises BodyTooLarge as soon as it is known to be, without reading the rest."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit_bytes:
        raise _too_large(int(declared), limit_bytes)
    chunks: list[bytes] = []
    size = 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit_bytes:
                raise _too_large(size, limit_bytes)
            chunks.append(chunk)
    except ClientDisconnect:
        raise RequestError("the client went away before its request was whole") from None
    return b"".join(chunks)


def parse(kind: type[Body], body: bytes) -> Body:
    """`body` as a `kind`. Raises RequestError naming the field at fault."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _fault(error) from None


def ignored_fields(body: BaseModel, prefix: str = "") -> list[str]:
    """Paths of the fields of `body`, and of what it is made of, that nobody knows, each once."""
    names = [prefix + name for name in body.model_extra or ()]
    for name in body.model_fields_set:
        value = getattr(body, name, None)
        for part, path in [(v, f"{name}[]") for v in value] if isinstance(value, list) else [(value, name)]:
            if isinstance(part, BaseModel):
                names += ignored_fields(part, f"{prefix}{path}.")
    return list(dict.fromkeys(names))


def _fault(error: ValidationError) -> RequestError:
    fault = error.errors(include_url=False, include_context=False)[0]
    if fault["type"] == "json_invalid":
        return RequestError(
            f"the body is not valid JSON: {fault['msg'].removeprefix('Invalid JSON: ')}", code="invalid_json"
        )
    if not fault["loc"]:
        return RequestError("the body must be a JSON object")
    param = ""
    for part in fault["loc"]:
        if isinstance(part, int):
            param += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "int", "float", "bool", "none"):
            param += f".{part}" if param else part
        else:
            break  # the rest names branches of a union
    if fault["type"] == "missing":
        return RequestError(f"{param}: this field is required", param=param)
    return RequestError(f"{param}: got {fault['input']!r:.100}: {fault['msg']}", param=param)


def _too_large(size: int, limit_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body has {size} bytes or more; at most {limit_bytes} are allowed")
