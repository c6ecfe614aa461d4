"""POST /v1/embeddings."""

from __future__ import annotations

import base64
import time

from starlette.requests import Request
from starlette.responses import Response

from deployments.embeddings import embed
from deployments.http.answers import JsonResponse
from deployments.http.context import answer_headers, answer_id, read, service_of
from deployments.http.openai_replies import Embedding, EmbeddingList, EmbeddingUsage, PromptTokensDetails
from deployments.http.openai_types import EmbeddingRequest, prompts_of
from deployments.http.sse import until_disconnect
from deployments.service import ModelService
from engine.embedding import Vector
from engine.errors import RequestError

MAX_INPUTS = 2048


async def create_embeddings(request: Request) -> Response:
    """Each input as a vector of length 1, made of the model's last hidden states."""
    service = service_of(request)
    body = await read(request, EmbeddingRequest)
    answer = await until_disconnect(request.receive, _embed(service, body, answer_id(request, body, "embd")))
    return JsonResponse(answer, headers=answer_headers(request, body))


async def _embed(service: ModelService, body: EmbeddingRequest, answer_id: str) -> EmbeddingList:
    created = int(time.time())
    inputs = prompts_of(body.input, "input")
    if len(inputs) > MAX_INPUTS:
        raise RequestError(f"input: {len(inputs)} inputs, allowed: at most {MAX_INPUTS}", param="input")
    try:
        embedded = await embed(
            service,
            inputs,
            pooling=body.pooling,
            dimensions=body.dimensions,
            truncate_prompt_tokens=body.truncate_prompt_tokens,
            priority=body.priority,
            request_id=answer_id,
            cache_salt=body.cache_salt,
        )
    except RequestError as error:
        if error.param == "prompt":
            error.param = "input"
        raise
    spell = _base64 if body.encoding_format == "base64" else _numbers
    count = sum(len(result.prompt_token_ids) for result, _ in embedded)
    cached = sum(result.num_cached_tokens for result, _ in embedded)
    usage = EmbeddingUsage(count, count, PromptTokensDetails(cached))
    data = [Embedding(index, spell(vector)) for index, (_, vector) in enumerate(embedded)]
    return EmbeddingList(answer_id, created, service.name, data, usage)


def _numbers(vector: Vector) -> list[float]:
    numbers: list[float] = vector.tolist()
    return numbers


def _base64(vector: Vector) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
