"""Embedding for both transports: prompts in any form, to vectors of length 1."""

from __future__ import annotations

from collections.abc import Sequence

from deployments.service import ModelService
from engine.embedding import Vector, check_dimensions, check_pooling, embedding_params, unit_vector
from engine.output import RequestOutput
from engine.step import Pooling


async def embed(
    service: ModelService,
    prompts: Sequence[str | list[int]],
    *,
    pooling: Pooling | None = None,
    dimensions: int | None = None,
    truncate_prompt_tokens: int | None = None,
    priority: int | None = None,
    request_id: str | None = None,
    cache_salt: str | None = None,
) -> list[tuple[RequestOutput, Vector]]:
    """The vector of every prompt, its first `dimensions` numbers at length 1 again. Raises RequestError and its kin.

    Nothing runs when any prompt is at fault.
    """
    check_pooling(pooling)
    if truncate_prompt_tokens == -1:
        truncate_prompt_tokens = service.config.model_len
    params = embedding_params(truncate_prompt_tokens, priority or 0)
    if dimensions is not None:
        check_dimensions(dimensions, service.hidden_size)
    ids = await service.encode_prompts(prompts, params)
    results = await service.embed(ids, params, pooling=pooling, request_id=request_id, cache_salt=cache_salt or "")
    return [(result, unit_vector(result, dimensions)) for result in results]
