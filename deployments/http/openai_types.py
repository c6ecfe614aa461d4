"""OpenAI's requests, as pydantic types. Values are checked where they are used: ranges by SamplingParams."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from engine.errors import RequestError


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    include_usage: bool = False
    """One more event before the end, without choices, with the usage of the whole request."""
    continuous_usage_stats: bool = False
    """The usage so far in every event."""


class OpenAIRequest(BaseModel):
    """What every request has. Fields not known here are ignored, and named in a response header."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=(), use_attribute_docstrings=True)

    model: str | None = None
    user: str | None = None
    safety_identifier: str | None = None
    """What OpenAI has in the place of `user`. Without API keys: the tenant, for fair shares."""
    timeout: float | None = None
    """Seconds after which the request is aborted and answered with 504."""
    request_id: str | None = None
    cache_salt: str | None = None
    truncate_prompt_tokens: int | None = None
    priority: int | None = None


class EmbeddingRequest(OpenAIRequest):
    """POST /v1/embeddings."""

    input: Any
    """A string, token ids, or a list of either."""
    encoding_format: Literal["float", "base64"] | None = None
    """base64: little-endian float32."""
    dimensions: int | None = None
    """So many numbers of each vector are kept, its first ones, and it is brought to length 1 again."""
    pooling: Literal["mean", "last"] | None = None
    """How the tokens' hidden states become one vector; null: as configured."""


class GenerationRequest(OpenAIRequest):
    """What completions and chats have in common."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None

    # What the answer must match: OpenAI's way, and vLLM's two.
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    # SamplingParams by the same names; None leaves the default.
    n: int | None = None
    best_of: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    use_beam_search: bool | None = None
    """Search for the likeliest outputs with best_of (or n) beams; the n best come when the search ends."""
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None

    def sampling(self) -> dict[str, Any]:
        """The SamplingParams fields that were given, by name."""
        return {name: value for name in _SAMPLING if (value := getattr(self, name)) is not None}

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats


_SAMPLING = (
    "n",
    "best_of",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "max_tokens",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "include_stop_str_in_output",
    "prompt_logprobs",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "truncate_prompt_tokens",
    "priority",
    "use_beam_search",
    "length_penalty",
    "early_stopping",
)


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Any
    """A string, token ids, or a list of either."""
    suffix: str | None = None
    echo: bool | None = None
    logprobs: int | None = None


class ChatCompletionRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None
    """Reaches the chat template by this name; templates that do not know it pass it over."""


def prompts_of(value: Any, field: str = "prompt") -> list[str | list[int]]:
    """The prompts of a request's `field`: one string, token ids, or a list of either. Raises RequestError."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return list(value)
        if all(type(item) is int for item in value):
            return [value]
        if all(isinstance(item, list) and all(type(i) is int for i in item) for item in value):
            return list(value)
    if value in ("", []):
        raise RequestError(f"{field}: empty; at least one token is needed", param=field)
    raise RequestError(
        f"{field}: got {value!r:.100}, allowed: a string, a list of token ids, or a list of either", param=field
    )
