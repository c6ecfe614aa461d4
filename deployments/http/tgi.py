"""Text Generation Inference's routes: /generate, /generate_stream, POST /, /info."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from deployments.generation import Generation
from deployments.http.answers import JsonResponse
from deployments.http.context import answer_headers, body_of, service_of
from deployments.http.errors import Unauthorized, failure_of, request_id_of
from deployments.http.pages import product_version
from deployments.http.sse import start_stream, until_disconnect
from deployments.http.tgi_types import (
    MAX_BEST_OF,
    MAX_STOP_SEQUENCES,
    BestOfSequence,
    CompatGenerateRequest,
    Details,
    Generated,
    GenerateRequest,
    Info,
    InputToken,
    InvalidInput,
    StreamDetails,
    StreamEvent,
    Token,
)
from deployments.service import ModelService
from engine.errors import EngineOverloaded, EngineUnavailable, MantaError, RequestError
from engine.output import CompletionOutput, Logprob, RequestOutput

_json = msgspec.json.Encoder()


async def generate(request: Request) -> Response:
    """Answer one text, whole."""
    return await _answer(request, GenerateRequest, stream=False)


async def generate_stream(request: Request) -> Response:
    """Answer one text, an event a token."""
    return await _answer(request, GenerateRequest, stream=True)


async def compat_generate(request: Request) -> Response:
    """Either of the two, by the body's `stream`; the whole answer comes in a list of one."""
    return await _answer(request, CompatGenerateRequest, stream=None)


async def info(request: Request) -> Response:
    """What is served here, in TGI's words."""
    service = service_of(request)
    config = service.config
    answer = Info(
        model_id=config.names[0],
        model_sha=config.revision,
        model_dtype=config.dtype,
        model_device_type=config.device,
        model_pipeline_tag="text-generation",
        max_concurrent_requests=config.ongoing_requests,
        max_best_of=MAX_BEST_OF,
        max_stop_sequences=MAX_STOP_SEQUENCES,
        max_input_tokens=config.model_len - 1,
        max_total_tokens=config.model_len,
        max_batch_total_tokens=config.max_num_batched_tokens,
        validation_workers=1,
        max_client_batch_size=1,
        router="manta",
        version=product_version(),
        sha=None,
        docker_label=None,
    )
    return JsonResponse(answer)


async def _answer(request: Request, kind: type[GenerateRequest], *, stream: bool | None) -> Response:
    try:
        service = service_of(request)
        received_s = time.monotonic()
        body = await body_of(request, kind)
        listed = stream is None
        if isinstance(body, CompatGenerateRequest):
            stream = body.stream
        call = _Call(service, body, request_id_of(request), received_s, stream=bool(stream))
        await call.start()
        if stream:
            headers = {**call.stream_headers(), **answer_headers(request, body)}
            return await start_stream(request.receive, call.events(), on_error=_error_json, headers=headers)
        answer = await until_disconnect(request.receive, call.answer())
        payload = [answer] if listed else answer
        headers = {**call.headers(), **answer_headers(request, body)}
        return JsonResponse(payload, headers=headers)
    except MantaError as error:
        headers = failure_of(error).headers
        return Response(_error_json(error), _told(error)[0], headers=headers, media_type="application/json")


def _told(error: BaseException) -> tuple[int, str, str]:
    """TGI's status, kind and text of an error."""
    failure = failure_of(error)
    if isinstance(error, Unauthorized):
        return failure.status, "unauthorized", str(error)
    if isinstance(error, EngineOverloaded):
        return failure.status, "overloaded", str(error)
    if isinstance(error, RequestError):
        return 422 if failure.status == 400 else failure.status, "validation", f"Input validation error: {error}"
    if isinstance(error, EngineUnavailable):
        return failure.status, "healthcheck", str(error)
    return 424, "generation", f"Request failed during generation: {failure.body.message}"


def _error_json(error: BaseException) -> bytes:
    """TGI's error object."""
    _, kind, text = _told(error)
    return _json.encode({"error": text, "error_type": kind})


def _event(payload: StreamEvent) -> bytes:
    """One event as TGI writes it: some clients count on there being no space."""
    return b"data:" + _json.encode(payload) + b"\n\n"


class _Call:
    """One request on its way, and how its answer looks."""

    def __init__(
        self, service: ModelService, body: GenerateRequest, request_id: str, received_s: float, *, stream: bool
    ) -> None:
        self.service, self.body, self.id = service, body, f"tgi-{request_id}"
        self.parameters = body.parameters
        self.params = service.sampling_params(self.parameters.sampling(stream=stream))
        self.received_s = received_s
        self.generation: Generation | None = None

    async def start(self) -> None:
        """Tokenize and submit."""
        if not self.body.inputs:
            raise RequestError("`inputs` cannot be empty", param="inputs")
        ids = await self.service.encode_prompt(self.body.inputs, self.params)
        limit, new = self.service.config.model_len, self.parameters.max_new_tokens
        if len(ids) >= limit:
            raise InvalidInput(f"`inputs` must have less than {limit} tokens. Given: {len(ids)}", param="inputs")
        if new is not None and len(ids) + new > limit:
            raise InvalidInput(
                f"`inputs` tokens + `max_new_tokens` must be <= {limit}. Given: {len(ids)} `inputs` tokens and {new} "
                "`max_new_tokens`",
                param="max_new_tokens",
            )
        self.generation = self.service.generate(ids, self.params, request_id=self.id, prompt=self.body.inputs)

    @property
    def _started(self) -> Generation:
        assert self.generation is not None, "start first"
        return self.generation

    async def answer(self) -> Generated:
        async with self._started as generation:
            result = await generation.finish()
        best, *others = sorted(result.outputs, key=_mean_logprob, reverse=True)
        answer = Generated(self._whole_text(best.text))
        if self.parameters.details:
            prefill = self._prefill(result)
            answer.details = Details(*self._described(best, prefill))
            if self.parameters.top_n_tokens:
                answer.details.top_tokens = self._all_top_tokens(best)
            if others:
                answer.details.best_of_sequences = [self._other(output, prefill) for output in others]
        return answer

    async def events(self) -> AsyncGenerator[bytes, None]:
        texts: list[str] = []
        count = 0
        async with self._started as generation:
            async for deltas in generation:
                for delta in deltas:
                    texts.append(delta.text)
                    tokens = self._tokens(delta.token_ids, delta.logprobs or [])
                    for place, (token, entry) in enumerate(zip(tokens, delta.logprobs or [], strict=True)):
                        last = place == len(tokens) - 1
                        if not token.special:
                            token.text = delta.text if last else ""
                        count += 1
                        out = StreamEvent(count, token)
                        if self.parameters.top_n_tokens:
                            out.top_tokens = self._top_tokens(entry)
                        if last and delta.finish_reason is not None:
                            reason = _finish_reason(delta.finish_reason, delta.stop_reason)
                            out.generated_text = self._whole_text("".join(texts))
                            prompt_tokens = generation.request.num_prompt_tokens
                            if self.parameters.details:
                                out.details = StreamDetails(reason, count, self._seed, prompt_tokens)
                        yield _event(out)

    def stream_headers(self) -> dict[str, str]:
        """Those of TGI's x-compute headers that are known when a stream starts."""
        return {
            "x-compute-type": "gpu+optimized" if self.service.config.device == "cuda" else "cpu",
            "x-compute-characters": str(len(self.body.inputs)),
            "x-prompt-tokens": str(self._started.request.num_prompt_tokens),
        }

    def headers(self) -> dict[str, str]:
        """TGI's x-compute headers: x-compute-time in seconds, the other times in milliseconds."""
        generation, now_s = self._started, time.monotonic()
        result = generation.result
        first_s = generation.first_token_s or now_s
        tokens = result.num_completion_tokens if result is not None else 0
        inference_s = now_s - first_s
        return {
            **self.stream_headers(),
            "x-compute-time": f"{now_s - self.received_s:.3f}",
            "x-total-time": _ms(now_s - self.received_s),
            "x-validation-time": _ms(generation.created_s - self.received_s),
            "x-queue-time": _ms(first_s - generation.created_s),
            "x-inference-time": _ms(inference_s),
            "x-time-per-token": _ms(inference_s / max(1, tokens)),
            "x-generated-tokens": str(tokens),
        }

    @property
    def _seed(self) -> int | None:
        if not self.parameters.samples:
            return None
        return self._started.request.seed if self.parameters.seed is None else self.parameters.seed

    def _whole_text(self, text: str) -> str:
        return self.body.inputs + text if self.parameters.return_full_text else text

    def _described(self, output: CompletionOutput, prefill: list[InputToken]) -> tuple[Any, ...]:
        reason = _finish_reason(output.finish_reason, output.stop_reason)
        tokens = self._tokens(output.token_ids, output.logprobs or [])
        return reason, len(output.token_ids), self._seed, prefill, tokens

    def _other(self, output: CompletionOutput, prefill: list[InputToken]) -> BestOfSequence:
        other = BestOfSequence(self._whole_text(output.text), *self._described(output, prefill))
        if self.parameters.top_n_tokens:
            other.top_tokens = self._all_top_tokens(output)
        return other

    def _tokens(self, token_ids: list[int], entries: list[dict[int, Logprob]]) -> list[Token]:
        specials = self.service.tokenizer.special_ids
        text = self.service.tokenizer.token_text
        return [Token(i, text(i), entry[i].logprob, i in specials) for i, entry in zip(token_ids, entries, strict=True)]

    def _top_tokens(self, entry: dict[int, Logprob]) -> list[Token]:
        count, specials = self.parameters.top_n_tokens or 0, self.service.tokenizer.special_ids
        ranked = sorted((p.rank or 0, i, p.logprob) for i, p in entry.items() if (p.rank or count + 1) <= count)
        return [Token(i, self.service.tokenizer.token_text(i), logprob, i in specials) for _, i, logprob in ranked]

    def _all_top_tokens(self, output: CompletionOutput) -> list[list[Token]]:
        return [self._top_tokens(entry) for entry in output.logprobs or []]

    def _prefill(self, result: RequestOutput) -> list[InputToken]:
        if not self.parameters.decoder_input_details or result.prompt_logprobs is None:
            return []
        return [
            InputToken(i, self.service.tokenizer.token_text(i), None if entry is None else entry[i].logprob)
            for i, entry in zip(result.prompt_token_ids, result.prompt_logprobs, strict=True)
        ]


def _mean_logprob(output: CompletionOutput) -> float:
    return (output.cumulative_logprob or 0.0) / max(1, len(output.token_ids))


def _finish_reason(reason: str | None, stop: int | str | None) -> str:
    if reason == "length":
        return "length"
    return "stop_sequence" if isinstance(stop, str) else "eos_token"


def _ms(seconds: float) -> str:
    return str(round(seconds * 1e3))


ROUTES = [
    Route("/", compat_generate, methods=["POST"]),
    Route("/generate", generate, methods=["POST"]),
    Route("/generate_stream", generate_stream, methods=["POST"]),
    Route("/info", info, methods=["GET"]),
]
