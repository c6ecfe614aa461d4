"""Text Generation Inference's requests, as pydantic types, and its answers, as msgspec types."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from pydantic import BaseModel, ConfigDict

from engine.errors import RequestError
from engine.grammar import Grammar

Unset = msgspec.UnsetType
UNSET = msgspec.UNSET

MAX_TOP_N_TOKENS = 5
MAX_STOP_SEQUENCES = 4
MAX_BEST_OF = 8
DEFAULT_NEW_TOKENS = 100


class InvalidInput(RequestError):
    """TGI's validation error."""

    http_status = 422


class GrammarRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    type: Literal["json", "regex", "json_schema"]
    value: Any

    def grammar(self) -> Grammar:
        """As the engine takes it. Raises InvalidInput."""
        value = self.value
        if self.type == "regex":
            if not isinstance(value, str):
                raise InvalidInput("`grammar` of type regex must be a string", param="grammar")
            return Grammar("regex", value)
        if self.type == "json_schema" and isinstance(value, dict):
            value = value.get("schema", value)
        return Grammar("json_schema", value if isinstance(value, str) else msgspec.json.encode(value).decode())


class Parameters(BaseModel):
    """TGI's parameters; None is off, or the model's own way."""

    model_config = ConfigDict(strict=True, extra="allow")

    adapter_id: str | None = None
    best_of: int | None = None
    decoder_input_details: bool | None = False
    details: bool | None = False
    do_sample: bool | None = False
    frequency_penalty: float | None = None
    grammar: GrammarRequest | None = None
    max_new_tokens: int | None = DEFAULT_NEW_TOKENS
    repetition_penalty: float | None = None
    return_full_text: bool | None = None
    seed: int | None = None
    stop: list[str] | None = []
    temperature: float | None = None
    top_k: int | None = None
    top_n_tokens: int | None = None
    top_p: float | None = None
    truncate: int | None = None
    typical_p: float | None = None
    watermark: bool | None = False

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn rather than the likeliest taken: asked for, or implied by a parameter of drawing."""
        implied = (self.temperature, self.top_k, self.top_p, self.typical_p)
        return bool(self.do_sample) or any(value is not None for value in implied)

    def sampling(self, *, stream: bool) -> dict[str, Any]:
        """SamplingParams fields. Raises InvalidInput as TGI words it."""
        self._check(stream)
        given: dict[str, Any] = {
            "max_tokens": self.max_new_tokens,
            "temperature": (self.temperature or 1.0) if self.samples else 0.0,
            "stop": self.stop or [],
            "include_stop_str_in_output": True,
            "logprobs": self.top_n_tokens or 0,
            "n": 1,
        }
        if self.samples:
            # Nothing of the model's own generation_config: TGI's parameters are all there is.
            given |= {"top_k": self.top_k or 0, "top_p": self.top_p or 1.0}
            given |= {"min_p": 0.0, "typical_p": self.typical_p or 1.0}
        given["repetition_penalty"] = self.repetition_penalty or 1.0
        given["frequency_penalty"] = self.frequency_penalty or 0.0
        given["watermark"] = bool(self.watermark)
        if self.best_of is not None and self.best_of > 1:
            given["n"] = self.best_of
        if self.seed is not None:
            given["seed"] = self.seed & (2**63 - 1)
        if self.truncate is not None:
            given["truncate_prompt_tokens"] = self.truncate
        if self.decoder_input_details:
            given["prompt_logprobs"] = 0
        if self.grammar is not None:
            given["grammar"] = self.grammar.grammar()
        return given

    def _check(self, stream: bool) -> None:
        for name in ("temperature", "repetition_penalty", "top_k", "max_new_tokens", "truncate"):
            value = getattr(self, name)
            _need(name, value is None or value > 0, "must be strictly positive")
        for name in ("top_p", "typical_p"):
            value = getattr(self, name)
            _need(name, value is None or 0 < value < 1, "must be > 0.0 and < 1.0")
        penalty, best_of, top_n = self.frequency_penalty, self.best_of or 1, self.top_n_tokens or 0
        _need("frequency_penalty", penalty is None or -2 <= penalty <= 2, "must be >= -2.0 and <= 2.0")
        _need("seed", self.seed is None or 0 <= self.seed < 2**64, "must be an unsigned 64-bit integer")
        _need("best_of", 1 <= best_of <= MAX_BEST_OF, f"must be > 0 and <= {MAX_BEST_OF}")
        _need("best_of", best_of == 1 or self.samples, "> 1 needs `do_sample`")
        _need("best_of", best_of == 1 or self.seed is None, "> 1 and `seed` exclude each other")
        _need("best_of", best_of == 1 or not stream, "> 1 cannot be streamed")
        _need("decoder_input_details", not (stream and self.decoder_input_details), "cannot be streamed")
        _need("stop", len(self.stop or ()) <= MAX_STOP_SEQUENCES, f"supports up to {MAX_STOP_SEQUENCES} stop sequences")
        _need("top_n_tokens", 0 <= top_n <= MAX_TOP_N_TOKENS, f"must be >= 0 and <= {MAX_TOP_N_TOKENS}")
        _need("adapter_id", self.adapter_id is None, "is not supported: this server has no adapters")


def _need(name: str, holds: bool, rule: str) -> None:
    if not holds:
        raise InvalidInput(f"`{name}` {rule}", param=name)


class GenerateRequest(BaseModel):
    """POST /generate and /generate_stream."""

    model_config = ConfigDict(strict=True, extra="allow")

    inputs: str
    parameters: Parameters = Parameters()


class CompatGenerateRequest(GenerateRequest):
    """POST /."""

    stream: bool = False


class Token(msgspec.Struct):
    id: int
    text: str
    logprob: float | None
    special: bool


class InputToken(msgspec.Struct):
    id: int
    text: str
    logprob: float | None


class StreamDetails(msgspec.Struct):
    finish_reason: str
    generated_tokens: int
    seed: int | None
    input_length: int


class StreamEvent(msgspec.Struct):
    index: int
    token: Token
    generated_text: str | None = None
    details: StreamDetails | None = None
    top_tokens: list[Token] | Unset = UNSET


class BestOfSequence(msgspec.Struct):
    generated_text: str
    finish_reason: str
    generated_tokens: int
    seed: int | None
    prefill: list[InputToken]
    tokens: list[Token]
    top_tokens: list[list[Token]] | Unset = UNSET


class Details(msgspec.Struct):
    finish_reason: str
    generated_tokens: int
    seed: int | None
    prefill: list[InputToken]
    tokens: list[Token]
    top_tokens: list[list[Token]] | Unset = UNSET
    best_of_sequences: list[BestOfSequence] | Unset = UNSET


class Generated(msgspec.Struct):
    generated_text: str
    details: Details | Unset = UNSET


class Info(msgspec.Struct):
    model_id: str
    model_sha: str | None
    model_dtype: str
    model_device_type: str
    model_pipeline_tag: str
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int
    max_total_tokens: int
    max_batch_total_tokens: int
    validation_workers: int
    max_client_batch_size: int
    router: str
    version: str
    sha: str | None
    docker_label: str | None


class SimpleToken(msgspec.Struct):
    id: int
    text: str
    start: int
    stop: int
