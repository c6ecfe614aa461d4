"""Anthropic's Messages API: /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from deployments.generation import Generation
from deployments.http.answers import JsonResponse, answer
from deployments.http.anthropic_types import (
    CountRequest,
    Message,
    MessagesRequest,
    MessageUsage,
    TextBlock,
    ThinkingBlock,
    ToolUseBlock,
)
from deployments.http.context import answer_headers, body_of, caller_of, check_model, service_of
from deployments.http.errors import failure_of, request_id_of
from deployments.http.openai_types import ChatCompletionRequest
from deployments.http.structured import forced_calls, form_of, tools_of
from deployments.parsing.answer import AnswerDelta, AnswerForm, AnswerParser, ToolMode
from deployments.service import ModelService
from engine.errors import MantaError
from engine.output import RequestOutput
from engine.sampling_params import SamplingParams

_json = msgspec.json.Encoder()
_STATUS_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


async def create_message(request: Request) -> Response:
    """Answer a conversation with one message."""
    try:
        service = service_of(request)
        body = await _read(request, MessagesRequest)
        call = _Call(service, body, f"msg_{request_id_of(request)}")
        await call.start()
        return await answer(
            request, call, stream=body.stream, on_error=_error_json, headers=answer_headers(request, body)
        )
    except MantaError as error:
        return _failed(error)


async def count_tokens(request: Request) -> Response:
    """How many tokens the prompt of such a conversation has."""
    try:
        service = service_of(request)
        body = await _read(request, CountRequest)
        _, ids = await _prompt(service, body, SamplingParams())
        return JsonResponse({"input_tokens": len(ids)}, headers=answer_headers(request, body))
    except MantaError as error:
        return _failed(error)


async def _read(request: Request, kind: type[Any]) -> Any:
    body = await body_of(request, kind)
    check_model(service_of(request), body.model)
    user = (getattr(body, "metadata", None) or {}).get("user_id")
    caller_of(request).name(user if isinstance(user, str) else None)
    return body


async def _prompt(
    service: ModelService, body: CountRequest, params: SamplingParams
) -> tuple[tuple[ToolMode, list[dict[str, Any]]], list[int]]:
    """How tools are used, and the prompt's token ids."""
    messages = body.chat()
    chat = ChatCompletionRequest(messages=messages, tools=body.openai_tools(), tool_choice=body.openai_tool_choice())
    tools = tools_of(chat)
    shown = chat.tools if tools[0] != "none" else None
    ids = await service.encode_chat(messages, params, tools=shown, variables=body.variables())
    return tools, ids


def _failed(error: MantaError) -> Response:
    failure = failure_of(error)
    return Response(_error_json(error), failure.status, headers=failure.headers, media_type="application/json")


def _error_json(error: BaseException) -> bytes:
    """Anthropic's error object."""
    failure = failure_of(error)
    kind = _STATUS_TYPES.get(failure.status, "api_error")
    return _json.encode({"type": "error", "error": {"type": kind, "message": failure.body.message}})


class _Call:
    """One request on its way, and how its answer looks."""

    def __init__(self, service: ModelService, body: MessagesRequest, answer_id: str) -> None:
        self.service, self.body, self.id = service, body, answer_id
        self.form = AnswerForm()
        self.generation: Generation | None = None

    async def start(self) -> None:
        """Render, tokenize and submit the conversation."""
        service, body = self.service, self.body
        params = service.sampling_params(body.sampling(), max_tokens=None)
        (mode, functions), ids = await _prompt(service, body, params)
        if mode in ("required", "named"):
            single = mode == "named" or bool((body.tool_choice or {}).get("disable_parallel_tool_use"))
            params = params.replace(grammar=forced_calls(functions, parallel=not single))
        self.form = form_of(service, mode, ids, params)
        self.generation = service.generate(ids, params, request_id=self.id)

    @property
    def _started(self) -> Generation:
        assert self.generation is not None, "start first"
        return self.generation

    async def answer(self) -> Message:
        async with self._started as generation:
            result = await generation.finish()
        output = result.outputs[0]
        parser = AnswerParser(self.form)
        whole = parser.push(output.text, last=True)
        usage = MessageUsage(len(result.prompt_token_ids), result.num_completion_tokens, result.num_cached_tokens)
        message = Message(self.id, self.service.config.names[0], _blocks(whole), usage)
        message.stop_reason = _stop_reason(output.finish_reason, output.stop_reason, bool(whole.calls))
        message.stop_sequence = output.stop_reason if isinstance(output.stop_reason, str) else None
        return message

    async def events(self) -> AsyncGenerator[bytes, None]:
        writer, parser = _BlockWriter(), AnswerParser(self.form)
        called = False
        async with self._started as generation:
            usage = MessageUsage(generation.request.num_prompt_tokens, 0)
            started = Message(self.id, self.service.config.names[0], [], usage)
            yield _event("message_start", message=started) + _event("ping")
            async for deltas in generation:
                for delta in deltas:
                    part = parser.push(delta.text, last=delta.finish_reason is not None)
                    called = called or bool(part.calls)
                    if out := writer.write(part):
                        yield out
            result = generation.result
            assert result is not None
            yield writer.close() + self._last(result, called) + _event("message_stop")

    def _last(self, result: RequestOutput, called: bool) -> bytes:
        output = result.outputs[0]
        usage = MessageUsage(len(result.prompt_token_ids), result.num_completion_tokens, result.num_cached_tokens)
        delta = {
            "stop_reason": _stop_reason(output.finish_reason, output.stop_reason, called),
            "stop_sequence": output.stop_reason if isinstance(output.stop_reason, str) else None,
        }
        return _event("message_delta", delta=delta, usage=usage)


class _BlockWriter:
    """Content blocks as they stream: each is started, added to and stopped; a change of kind starts the next."""

    def __init__(self) -> None:
        self._index = -1
        self._kind = ""

    def write(self, part: AnswerDelta) -> bytes:
        out = b""
        if part.reasoning:
            out += self._open("thinking", lambda: ThinkingBlock(""))
            out += self._delta(type="thinking_delta", thinking=part.reasoning)
        if part.content and not (self._kind.startswith("tool") and not part.content.strip()):
            out += self._open("text", lambda: TextBlock(""))
            out += self._delta(type="text_delta", text=part.content)
        for call in part.calls:
            if call.id is not None and call.name is not None:
                block = ToolUseBlock(call.id, call.name, {})
                out += self._open(f"tool {call.index}", lambda block=block: block)
            if call.arguments:
                out += self._delta(type="input_json_delta", partial_json=call.arguments)
        return out

    def close(self) -> bytes:
        """End the block that is open; an answer without any has one empty text."""
        out = self._open("text", lambda: TextBlock("")) if self._index < 0 else b""
        return out + _event("content_block_stop", index=self._index)

    def _open(self, kind: str, block: Any) -> bytes:
        if kind == self._kind:
            return b""
        out = _event("content_block_stop", index=self._index) if self._index >= 0 else b""
        self._index, self._kind = self._index + 1, kind
        return out + _event("content_block_start", index=self._index, content_block=block())

    def _delta(self, **delta: str) -> bytes:
        return _event("content_block_delta", index=self._index, delta=delta)


def _event(kind: str, **fields: Any) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + _json.encode({"type": kind, **fields}) + b"\n\n"


def _blocks(whole: AnswerDelta) -> list[TextBlock | ThinkingBlock | ToolUseBlock]:
    blocks: list[TextBlock | ThinkingBlock | ToolUseBlock] = []
    if whole.reasoning:
        blocks.append(ThinkingBlock(whole.reasoning))
    if whole.content.strip() or not (whole.calls or whole.reasoning):
        blocks.append(TextBlock(whole.content))
    arguments: dict[int, str] = {}
    for call in whole.calls:
        arguments[call.index] = arguments.get(call.index, "") + call.arguments
    for call in whole.calls:
        if call.id is not None and call.name is not None:
            blocks.append(ToolUseBlock(call.id, call.name, _object(arguments[call.index])))
    return blocks


def _object(text: str) -> dict[str, Any]:
    """Arguments as an object; those that were cut short by the length are told as far as they are known: not at all."""
    try:
        value = json.loads(text or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _stop_reason(reason: str | None, stop: int | str | None, called: bool) -> str:
    if reason == "length":
        return "max_tokens"
    if isinstance(stop, str):
        return "stop_sequence"
    return "tool_use" if called else "end_turn"


ROUTES = [
    Route("/v1/messages", create_message, methods=["POST"]),
    Route("/v1/messages/count_tokens", count_tokens, methods=["POST"]),
]
