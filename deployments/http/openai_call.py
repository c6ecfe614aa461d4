"""Call: what completions and chats do alike, from a request's body to its answer, whole or as events."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from typing import Any, Generic, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from deployments.generation import Batch
from deployments.http.answers import answer
from deployments.http.context import answer_headers, answer_id, read, service_of
from deployments.http.errors import NotSupported, openai_json
from deployments.http.openai_replies import UNSET, Unset, Usage
from deployments.http.openai_types import GenerationRequest
from deployments.service import ModelService

Body = TypeVar("Body", bound=GenerationRequest)


class Call(ABC, Generic[Body]):
    """One request on its way: its batch, and how its answer looks."""

    prefix: str
    """What the ids of its answers begin with."""

    def __init__(self, service: ModelService, body: Body, answer_id: str) -> None:
        if body.stream and body.prompt_logprobs is not None:
            raise NotSupported("prompt_logprobs: they cannot be streamed", param="prompt_logprobs")
        self.service, self.body, self.id = service, body, answer_id
        self.created = int(time.time())
        self.batch = Batch()

    @abstractmethod
    async def start(self) -> None:
        """Tokenize and submit; nothing is submitted when anything is at fault."""

    @abstractmethod
    async def answer(self) -> msgspec.Struct:
        """The whole answer."""

    @abstractmethod
    def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events."""

    def submit(self, prompts: list[list[int]], params: Any) -> None:
        """Start a request a prompt."""
        salt = self.body.cache_salt or ""
        self.batch = self.service.start_batch(prompts, params, request_id=self.id, cache_salt=salt)

    def shown(self, told: Usage | None) -> Usage | Unset | None:
        """An event's `usage`: there, or null where it comes later, or left out."""
        return told if told is not None or self.body.include_usage else UNSET


async def respond(request: Request, body_type: type[Body], call_type: type[Call[Body]]) -> Response:
    """Read a request's body, run it, and answer."""
    service = service_of(request)
    body = await read(request, body_type)
    call = call_type(service, body, answer_id(request, body, call_type.prefix))
    await call.start()
    return await answer(request, call, stream=body.stream, on_error=openai_json, headers=answer_headers(request, body))
