"""OpenAI's Responses API: create, stream, go on from an earlier response, look one up, delete it."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from deployments.generation import Generation
from deployments.http.answers import JsonResponse, answer
from deployments.http.context import answer_headers, body_of, caller_of, check_model, service_of
from deployments.http.errors import NotSupported, failure_of, in_terms_of, request_id_of
from deployments.http.logprobs import chat_logprobs
from deployments.http.openai_replies import TokenLogprob
from deployments.http.responses_items import Item, ItemWriter, as_messages
from deployments.http.responses_store import ResponseNotFound, ResponseStore
from deployments.http.responses_types import ResponsesRequest
from deployments.http.structured import forced_calls, form_of, grammar_of, reasoning_tokens, tools_of
from deployments.parsing.answer import AnswerForm, AnswerParser
from deployments.service import ModelService
from engine.errors import PromptTooLong, RequestError
from engine.output import Logprobs, RequestOutput

_json = msgspec.json.Encoder()
_NAMES = {"max_tokens": "max_output_tokens", "prompt": "input", "logprobs": "top_logprobs"}
"""Fields that the engine knows by another name."""


async def create_response(request: Request) -> Response:
    """Answer an input with a list of items: a message, calls of functions, reasoning."""
    service = service_of(request)
    body = await body_of(request, ResponsesRequest)
    check_model(service, body.model)
    caller_of(request).name(body.safety_identifier or body.user)
    call = _Call(service, _store_of(request), body, request_id_of(request), owner=_owner(request))
    await call.start()
    return await answer(request, call, stream=body.stream, on_error=_error_event, headers=answer_headers(request, body))


async def get_response(request: Request) -> Response:
    """An earlier response."""
    response, _ = _store_of(request).get(request.path_params["id"], _owner(request))
    return JsonResponse(response)


async def delete_response(request: Request) -> Response:
    """Forget an earlier response."""
    response_id = request.path_params["id"]
    _store_of(request).delete(response_id, _owner(request))
    return JsonResponse({"id": response_id, "object": "response", "deleted": True})


def _store_of(request: Request) -> ResponseStore:
    """Earlier responses. Raises Unauthorized."""
    caller_of(request)
    store: ResponseStore = request.app.state.responses
    return store


def _owner(request: Request) -> str:
    """Whose responses this caller may see: its key's holder's; where there are no keys, everybody's."""
    caller = caller_of(request)
    return caller.tenant if caller.trusted else ""


def _error_event(error: BaseException) -> bytes:
    body = failure_of(error).body
    return _json.encode({"type": "error", "code": body.code, "message": body.message, "param": body.param})


class _Call:
    """One request on its way, and how its answer looks."""

    def __init__(
        self, service: ModelService, store: ResponseStore, body: ResponsesRequest, request_id: str, *, owner: str
    ) -> None:
        if body.background:
            raise NotSupported("background: this server answers in the foreground", param="background")
        self.service, self.store, self.body, self.owner = service, store, body, owner
        self.id = f"resp_{request_id}"
        self.created = int(time.time())
        earlier = self._earlier()
        self.history = [*earlier, *body.messages()]
        self.instructions = [{"role": "system", "content": body.instructions}] if body.instructions else []
        self.chat = body.chat(self.instructions + self.history)
        self.tool_mode, self.functions = tools_of(self.chat)
        self.form = AnswerForm()
        self.generation: Generation | None = None

    def _earlier(self) -> list[Item]:
        if self.body.previous_response_id is None:
            return []
        try:
            return self.store.get(self.body.previous_response_id, self.owner)[1]
        except ResponseNotFound as error:
            error.param, error.code = "previous_response_id", "previous_response_not_found"
            raise

    async def start(self) -> None:
        """Render, tokenize and submit."""
        service, chat = self.service, self.chat
        given = chat.sampling()
        given["grammar"] = grammar_of(chat)
        if chat.logprobs:
            given["logprobs"] = chat.top_logprobs or 0
        if self.tool_mode in ("required", "named"):
            parallel = self.tool_mode == "required" and chat.parallel_tool_calls is not False
            given["grammar"] = forced_calls(self.functions, parallel=parallel)
        try:
            params = service.sampling_params(given, max_tokens=None)
        except RequestError as error:
            raise in_terms_of(error, _NAMES) from None
        effort = {} if chat.reasoning_effort is None else {"reasoning_effort": chat.reasoning_effort}
        tools = chat.tools if self.tool_mode != "none" else None
        room = service.config.model_len - (params.max_tokens or 1)
        for left_out in range(len(self.history)):
            messages = self.instructions + self.history[left_out:]
            ids = await service.encode_chat(messages, params, tools=tools, variables=effort)
            if len(ids) <= room or self.body.truncation != "auto":
                break
        self.form = form_of(service, self.tool_mode, ids, params)
        try:
            self.generation = service.generate(ids, params, request_id=self.id)
        except PromptTooLong as error:
            raise in_terms_of(error, _NAMES) from None

    def _logprobs(self, entries: Logprobs | None) -> list[TokenLogprob]:
        return chat_logprobs(entries or [], self.body.top_logprobs or 0, self.service.tokenizer).content

    @property
    def _started(self) -> Generation:
        assert self.generation is not None, "start first"
        return self.generation

    async def answer(self) -> Item:
        async with self._started as generation:
            result = await generation.finish()
        parser, items = AnswerParser(self.form), ItemWriter()
        output = result.outputs[0]
        logprobs = self._logprobs(output.logprobs)[reasoning_tokens(self.service, self.form, result) :]
        items.write(parser.push(output.text, last=True), logprobs)
        items.close()
        return self._finished(result, items.items)

    async def events(self) -> AsyncGenerator[bytes, None]:
        parser, items, number = AnswerParser(self.form), ItemWriter(), 0

        def told(events: list[Item]) -> bytes:
            nonlocal number
            out = b""
            for payload in events:
                out += b"event: " + payload["type"].encode() + b"\ndata: "
                out += _json.encode({**payload, "sequence_number": number}) + b"\n\n"
                number += 1
            return out

        async with self._started as generation:
            begun = self._response("in_progress", [])
            kinds = ("response.created", "response.in_progress")
            yield told([{"type": kind, "response": begun} for kind in kinds])
            async for deltas in generation:
                for delta in deltas:
                    part = parser.push(delta.text, last=delta.finish_reason is not None)
                    if events := items.write(part, self._logprobs(delta.logprobs)):
                        yield told(events)
            result = generation.result
            assert result is not None
            events = items.close()
            whole = self._finished(result, items.items)
            yield told([*events, {"type": f"response.{whole['status']}", "response": whole}])

    def _finished(self, result: RequestOutput, items: list[Item]) -> Item:
        """The whole response; kept for later ones unless the client does not want that."""
        cut = result.outputs[0].finish_reason == "length"
        response = self._response("incomplete" if cut else "completed", items)
        response["incomplete_details"] = {"reason": "max_output_tokens"} if cut else None
        prompt, output = len(result.prompt_token_ids), result.num_completion_tokens
        response["usage"] = {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": result.num_cached_tokens},
            "output_tokens": output,
            "output_tokens_details": {"reasoning_tokens": reasoning_tokens(self.service, self.form, result)},
            "total_tokens": prompt + output,
        }
        if self.body.store is not False:
            self.store.put(response, [*self.history, *as_messages(items)], self.owner)
        return response

    def _response(self, status: str, items: list[Item]) -> Item:
        body = self.body
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self.service.config.names[0],
            "output": items,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": body.reasoning or {"effort": None, "summary": None},
            "store": body.store is not False,
            "temperature": body.temperature,
            "text": body.text or {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": body.top_p,
            "truncation": body.truncation or "disabled",
            "usage": None,
            "user": body.user,
        }


ROUTES = [
    Route("/v1/responses", create_response, methods=["POST"]),
    Route("/v1/responses/{id}", get_response, methods=["GET"]),
    Route("/v1/responses/{id}", delete_response, methods=["DELETE"]),
]
