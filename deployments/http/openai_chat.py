"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from deployments.http.errors import in_terms_of
from deployments.http.logprobs import chat_logprobs
from deployments.http.openai_call import Call, respond
from deployments.http.openai_replies import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    CompletionTokensDetails,
    FunctionCall,
    FunctionDelta,
    ToolCall,
    ToolCallPart,
    Usage,
    usage,
)
from deployments.http.openai_types import ChatCompletionRequest
from deployments.http.sse import DONE, event
from deployments.http.structured import forced_calls, form_of, grammar_of, reasoning_tokens, tools_of
from deployments.parsing.answer import AnswerDelta, AnswerForm, AnswerParser
from deployments.parsing.tool_calls import ToolCallDelta
from deployments.service import ModelService
from engine.errors import PromptTooLong, RequestError
from engine.output import Logprobs, OutputDelta, RequestOutput
from engine.sampling_params import SamplingParams


async def create_chat_completion(request: Request) -> Response:
    """Answer a chat with n messages."""
    return await respond(request, ChatCompletionRequest, _Chat)


class _Chat(Call[ChatCompletionRequest]):
    """One request on its way: its batch of one, and how its answer looks."""

    prefix = "chatcmpl"

    def __init__(self, service: ModelService, body: ChatCompletionRequest, answer_id: str) -> None:
        super().__init__(service, body, answer_id)
        self.tool_mode, self.functions = tools_of(body)
        self.params = self._params()
        self.form = AnswerForm()

    def _params(self) -> SamplingParams:
        given = self.body.sampling()
        if self.body.max_completion_tokens is not None:
            given["max_tokens"] = self.body.max_completion_tokens
        if self.body.logprobs:
            given["logprobs"] = self.body.top_logprobs or 0
        elif self.body.top_logprobs:
            raise RequestError("top_logprobs: needs logprobs to be true", param="top_logprobs")
        given["grammar"] = grammar_of(self.body)
        if self.tool_mode in ("required", "named"):
            if given["grammar"] is not None:
                raise RequestError(
                    "response_format: not together with tools that must be called", param="response_format"
                )
            parallel = self.tool_mode == "required" and self.body.parallel_tool_calls is not False
            given["grammar"] = forced_calls(self.functions, parallel=parallel)
        try:
            return self.service.sampling_params(given, max_tokens=None)
        except RequestError as error:
            raise in_terms_of(error, self._names) from None

    @property
    def _names(self) -> dict[str, str]:
        """Fields that the engine knows by another name than this request."""
        names = {"prompt": "messages"}
        if self.body.max_completion_tokens is not None:
            names["max_tokens"] = "max_completion_tokens"
        return names if not self.body.logprobs else {**names, "logprobs": "top_logprobs"}

    async def start(self) -> None:
        """Render, tokenize and submit the chat."""
        body = self.body
        continued = bool(body.continue_final_message)
        ids = await self.service.encode_chat(
            body.messages,
            self.params,
            add_generation_prompt=not continued if body.add_generation_prompt is None else body.add_generation_prompt,
            continue_final_message=continued,
            chat_template=body.chat_template,
            tools=body.tools if self.tool_mode != "none" else None,
            documents=body.documents,
            variables=self._variables(),
        )
        self.form = form_of(self.service, self.tool_mode, ids, self.params, body.chat_template)
        try:
            self.submit([ids], self.params)
        except PromptTooLong as error:
            raise in_terms_of(error, self._names) from None

    def _variables(self) -> dict[str, Any]:
        effort = self.body.reasoning_effort
        return {**({} if effort is None else {"reasoning_effort": effort}), **(self.body.chat_template_kwargs or {})}

    async def answer(self) -> ChatCompletion:
        async with self.batch as batch:
            (result,) = await batch.results()
        choices = []
        for output in result.outputs:
            parser = AnswerParser(self.form)
            message = _message(parser.push(output.text, last=True))
            reason = parser.finish_reason(output.finish_reason)
            choice = ChatChoice(output.index, message, self._logprobs(output.logprobs), reason, output.stop_reason)
            if self.body.return_token_ids:
                choice.token_ids = output.token_ids
            choices.append(choice)
        told = self._usage(result)
        answer = ChatCompletion(self.id, self.created, self.service.name, choices, told)
        if self.body.return_token_ids:
            answer.prompt_token_ids = result.prompt_token_ids
        if self.body.prompt_logprobs is not None:
            answer.prompt_logprobs = result.prompt_logprobs or []
        return answer

    async def events(self) -> AsyncGenerator[bytes, None]:
        """A first event with the role for each sample, one for each of its deltas, the usage when asked for."""
        body = self.body
        completion_tokens = 0
        begun = [False] * self.params.n
        parsers = [AnswerParser(self.form) for _ in begun]
        async with self.batch as batch:
            async for _, deltas in batch.updates():
                for delta in deltas:
                    completion_tokens += len(delta.token_ids)
                    told = usage(batch.num_prompt_tokens, completion_tokens) if body.continuous_usage else None
                    if not begun[delta.index]:
                        begun[delta.index] = True
                        first = self._chunk([ChatChunkChoice(delta.index, ChatDelta("assistant", ""))], told)
                        if body.return_token_ids:
                            first.prompt_token_ids = batch.generations[0].request.prompt_token_ids
                        yield event(first)
                    choice = self._delta_choice(delta, parsers[delta.index])
                    if choice is not None:
                        yield event(self._chunk([choice], told))
            if body.include_usage:
                result = batch.generations[0].result
                assert result is not None
                yield event(self._chunk([], self._usage(result)))
        yield DONE

    def _usage(self, result: RequestOutput) -> Usage:
        told = usage(len(result.prompt_token_ids), result.num_completion_tokens, result.num_cached_tokens)
        told.completion_tokens_details = CompletionTokensDetails(reasoning_tokens(self.service, self.form, result))
        return told

    def _chunk(self, choices: list[ChatChunkChoice], told: Usage | None) -> ChatChunk:
        return ChatChunk(self.id, self.created, self.service.name, choices, usage=self.shown(told))

    def _delta_choice(self, delta: OutputDelta, parser: AnswerParser) -> ChatChunkChoice | None:
        """What a client is told of a delta; None when there is nothing to tell."""
        part = parser.push(delta.text, last=delta.finish_reason is not None)
        calls = [_call_part(call) for call in part.calls]
        shown = ChatDelta(None, part.content or None, part.reasoning or None, calls or None)
        reason = parser.finish_reason(delta.finish_reason)
        if not (part.content or part.reasoning or calls or reason or delta.logprobs or self.body.return_token_ids):
            return None
        choice = ChatChunkChoice(delta.index, shown, self._logprobs(delta.logprobs), reason)
        if delta.finish_reason is not None:
            choice.stop_reason = delta.stop_reason
        if self.body.return_token_ids:
            choice.token_ids = delta.token_ids
        return choice

    def _logprobs(self, entries: Logprobs | None) -> ChatLogprobs | None:
        if entries is None:
            return None
        return chat_logprobs(entries, self.params.logprobs or 0, self.service.tokenizer)


def _message(whole: AnswerDelta) -> ChatMessage:
    message = ChatMessage(whole.content)
    if whole.reasoning:
        message.reasoning = whole.reasoning
    if whole.calls:
        calls: dict[int, ToolCall] = {}
        for call in whole.calls:
            if call.id is not None and call.name is not None:
                calls[call.index] = ToolCall(call.id, FunctionCall(call.name, ""))
            calls[call.index].function.arguments += call.arguments
        message.tool_calls = list(calls.values())
        message.content = whole.content if whole.content.strip() else None
    return message


def _call_part(call: ToolCallDelta) -> ToolCallPart:
    function = FunctionDelta(call.arguments, call.name)
    return ToolCallPart(call.index, function, call.id, None if call.id is None else "function")
