"""/openapi.json, made from the routes and the request types, and /docs, a page that shows it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from deployments.http.answers import JsonResponse
from deployments.http.anthropic_types import CountRequest, MessagesRequest
from deployments.http.openai_types import ChatCompletionRequest, CompletionRequest, EmbeddingRequest
from deployments.http.pages import page, product_version
from deployments.http.responses_types import ResponsesRequest
from deployments.http.tgi_types import CompatGenerateRequest, GenerateRequest
from deployments.http.tokenization import DetokenizeRequest, TokenizeRequest
from engine.sampling_params import RANGES

BODIES: dict[str, type[BaseModel]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/messages": MessagesRequest,
    "/v1/messages/count_tokens": CountRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    "/": CompatGenerateRequest,
    "/generate": GenerateRequest,
    "/generate_stream": GenerateRequest,
}
"""The body of each POST route."""
_MEANT = {"max_completion_tokens": "max_tokens", "max_output_tokens": "max_tokens", "top_logprobs": "logprobs"}
"""Fields by other names than SamplingParams'."""
TGI_ROUTES = ("/", "/generate", "/generate_stream")
_REFS = "#/components/schemas/{model}"


async def openapi_json(request: Request) -> Response:
    """Every route of this server, as OpenAPI 3.1."""
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    return JsonResponse(document(routes))


async def docs(request: Request) -> Response:  # noqa: ARG001
    """A page that shows /openapi.json."""
    return page("docs.html")


def document(routes: Sequence[Route]) -> dict[str, Any]:
    """The OpenAPI document of `routes`."""
    schemas: dict[str, Any] = {}
    paths: dict[str, Any] = {}
    for route in routes:
        path = route.path.replace(":path}", "}")
        for method in sorted((route.methods or set()) - {"HEAD"}):
            paths.setdefault(path, {})[method.lower()] = _operation(path, method, route, schemas)
    info = {"title": "Manta", "version": product_version(), "description": "An LLM serving cluster on Ray."}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": {"schemas": schemas}}


def _operation(path: str, method: str, route: Route, schemas: dict[str, Any]) -> dict[str, Any]:
    summary = " ".join((inspect.getdoc(route.endpoint) or "").split("\n\n")[0].split())
    name = f"{method.lower()}{path.replace('/', '_').replace('{', '').replace('}', '')}"
    operation: dict[str, Any] = {"summary": summary, "operationId": name, "responses": _responses(path, method)}
    names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    if names:
        text = {"type": "string", "minLength": 1}
        operation["parameters"] = [{"name": n, "in": "path", "required": True, "schema": text} for n in names]
    if method == "POST":
        kind = BODIES[path]
        schema = kind.model_json_schema(ref_template=_REFS)
        if path not in TGI_ROUTES:
            _tell_ranges(schema)
        schemas.update(schema.pop("$defs", {}))
        schemas[kind.__name__] = schema
        reference = {"$ref": _REFS.format(model=kind.__name__)}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": reference}}}
    return operation


def _tell_ranges(schema: dict[str, Any]) -> None:
    """Put what SamplingParams allows into the schema of a body; the types leave the check, and its words, to it."""
    for name, field in schema["properties"].items():
        limits = RANGES.get(_MEANT.get(name, name), {})
        if name == "max_tokens" and "echo" in schema["properties"]:
            limits = limits | {"minimum": 0}  # the prompt alone
        if name == "truncate_prompt_tokens":
            limits = limits | {"minimum": -1}  # to what leaves room
        for kind in field.get("anyOf", [field]):
            if kind.get("type") in ("integer", "number"):
                kind.update(limits)


def _responses(path: str, method: str) -> dict[str, Any]:
    answers = {"200": {"description": "the answer; a stream of server-sent events when `stream` is true"}}
    if method == "POST":
        bad = "422" if path in TGI_ROUTES else "400"
        answers[bad] = {"description": "what is wrong, and with which field"}
        answers["413"] = {"description": "the body is too large"}
        answers["429"] = {"description": "the queue is full; Retry-After says when to come back"}
        if path in TGI_ROUTES:
            answers["424"] = {"description": "the generation failed"}
    answers["404"] = {"description": "no such model, response or file"}
    answers["503"] = {"description": "no engine can take requests now"}
    return answers


ROUTES = [
    Route("/openapi.json", openapi_json, methods=["GET"]),
    Route("/docs", docs, methods=["GET"]),
]
