"""ModelHandle: a served model seen from any other Ray job, whose calls outlive the replica that runs them."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import ReplicaUnavailableError

from engine.errors import EngineUnavailable, RequestFailed

logger = logging.getLogger(__name__)

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
LOST = (RayActorError, ReplicaUnavailableError, EngineUnavailable)
"""What a call ends with when its replica died, or had no engine."""


class ModelHandle:
    """`serve.get_app_handle` with a longer breath: a call whose replica dies is made again on another.

    Its seed is fixed before the first try, and draws depend on the seed and the position only: the second answer is
    the first one. What a stream has given out already is compared with it and not given out again.
    """

    def __init__(self, application: str, *, tries: int = 3) -> None:
        """application is its name in the YAML file; tries counts replicas lost in one call."""
        self._handle = serve.get_app_handle(application)
        self._tries = tries

    async def generate(self, prompt: Prompt, /, **params: Any) -> str | list[str]:
        """The text that follows `prompt`; a list when n is above 1. Raises RequestError and its kin.

        When no try is left, it raises what ended the last one.
        """
        params = _seeded(params)
        answer: str | list[str] = await self._ask(lambda: self._handle.remote(prompt, **params))
        return answer

    async def embed(
        self, prompts: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]], /, **options: Any
    ) -> list[float] | list[list[float]]:
        """Each prompt as a vector of length 1; a single text, or a single list of token ids, as one vector.

        options are those of `LLMServer.embed`. Raises as `generate`.
        """
        call = self._handle.embed
        vectors: list[float] | list[list[float]] = await self._ask(lambda: call.remote(prompts, **options))
        return vectors

    async def stream(self, prompt: Prompt, /, **params: Any) -> AsyncGenerator[str, None]:
        """The text that follows `prompt`, in pieces. Raises as `generate`, and RequestFailed when another replica
        gives other text, of which nothing is given out."""
        params, given = _seeded(params), ""
        for left in reversed(range(self._tries)):
            again = ""
            try:
                async for piece in self._handle.options(stream=True).remote(prompt, **params):
                    again += piece
                    if not again.startswith(given[: len(again)]):
                        raise RequestFailed("the replica was lost, and another one gives other text")
                    if len(again) > len(given):
                        fresh, given = again[len(given) :], again
                        yield fresh
                if len(again) < len(given):
                    raise RequestFailed("the replica was lost, and another one gives less text")
                return
            except LOST as error:
                await self._pause(error, left)

    async def _ask(self, call: Callable[[], Awaitable[Any]]) -> Any:
        """What `call` gives, made again when its replica is lost. Raises what ended the last try."""
        for left in reversed(range(self._tries)):
            try:
                return await call()
            except LOST as error:
                await self._pause(error, left)
        raise AssertionError("unreachable")

    async def _pause(self, error: Exception, tries_left: int) -> None:
        """Wait as long as the loss says, if it does; raise it when it was the last."""
        if not tries_left:
            raise error
        logger.warning("a replica was lost (%s); asking another", type(error).__name__)
        await asyncio.sleep(getattr(error, "retry_after_s", 0.0))


def _seeded(params: dict[str, Any]) -> dict[str, Any]:
    return params if params.get("seed") is not None else {**params, "seed": secrets.randbits(62)}
