"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from deployments.http.errors import NotSupported
from deployments.http.logprobs import completion_logprobs
from deployments.http.openai_call import Call, respond
from deployments.http.openai_replies import Completion, CompletionChoice, CompletionLogprobs, Usage, usage
from deployments.http.openai_types import CompletionRequest, prompts_of
from deployments.http.sse import DONE, event
from deployments.http.structured import grammar_of
from deployments.service import ModelService
from engine.output import OutputDelta, RequestOutput
from engine.sampling_params import SamplingParams


async def create_completion(request: Request) -> Response:
    """Answer each prompt with n texts; choices are ordered by prompt, then by sample."""
    return await respond(request, CompletionRequest, _Completions)


class _Completions(Call[CompletionRequest]):
    """One request on its way: its prompts, its batch, and how its answer looks."""

    prefix = "cmpl"

    def __init__(self, service: ModelService, body: CompletionRequest, answer_id: str) -> None:
        if body.suffix:
            raise NotSupported("suffix: this model cannot fill in a middle", param="suffix")
        if body.stream and body.echo and body.logprobs is not None:
            raise NotSupported("echo: with logprobs it cannot be streamed", param="echo")
        super().__init__(service, body, answer_id)
        self.prompts = prompts_of(body.prompt)
        self.echo_only = bool(body.echo) and body.max_tokens == 0
        self.params = self._params()
        self.echoes: list[str] = []

    def _params(self) -> SamplingParams:
        given = self.body.sampling()
        if self.echo_only:
            given["max_tokens"] = 1  # drawn, and left out of the answer
        if self.body.logprobs is not None:
            given["logprobs"] = self.body.logprobs
            if self.body.echo:
                given.setdefault("prompt_logprobs", self.body.logprobs)
        given["grammar"] = grammar_of(self.body)
        return self.service.sampling_params(given, max_tokens=16)

    async def start(self) -> None:
        """Tokenize and submit every prompt; none is submitted when one is at fault."""
        ids = await self.service.encode_prompts(self.prompts, self.params)
        if self.body.echo:
            self.echoes = [p if isinstance(p, str) else self.service.tokenizer.decode_raw(p) for p in self.prompts]
        self.submit(ids, self.params)

    async def answer(self) -> Completion:
        async with self.batch as batch:
            results = await batch.results()
        choices = [choice for i, result in enumerate(results) for choice in self._choices(i, result)]
        completion_tokens = 0 if self.echo_only else sum(r.num_completion_tokens for r in results)
        cached = sum(r.num_cached_tokens for r in results)
        return self._completion(choices, usage(batch.num_prompt_tokens, completion_tokens, cached))

    async def events(self) -> AsyncGenerator[bytes, None]:
        body, n = self.body, self.params.n
        completion_tokens = 0
        lengths = [len(self.echoes[i // n]) if self.echoes else 0 for i in range(len(self.prompts) * n)]
        begun = [not self.echoes] * len(lengths)
        async with self.batch as batch:
            async for number, deltas in batch.updates():
                for delta in deltas:
                    completion_tokens += 0 if self.echo_only else len(delta.token_ids)
                    index = number * n + delta.index
                    choice = self._delta_choice(index, delta, lengths[index])
                    lengths[index] += len(choice.text)
                    if not begun[index]:
                        begun[index] = True
                        choice.text = self.echoes[number] + choice.text
                    if choice.text or choice.finish_reason or choice.logprobs or choice.token_ids:
                        told = usage(batch.num_prompt_tokens, completion_tokens) if body.continuous_usage else None
                        yield event(self._completion([choice], told))
            if body.include_usage:
                cached = sum(g.result.num_cached_tokens for g in batch.generations if g.result is not None)
                yield event(self._completion([], usage(batch.num_prompt_tokens, completion_tokens, cached)))
        yield DONE

    def _completion(self, choices: list[CompletionChoice], told: Usage | None) -> Completion:
        return Completion(self.id, self.created, self.service.name, choices, usage=self.shown(told))

    def _delta_choice(self, index: int, delta: OutputDelta, offset: int) -> CompletionChoice:
        text, token_ids, logprobs = delta.text, delta.token_ids, delta.logprobs
        finish_reason, stop_reason = delta.finish_reason, delta.stop_reason
        if self.echo_only:
            text, token_ids, logprobs, finish_reason, stop_reason = "", [], None, "length", None
        choice = CompletionChoice(index, text, finish_reason=finish_reason, stop_reason=stop_reason)
        if logprobs:
            choice.logprobs = self._logprobs(logprobs, token_ids, offset)
        if self.body.return_token_ids and token_ids:
            choice.token_ids = token_ids
        return choice

    def _choices(self, number: int, result: RequestOutput) -> list[CompletionChoice]:
        choices = []
        for output in result.outputs:
            text, token_ids, entries = output.text, output.token_ids, output.logprobs
            finish_reason, stop_reason = output.finish_reason, output.stop_reason
            if self.echo_only:
                text, token_ids, finish_reason, stop_reason = "", [], "length", None
                entries = entries and []
            offset = len(self.echoes[number]) if self.echoes else 0
            logprobs = self._logprobs(entries, token_ids, offset) if entries is not None else None
            if self.echoes:
                text = self.echoes[number] + text
                if logprobs is not None and result.prompt_logprobs is not None:
                    before = self._logprobs(result.prompt_logprobs, result.prompt_token_ids, 0)
                    logprobs = _joined(before, logprobs)
            index = number * self.params.n + output.index
            choice = CompletionChoice(index, text, logprobs, finish_reason, stop_reason)
            if self.body.return_token_ids:
                choice.token_ids, choice.prompt_token_ids = token_ids, result.prompt_token_ids
            if self.body.prompt_logprobs is not None:
                choice.prompt_logprobs = result.prompt_logprobs or []
            choices.append(choice)
        return choices

    def _logprobs(self, entries: Any, token_ids: list[int], offset: int) -> CompletionLogprobs:
        return completion_logprobs(entries, token_ids, self.params.logprobs or 0, self.service.tokenizer, offset=offset)


def _joined(a: CompletionLogprobs, b: CompletionLogprobs) -> CompletionLogprobs:
    return CompletionLogprobs(
        a.tokens + b.tokens,
        a.token_logprobs + b.token_logprobs,
        a.top_logprobs + b.top_logprobs,
        a.text_offset + b.text_offset,
    )
