"""LLMServer: the Serve deployment of one model, for HTTP and for handles; it owns a driver."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, TypeGuard

import ray
from ray import serve
from ray.util.placement_group import PlacementGroup
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cluster.driver import start_driver, stop_driver
from cluster.driver_client import DriverClient
from cluster.placement import shortage
from deployments.caller import Caller
from deployments.config import AppConfig
from deployments.embeddings import embed
from deployments.generation import Generation
from deployments.http.asgi import create_app
from deployments.http.last_words import LastWords
from deployments.http.openai_types import prompts_of
from deployments.serve_calls import is_streaming_call, request_id
from deployments.service import ModelService
from engine.errors import ConfigError, EngineUnavailable, MantaError, ModelLoadError, RequestError
from engine.model_config import ModelConfig, resolve
from engine.tokenizer import Tokenizer, default_sampling

logger = logging.getLogger("ray.serve")

MAX_DRIVER_STARTS = 3
"""Failures in a row after which a lost driver is given up."""
MAX_SICK_CHECKS = 3
"""Health checks in a row that find the engine gone before the only replica starts it again: as many as Serve waits."""
PATIENCE_CHECKS = 10
"""Health checks, a second apart, for which the cluster may lack a place before requests are told."""
REVIVE_AFTER_S, REVIVE_AFTER_AT_MOST_S = 2.0, 60.0
"""The pause between two such starts; doubled each time."""

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""A text, token ids, or the messages of a chat."""


class LLMServer:
    """One replica: HTTP, handle calls and texts in this process, the engine in a driver actor beside it."""

    async def __init__(self, config: AppConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        """Load the model on its ranks. Raises ConfigError, ModelLoadError or EngineUnavailable."""
        self._closing = False
        self._sick_checks = self._missing_checks = 0
        self._group = ray.util.get_current_placement_group()
        self._driver: Any = None
        self._client: DriverClient | None = None
        self._restart: asyncio.Task[None] | None = None
        self._last_words: LastWords | None = None
        self._model_config = await asyncio.to_thread(ModelConfig.load, config)
        self.config = resolve(config, self._model_config)
        context = serve.get_replica_context()
        self._name = f"{context.app_name}:{context.replica_id.unique_id}"
        driver = asyncio.ensure_future(self._start_driver())
        tokenizer = await asyncio.to_thread(Tokenizer.load, self.config)
        self.service = ModelService(
            self.config,
            tokenizer,
            vocab_size=self._model_config.vocab_size,
            sampling_defaults=default_sampling(self.config),
        )
        self._last_words = await asyncio.to_thread(LastWords.start)
        self._app = create_app(self.service, echo_request_id=False, last_words=self._last_words)  # Serve echoes
        self._driver = await driver
        await self._connect()
        logger.info("%s serves %s", self._name, ", ".join(self.config.names))

    async def __call__(self, call: Request | Prompt, /, **params: Any) -> Any:
        """Serve one call: an HTTP request, or a prompt from a handle.

        A prompt is a text, token ids or the messages of a chat; params are SamplingParams by name, and `timeout`, in
        seconds, and `tenant`. Returns the text, or a list of n texts; under `handle.options(stream=True)` an async
        generator of text deltas.
        """
        if isinstance(call, Request):
            return _Served(self._app)
        if is_streaming_call():
            return self.stream(call, **params)
        return await self.generate(call, **params)

    async def generate(self, prompt: Prompt, /, **params: Any) -> str | list[str]:
        """The text that follows `prompt`; a list when n is above 1. Raises RequestError and its kin."""
        async with await self._begin(prompt, params) as generation:
            result = await generation.finish()
        texts = [output.text for output in result.outputs]
        return texts if len(texts) > 1 else texts[0]

    async def stream(self, prompt: Prompt, /, **params: Any) -> AsyncGenerator[str, None]:
        """The text that follows `prompt`, in pieces. Raises RequestError and its kin."""
        if params.get("n", 1) != 1:
            raise RequestError("n: a stream of text has one sample; use HTTP for more", param="n")
        async with await self._begin(prompt, params) as generation:
            async for deltas in generation:
                text = "".join(delta.text for delta in deltas)
                if text:
                    yield text

    async def embed(
        self, prompts: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]], /, **options: Any
    ) -> list[float] | list[list[float]]:
        """Each prompt as a vector of length 1; a single text, or a single list of token ids, as one vector.

        options are `pooling`, `dimensions`, `truncate_prompt_tokens` and `priority`, as on /v1/embeddings, and
        `timeout` and `tenant`. Raises RequestError and its kin.
        """
        service = self._service_for(options)
        given = prompts_of(prompts if isinstance(prompts, str) else list(prompts))
        try:
            embedded = await embed(service, given, **options)
        except TypeError as error:  # an unknown keyword
            raise RequestError(str(error)) from None
        vectors: list[list[float]] = [vector.tolist() for _, vector in embedded]
        single = isinstance(prompts, str) or isinstance(prompts[0], int)
        return vectors[0] if single else vectors

    async def check_health(self) -> None:
        """Serve's health check: raises when the engine is gone, stuck, or cannot come back.

        Serve then takes the replica out and makes another. The only replica there is stays, says 503 with the reason
        and when to come back, and starts its engine again until that works: without any, Serve holds requests, and
        /health too, for as long as it takes.
        """
        if self._restart is not None and not self._restart.done():
            await self._look_for_resources()
        health = await self.service.health()
        self._sick_checks = 0 if health.live else self._sick_checks + 1
        if health.live:
            return
        if not await self._is_alone():
            raise EngineUnavailable(f"{self._name}: {health.state}: {health.reason}")
        if self._sick_checks >= MAX_SICK_CHECKS and (self._restart is None or self._restart.done()):
            self._restart = asyncio.ensure_future(self._revive(health.reason))

    async def _look_for_resources(self) -> None:
        """While a driver is being started: tell the service what the cluster lacks for it, once that has lasted."""
        missing = await asyncio.to_thread(_missing, self._group)
        self._missing_checks = self._missing_checks + 1 if missing else 0
        self.service.lacks(missing if self._missing_checks > PATIENCE_CHECKS else "")

    async def _is_alone(self) -> bool:
        """Whether no other replica takes requests now."""
        context = serve.get_replica_context()
        try:
            applications = (await asyncio.to_thread(serve.status)).applications
            states = applications[context.app_name].deployments[context.deployment].replica_states
        except Exception:  # Serve knows better, or there is none
            return False
        return int(states.get("RUNNING", 0)) <= 1

    def __del__(self) -> Any:
        """Serve's end of a replica, after its requests. Serve awaits the result; the interpreter calls it once more."""
        if not self._closing:
            self._closing = True
            return self._close()

    async def _close(self) -> None:
        if self._restart is not None:
            self._restart.cancel()
        if self._client is not None:
            await self._client.close()
        if self._driver is not None:
            await asyncio.to_thread(stop_driver, self._driver)
        if self._last_words is not None:
            self._last_words.close()

    async def _begin(self, prompt: Prompt, params: dict[str, Any]) -> Generation:
        name = request_id()
        variables = params.pop("chat_template_kwargs", None)
        service = self._service_for(params)
        text = None
        try:
            if _is_chat(prompt):
                chosen = self.service.sampling_params(params, max_tokens=None)
                ids = await self.service.encode_chat(prompt, chosen, variables=variables)
            elif isinstance(prompt, str) or _is_ids(prompt):
                chosen = self.service.sampling_params(params)
                text = prompt if isinstance(prompt, str) else None
                ids = await self.service.encode_prompt(prompt, chosen)
            else:
                raise RequestError(
                    f"prompt: got {prompt!r:.100}, allowed: a text, token ids, or messages", param="prompt"
                )
        except TypeError as error:  # an unknown keyword, or a prompt of another kind
            raise RequestError(str(error)) from None
        return service.generate(ids, chosen, request_id=f"handle-{name}" if name else None, prompt=text)

    def _service_for(self, params: dict[str, Any]) -> ModelService:
        """The service as the caller that `tenant` and `timeout`, taken out of params, name."""
        caller = Caller()
        caller.name(params.pop("tenant", None))
        if (timeout := params.pop("timeout", None)) is not None:
            caller.wait(timeout, "timeout")
        service = self.service.seen_by(caller)
        service.check_room()
        return service

    # The driver's life

    async def _start_driver(self) -> Any:
        """Start a driver in this replica's placement group; waits until it serves."""
        return await asyncio.to_thread(
            start_driver,
            self.config.engine,
            self._model_config,
            name=self._name,
            placement_group=self._group,
        )

    async def _connect(self) -> None:
        self._client = await DriverClient.connect(
            self._driver, on_outputs=self.service.deliver, on_disconnect=self._on_disconnect
        )
        self.service.attach(self._client)

    def _on_disconnect(self, reason: str) -> None:
        self.service.detach()
        if not self._closing:
            logger.error("%s lost its driver (%s); starting another", self._name, reason)
            self._restart = asyncio.ensure_future(self._replace_driver(reason))

    async def _replace_driver(self, reason: str) -> None:
        """Start another driver and hand it every unfinished request with its tokens so far."""
        for attempt in range(1, MAX_DRIVER_STARTS + 1):
            try:
                await self._start_again()
            except MantaError as error:
                reason = str(error)
                logger.error("%s: start %d of %d failed: %s", self._name, attempt, MAX_DRIVER_STARTS, reason)
                if isinstance(error, ConfigError | ModelLoadError):
                    break  # it would fail the same way again
                continue
            logger.info("%s has a new driver; %d requests go on", self._name, self.service.resume())
            return
        self.service.fail(reason)

    async def _revive(self, reason: str) -> None:
        """Fail every request, and start drivers until one runs. The log says it once."""
        logger.error("%s has no engine (%s); it is tried again until there is one", self._name, reason)
        self.service.fail(reason)
        pause_s, began_s = REVIVE_AFTER_S, time.monotonic()
        while True:
            try:
                await self._start_again()
                break
            except MantaError as error:
                self.service.fail(str(error))
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, REVIVE_AFTER_AT_MOST_S)
        logger.info("%s has an engine again, after %.0f s", self._name, time.monotonic() - began_s)

    async def _start_again(self) -> None:
        """Another driver in the place of the one there was."""
        if self._client is not None:
            await self._client.close()
        with contextlib.suppress(Exception):
            await asyncio.to_thread(stop_driver, self._driver)
        self._driver = await self._start_driver()
        await self._connect()


def _missing(group: PlacementGroup | None) -> str:
    """What the cluster must get before this replica's driver and ranks all have their places; empty: nothing."""
    if group is None or ray.util.placement_group_table(group).get("state") == "CREATED":
        return ""
    return f"waiting for resources: {shortage(group)}"


class _Served(Response):
    """Runs an ASGI application where Serve expects a response."""

    def __init__(self, app: Starlette) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


def _is_chat(prompt: Prompt) -> TypeGuard[Sequence[Mapping[str, Any]]]:
    return isinstance(prompt, Sequence) and not isinstance(prompt, str) and any(isinstance(m, Mapping) for m in prompt)


def _is_ids(prompt: Prompt) -> TypeGuard[Sequence[int]]:
    return isinstance(prompt, Sequence)
