"""Engine outputs to text: streaming deltas for servers, whole results for `LLM`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from engine.detokenizer import PRIMING_TOKENS, IncrementalDetokenizer
from engine.request import Request, SequenceOutput, TokenLogprobs
from engine.step import pack, unpack
from engine.stop_strings import StopMatcher
from engine.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log-probability of one token under the model, its rank (1: most likely) and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


Logprobs = list[dict[int, Logprob]]
"""One dict a token: the token itself first, then the most likely ones, by id."""


@dataclass(slots=True)
class CompletionOutput:
    """One finished sample. The text holds no stop string and no stop token unless they were asked for."""

    index: int
    text: str
    token_ids: list[int]
    """Every token drawn, the stop token included."""
    cumulative_logprob: float | None
    """None unless log-probabilities were computed (logprobs, best_of or use_beam_search)."""
    logprobs: Logprobs | None
    finish_reason: str | None
    """"stop", "length", "abort" or "error"."""
    stop_reason: int | str | None = None
    """The stop string or the token of stop_token_ids that ended it; None for the model's own end of sequence."""

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """One finished request: n samples in order of index, or the n best of best_of or of a beam search, best first."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int = 0
    num_completion_tokens: int = 0
    """Tokens drawn in all, samples that best_of left out included; of a beam search those of its outputs."""
    error: str | None = None
    """What went wrong, when a sample finished with "error"."""
    embedding: bytes | None = None
    """float32 [hidden_size] of a prompt that was embedded; not normalised. See engine.embedding."""


@dataclass(slots=True)
class OutputDelta:
    """What one sample gained since its last delta. `text` is empty while a character or a stop string is undecided."""

    request_id: str
    index: int
    text: str
    token_ids: list[int]
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None


@dataclass(slots=True)
class ProcessedOutputs:
    """What one batch of engine outputs led to."""

    deltas: list[OutputDelta] = field(default_factory=list)
    aborts: list[tuple[str, int]] = field(default_factory=list)
    """(request_id, index) of samples that a stop string ended: the engine is still drawing them and must be told."""
    finished: list[RequestOutput] = field(default_factory=list)
    """Requests all of whose samples are done; they are forgotten here. Their last deltas are in `deltas`."""


class OutputProcessor:
    """Follows every request between its acceptance and its end; lives where the texts are needed.

    One thread at a time. With best_of above n nothing is known of the n best before the end: their deltas come whole,
    with the last of the batch.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        """Without a tokenizer every text is empty."""
        self._tokenizer = tokenizer
        self._requests: dict[str, _RequestState] = {}

    def add(self, request: Request, prompt: str | None = None) -> None:
        """Expect outputs of `request`. Call it before the engine can produce any."""
        assert request.request_id not in self._requests, f"request {request.request_id} added twice"
        self._requests[request.request_id] = _RequestState(request, prompt, self._tokenizer)

    def process(self, outputs: Iterable[SequenceOutput]) -> ProcessedOutputs:
        """Take what the engine produced, in order. Outputs of unknown requests (aborted ones) are ignored."""
        processed = ProcessedOutputs()
        for output in outputs:
            state = self._requests.get(output.request_id)
            if state is None:
                continue
            if output.index in state.done:
                if output.finish_reason is None:  # a resumed request's finished sample runs again
                    processed.aborts.append((output.request_id, output.index))
                continue
            delta = state.take(output)
            if delta.finish_reason is not None:
                state.done.add(output.index)
                if output.finish_reason is None:
                    processed.aborts.append((output.request_id, output.index))
            if not state.chooses_best:
                processed.deltas.append(delta)
            if len(state.done) == len(state.samples):
                del self._requests[output.request_id]
                result = state.result()
                if state.chooses_best:
                    processed.deltas.extend(_whole(result))
                processed.finished.append(result)
        return processed

    def discard(self, request_id: str) -> None:
        """Forget a request whose client is gone. No effect when it is unknown."""
        self._requests.pop(request_id, None)

    def resumed(self, request_id: str) -> Request | None:
        """The request with its samples' tokens so far, for another engine to go on with; None when it is unknown."""
        state = self._requests.get(request_id)
        if state is None:
            return None
        return msgspec.structs.replace(state.request, resume=tuple(pack(s.token_ids) for s in state.samples))

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._requests


class _RequestState:
    """What is known of one unfinished request."""

    __slots__ = (
        "chooses_best",
        "done",
        "embedding",
        "error",
        "num_cached_tokens",
        "prompt",
        "prompt_logprobs",
        "request",
        "samples",
        "tokenizer",
    )

    def __init__(self, request: Request, prompt: str | None, tokenizer: Tokenizer | None) -> None:
        params = request.params
        self.request = request
        self.prompt = prompt
        self.tokenizer = tokenizer
        self.chooses_best = params.num_sequences > params.n
        self.samples = [_SampleState(request, i, tokenizer) for i in range(params.num_sequences)]
        self.done: set[int] = set()
        self.num_cached_tokens = 0
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        self.error: str | None = None
        self.embedding: bytes | None = None

    def take(self, output: SequenceOutput) -> OutputDelta:
        if output.num_cached_tokens:
            self.num_cached_tokens = output.num_cached_tokens
        if output.prompt_logprobs is not None:
            top = self.request.params.prompt_logprobs or 0
            self.prompt_logprobs = [
                None if entry is None else _decoded(token_id, entry, top, self.tokenizer)
                for token_id, entry in zip(self.request.prompt_token_ids, output.prompt_logprobs)
            ]
        if output.error is not None:
            self.error = output.error
        if output.embedding is not None:
            self.embedding = output.embedding
        return self.samples[output.index].take(output)

    def result(self) -> RequestOutput:
        samples = self.samples
        if self.chooses_best:
            samples = sorted(samples, key=_SampleState.quality, reverse=True)[: self.request.params.n]
        return RequestOutput(
            request_id=self.request.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.request.prompt_token_ids,
            prompt_logprobs=self.prompt_logprobs,
            outputs=[sample.result(i) for i, sample in enumerate(samples)],
            finished=True,
            num_cached_tokens=self.num_cached_tokens,
            num_completion_tokens=sum(len(sample.token_ids) for sample in self.samples),
            error=self.error,
            embedding=self.embedding,
        )


class _SampleState:
    """The tokens and the text of one sample so far."""

    __slots__ = (
        "cumulative_logprob",
        "detokenizer",
        "finish_reason",
        "index",
        "logprobs",
        "matcher",
        "request",
        "stop_reason",
        "texts",
        "token_ids",
        "tokenizer",
    )

    def __init__(self, request: Request, index: int, tokenizer: Tokenizer | None) -> None:
        params = request.params
        self.request = request
        self.index = index
        self.tokenizer = tokenizer
        self.detokenizer: IncrementalDetokenizer | None = None
        if tokenizer is not None and params.detokenize:
            self.detokenizer = IncrementalDetokenizer(
                tokenizer,
                skip_special_tokens=params.skip_special_tokens,
                prompt_token_ids=unpack(request.prompt[-4 * PRIMING_TOKENS :]).tolist(),
            )
        self.matcher = StopMatcher(params.stop, include=params.include_stop_str_in_output) if params.stop else None
        self.token_ids: list[int] = []
        self.texts: list[str] = []
        self.logprobs: Logprobs | None = [] if params.logprobs is not None else None
        self.cumulative_logprob = 0.0
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None

    def take(self, output: SequenceOutput) -> OutputDelta:
        """Add the output's tokens up to the one that completes a stop string."""
        token_ids = output.token_ids
        self.finish_reason, self.stop_reason = output.finish_reason, output.stop_reason
        if self.detokenizer is None:
            text = ""
        elif self.matcher is None:
            text = self.detokenizer.push(self._visible(output))
            if output.finish_reason is not None:
                text += self.detokenizer.finish()
        else:
            text, used = self._until_stop(self.detokenizer, self.matcher, output)
            token_ids = token_ids[:used]
        self.token_ids += token_ids
        if text:
            self.texts.append(text)
        logprobs = self._take_logprobs(token_ids, output.logprobs)
        return OutputDelta(
            output.request_id,
            output.index,
            text,
            token_ids,
            logprobs,
            self.finish_reason,
            self.stop_reason,
            output.error,
        )

    def _visible(self, output: SequenceOutput) -> list[int]:
        """The tokens that give text: all but the stop token, unless stops were asked for."""
        stopped = output.finish_reason == "stop" and not output.matched
        if stopped and not self.request.params.include_stop_str_in_output:
            return output.token_ids[:-1]
        return output.token_ids

    def _until_stop(
        self, detokenizer: IncrementalDetokenizer, matcher: StopMatcher, output: SequenceOutput
    ) -> tuple[str, int]:
        """The text let through, and how many of the output's tokens lead up to a stop string (all, without one)."""
        texts: list[str] = []
        min_tokens = self.request.params.min_tokens
        visible = self._visible(output)
        for used, token_id in enumerate(visible, start=1):
            text = detokenizer.push((token_id,))
            if not text:
                continue
            if len(self.token_ids) + used <= min_tokens:  # stop strings count from the first token that may be the last
                texts.append(text)
                continue
            text, found = matcher.push(text)
            texts.append(text)
            if found is not None:
                self.finish_reason, self.stop_reason = "stop", found
                return "".join(texts), used
        if output.finish_reason is not None:
            text, found = matcher.push(detokenizer.finish())
            texts += (text, matcher.finish())
            if found is not None:
                self.finish_reason, self.stop_reason = "stop", found
        return "".join(texts), len(output.token_ids)

    def _take_logprobs(self, token_ids: list[int], entries: list[TokenLogprobs] | None) -> Logprobs | None:
        if entries is None:
            return None
        entries = entries[: len(token_ids)]
        self.cumulative_logprob += sum(entry.logprob for entry in entries)
        if self.logprobs is None:
            return None
        top = self.request.params.logprobs or 0
        logprobs = [_decoded(i, entry, top, self.tokenizer) for i, entry in zip(token_ids, entries)]
        self.logprobs += logprobs
        return logprobs

    def quality(self) -> tuple[bool, float]:
        """Orders the samples of best_of: the mean log-probability of a token; a failed sample comes last."""
        whole = self.finish_reason in ("stop", "length")
        return whole, self.cumulative_logprob / max(1, len(self.token_ids))

    def result(self, index: int) -> CompletionOutput:
        return CompletionOutput(
            index=index,
            text="".join(self.texts),
            token_ids=self.token_ids,
            cumulative_logprob=self.cumulative_logprob if self.request.params.needs_logprobs else None,
            logprobs=self.logprobs,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )


def _decoded(token_id: int, entry: TokenLogprobs, top: int, tokenizer: Tokenizer | None) -> dict[int, Logprob]:
    def text(i: int) -> str | None:
        return tokenizer.token_text(i) if tokenizer is not None else None

    out = {token_id: Logprob(entry.logprob, entry.rank, text(token_id))}
    for rank, (top_id, logprob) in enumerate(zip(entry.top_ids[:top], entry.top_logprobs), start=1):
        if top_id not in out:
            out[top_id] = Logprob(logprob, rank, text(top_id))
    return out


def _whole(result: RequestOutput) -> list[OutputDelta]:
    """Each sample as one delta."""
    return [
        OutputDelta(
            result.request_id,
            sample.index,
            sample.text,
            sample.token_ids,
            sample.logprobs,
            sample.finish_reason,
            sample.stop_reason,
            result.error if sample.finish_reason == "error" else None,
        )
        for sample in result.outputs
    ]
