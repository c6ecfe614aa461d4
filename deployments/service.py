"""ModelService: one model's requests in this process, between the transports and the engine.

It owns the texts: prompts are tokenized here, tokens become text here, stop strings end samples here. It holds each
request's prompt and tokens so far, which is what lets a request outlive its engine.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, TypeVar

from cluster.messages import DriverHealth, error_of
from cluster.recovery import RETRY_AFTER_S
from deployments.admission import Admission
from deployments.caller import Caller
from deployments.config import AppConfig
from deployments.engine_link import EngineClient, EngineLink
from deployments.generation import Batch, Generation
from engine.errors import EngineUnavailable, MantaError, PromptTooLong, RequestError, ResourcesMissing
from engine.model_config import ModelConfig
from engine.output import OutputProcessor, RequestOutput
from engine.request import Request, SequenceOutput
from engine.sampling_params import SamplingParams
from engine.step import Pooling
from engine.tokenizer import Tokenizer, prepare_params, prepare_prompt

logger = logging.getLogger("ray.serve")

_NOT_VARIABLES = {"self", "messages", "tools", "documents", "chat_template"}
EMBEDDED_AT_ONCE = 256
"""Prompts of one call that are embedded at once: a longer list does not fill the queue."""
LONG_TEXT_CHARS = 8192
"""Longer texts, all of a call together, are tokenized on another thread: 8 Ki characters take milliseconds."""
T = TypeVar("T")


class ModelService:
    """Serves one loaded model. Everything but `deliver`'s caller runs on one event loop, and so does that."""

    def __init__(
        self, config: AppConfig, tokenizer: Tokenizer, *, vocab_size: int, sampling_defaults: Mapping[str, Any]
    ) -> None:
        """config is resolved; vocab_size is the model's; sampling_defaults fill what a request leaves out."""
        self.config = config
        self.names = config.names
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.sampling_defaults = dict(sampling_defaults)
        self.started_s = time.time()
        self._link = EngineLink()
        self._caller = Caller()
        self._admission = Admission(config.max_waiting_requests, config.max_waiting_tokens)
        self._outputs = OutputProcessor(tokenizer)
        self._generations: dict[str, Generation] = {}

    def seen_by(self, caller: Caller) -> Self:
        """The same service, whose requests are `caller`'s."""
        view = copy.copy(self)
        view._caller = caller
        return view

    # The engine's side

    def attach(self, client: EngineClient) -> None:
        """Send requests to `client` from now on."""
        self._link.attach(client)

    def detach(self) -> None:
        """No engine: new requests are refused with EngineUnavailable, held ones wait."""
        self._link.detach()

    def deliver(self, outputs: Sequence[SequenceOutput]) -> None:
        """Take one step's outputs of all requests of this process."""
        for output in outputs:
            if output.finish_reason == "error" and output.request_id in self._generations:
                self._generations[output.request_id].fail(error_of(output))
        processed = self._outputs.process(outputs)
        for delta in processed.deltas:
            generation = self._generations.get(delta.request_id)
            if generation is not None and delta.finish_reason != "error":
                self._admission.started(delta.request_id)
                generation.push(delta)
        for request_id, index in processed.aborts:
            self._link.abort(request_id, index)
        for result in processed.finished:
            generation = self._generations.get(result.request_id)
            if generation is not None:
                generation.end(result)

    def resume(self) -> int:
        """Submit every unfinished request again, with its tokens so far, to a newly attached engine; how many."""
        requests = [r for r in map(self._outputs.resumed, list(self._generations)) if r is not None]
        for request in requests:
            try:
                self._link.engine().submit(request)
            except MantaError as error:
                self._generations[request.request_id].fail(error)
        return len(requests)

    async def stats(self) -> dict[str, Any]:
        """The engine's counters now. Raises EngineUnavailable."""
        return await self._link.engine().stats()

    async def picture(self) -> dict[str, Any]:
        """What every block and request is doing; see engine.picture. Raises EngineUnavailable."""
        return {"model": self.name, **await self._link.engine().picture()}

    async def health(self) -> DriverHealth:
        """What the engine knows of itself; "failed" when it does not answer or could not be brought back."""
        return await self._link.health()

    def lacks(self, missing: str) -> None:
        """The engine cannot be started before the cluster has this; empty: it can.

        Requests without a token fail; the others wait.
        """
        self._link.missing = missing
        if missing:
            for generation in list(self._generations.values()):
                if generation.first_token_s is None:
                    generation.fail(ResourcesMissing(missing, retry_after_s=RETRY_AFTER_S))

    def fail(self, reason: str) -> None:
        """There is no engine: every held request fails, and so does every new one until another is attached."""
        self._link.detach(reason)
        for generation in list(self._generations.values()):
            generation.fail(EngineUnavailable(f"the engine is gone: {reason}"))

    # The transports' side

    @property
    def name(self) -> str:
        """What the model calls itself in answers."""
        return self.names[0]

    @property
    def hidden_size(self) -> int:
        """Numbers of an embedding; read from the model's folder each time."""
        return ModelConfig.load(self.config).hidden_size

    @property
    def num_unfinished(self) -> int:
        """Requests of this process that somebody waits for."""
        return len(self._generations)

    @property
    def num_waiting(self) -> int:
        """Requests without a first token."""
        return len(self._admission)

    def check_room(self, num_tokens: int = 0) -> None:
        """Raise EngineOverloaded when one more request of that many prompt tokens would have to wait too long."""
        self._admission.check(self._caller.tenant, num_tokens)

    def serves(self, name: str) -> bool:
        """Whether clients may ask for a model called `name`."""
        return name in self.names

    async def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams,
        *,
        variables: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> list[int]:
        """The prompt of a chat: options as for `Tokenizer.render_chat`, variables for its template."""
        arguments = {**options, **(variables or {})}
        clash = sorted(_NOT_VARIABLES.intersection(variables or ()))
        if clash:
            raise RequestError(
                f"chat_template_kwargs: got {clash}, allowed: any but {sorted(_NOT_VARIABLES)}",
                param="chat_template_kwargs",
            )
        size = sum(len(str(m.get("content", ""))) for m in messages if isinstance(m, Mapping))
        if size > LONG_TEXT_CHARS:
            self.check_room()
        ids = await beside_the_loop(size, lambda: self.tokenizer.apply_chat_template(messages, **arguments))
        if not ids:
            raise RequestError("messages: the chat template made an empty prompt of them", param="messages")
        return ids if params.truncate_prompt_tokens is None else ids[-params.truncate_prompt_tokens :]

    async def encode_prompt(self, prompt: str | Sequence[int], params: SamplingParams) -> list[int]:
        """Checked token ids of a text or of token ids. Raises RequestError."""
        (ids,) = await self.encode_prompts([prompt], params)
        return ids

    async def encode_prompts(self, prompts: Sequence[str | Sequence[int]], params: SamplingParams) -> list[list[int]]:
        """The same of every prompt of one call. Raises RequestError."""
        if not all(prompts):
            raise RequestError("prompt: empty; at least one token is needed", param="prompt")

        def encode() -> list[list[int]]:
            return [prepare_prompt(prompt, params, self.tokenizer, self.vocab_size) for prompt in prompts]

        if (size := sum(map(len, prompts))) > LONG_TEXT_CHARS:
            self.check_room()
        return await beside_the_loop(size, encode)

    def sampling_params(self, given: Mapping[str, Any], **defaults: Any) -> SamplingParams:
        """SamplingParams of the fields a request gave; the model's defaults, then `defaults`, fill the others.

        The model's say nothing of beam searches. truncate_prompt_tokens -1 is as many as leave room for max_tokens.
        Raises RequestError naming the field at fault.
        """
        own = {} if given.get("use_beam_search") else self.sampling_defaults
        asked = {**defaults, **own, **given}
        if asked.get("truncate_prompt_tokens") == -1:
            asked["truncate_prompt_tokens"] = max(1, self.config.model_len - (asked.get("max_tokens") or 1))
        params = SamplingParams(**asked)
        return prepare_params(params, self.tokenizer, self.vocab_size)

    def generate(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        prompt: str | None = None,
        cache_salt: str = "",
        timeout_s: float | None = None,
        pooling: Pooling | None = None,
    ) -> Generation:
        """Start one request; with `pooling`, one that embeds its prompt.

        Use the result as an async context manager; what the engine refuses, iterating it raises.

        A request id already in use gets a suffix. timeout_s is a deadline beside the caller's and the configured one.
        Raises RequestError, EngineOverloaded or EngineUnavailable.
        """
        engine = self._link.engine()
        self.check_room(len(prompt_token_ids))
        tenant = self._caller.tenant
        request_id = request_id or secrets.token_hex(8)
        if request_id in self._generations:
            request_id = f"{request_id}-{secrets.token_hex(4)}"
        if pooling is None or len(prompt_token_ids) > self.config.model_len:
            params = self._fit(len(prompt_token_ids), params)
        request = Request.create(
            request_id,
            prompt_token_ids,
            params,
            arrival_s=time.time(),
            cache_salt=cache_salt,
            tenant=tenant,
            pooling=pooling,
        )
        generation = Generation(request, self._release)
        self._generations[request_id] = generation
        self._outputs.add(request, prompt)
        self._admission.add(request_id, tenant, len(prompt_token_ids))
        try:
            engine.submit(request)
        except MantaError:
            self._forget(request_id)
            raise
        limits = [s for s in (timeout_s, self._caller.timeout_s, self.config.request_timeout_s) if s is not None]
        if limits:
            generation.expire_after(min(limits))
        return generation

    def start_batch(
        self, prompts: Sequence[list[int]], params: SamplingParams, *, request_id: str, cache_salt: str = ""
    ) -> Batch:
        """Start one request a prompt, or none when one is at fault. Use the result as an async context manager."""
        batch = Batch([])
        try:
            for number, prompt in enumerate(prompts):
                name = request_id if len(prompts) == 1 else f"{request_id}-{number}"
                batch.add(self.generate(prompt, params, request_id=name, cache_salt=cache_salt))
        except MantaError:
            batch.release()
            raise
        return batch

    async def embed(
        self,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        *,
        pooling: Pooling | None = None,
        request_id: str | None = None,
        cache_salt: str = "",
    ) -> list[RequestOutput]:
        """Embed every prompt, as `pooling` or the configuration says; see engine.embedding. Raises as `generate`."""
        how, name = pooling or self.config.pooling, request_id or secrets.token_hex(8)
        turns = asyncio.Semaphore(EMBEDDED_AT_ONCE)

        async def embedded(number: int, prompt: list[int]) -> RequestOutput:
            async with turns:
                own = name if len(prompts) == 1 else f"{name}-{number}"
                one = self.generate(prompt, params, request_id=own, cache_salt=cache_salt, pooling=how)
                async with one:
                    return await one.finish()

        tasks = [asyncio.ensure_future(embedded(number, prompt)) for number, prompt in enumerate(prompts)]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    def _release(self, generation: Generation) -> None:
        """Forget a generation, and abort it when it still runs."""
        unfinished = generation.request_id in self._outputs
        self._forget(generation.request_id)
        if unfinished:
            self._link.abort(generation.request_id)
        _log_end(generation)

    def _forget(self, request_id: str) -> None:
        self._outputs.discard(request_id)
        self._admission.discard(request_id)
        self._generations.pop(request_id, None)

    def _fit(self, num_prompt_tokens: int, params: SamplingParams) -> SamplingParams:
        """Refuse what the context cannot hold."""
        limit = self.config.model_len
        if num_prompt_tokens >= limit:
            raise PromptTooLong(
                f"the prompt has {num_prompt_tokens} tokens; this model's context is {limit} tokens, "
                "at least one of them for the answer"
            )
        if params.max_tokens is not None and num_prompt_tokens + params.max_tokens > limit:
            raise PromptTooLong(
                f"the prompt has {num_prompt_tokens} tokens and max_tokens is {params.max_tokens}: together more than "
                f"this model's context of {limit} tokens",
                param="max_tokens",
            )
        return params


async def beside_the_loop(size: int, work: Callable[[], T]) -> T:
    """What `work` gives; on another thread, which lets streams go on meanwhile, for a text longer than is done soon."""
    return await asyncio.to_thread(work) if size > LONG_TEXT_CHARS else work()


def _log_end(generation: Generation) -> None:
    now = time.monotonic()
    result = generation.result
    reasons = ",".join(sorted({o.finish_reason or "?" for o in result.outputs})) if result is not None else "aborted"
    first_s = generation.first_token_s - generation.created_s if generation.first_token_s is not None else -1.0
    logger.info(
        "request %s %s: prompt %d tokens (%d cached), output %d tokens, first after %.3f s, all after %.3f s",
        generation.request_id,
        reasons,
        generation.request.num_prompt_tokens,
        result.num_cached_tokens if result is not None else 0,
        result.num_completion_tokens if result is not None else 0,
        first_s,
        now - generation.created_s,
    )
