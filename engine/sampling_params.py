"""SamplingParams: what a user may ask of one request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from engine.errors import RequestError
from engine.grammar import Grammar

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 8_192
MAX_SEQUENCES = 128


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to choose the tokens of one request, validated when made.

    n samples are returned, the best by mean log-probability of `best_of` drawn when that is larger. temperature 0 is
    greedy: its n samples are equal. top_k 0 or -1 and top_p 1 are off. `seed` None means a fresh one is drawn when the
    request is accepted; draws depend on (seed, sample index, position) only. `max_tokens` None runs to the context's
    end. `logprobs` k gives each token's log-probability and the k best beside it. `stop` strings end a sample where
    they begin. Raises RequestError, naming the field, for a value out of range or of the wrong type.
    """

    n: int = 1
    best_of: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    """Applied before top_k and top_p; 1 is off."""
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    """bad_words as token ids; filled by the tokenizer's owner, see engine.tokenizer."""
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    """What the output must match; the sample ends when it does and nothing may follow."""
    watermark: bool = False
    """Make half of the vocabulary, chosen anew by each token, likelier for the next; see kernels.watermark."""
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    detokenize: bool = True
    truncate_prompt_tokens: int | None = None
    priority: int = 0
    """Lower runs first, under the scheduler's policy "priority"."""
    use_beam_search: bool = False
    """Search for the likeliest outputs with best_of beams (n, without best_of); told when it ends: the n best, best
    first. What shapes draws has no effect; penalties change the log-probabilities by which beams are ranked, as in
    Transformers; what else changes probabilities is refused, but for min_tokens. `stop` strings cut the outputs, they
    end no beam."""
    length_penalty: float = 1.0
    """Beams are ranked by their log-probability / length ** length_penalty."""
    early_stopping: bool | Literal["never"] = False
    """When a search ends, once it has as many ended beams as its width: True: at once; False: when the best live beam
    scores worse, as long as it is; "never": when it would at any length."""

    def __post_init__(self) -> None:
        put = msgspec.structs.force_setattr
        for field in _NUMBERS:
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise _wrong(field, value, "a number")
            if value != value or value in (float("inf"), float("-inf")):
                raise _wrong(field, value, "a finite number")
        for field, optional in _INTEGERS.items():
            value = getattr(self, field)
            if value is None and optional:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise _wrong(field, value, "an integer" + (" or null" if optional else ""))
        for field in _FLAGS:
            if not isinstance(getattr(self, field), bool):
                raise _wrong(field, getattr(self, field), "true or false")
        put(self, "stop", _strings("stop", self.stop))
        put(self, "bad_words", _strings("bad_words", self.bad_words))
        put(self, "stop_token_ids", _ids("stop_token_ids", self.stop_token_ids or ()))
        if self.allowed_token_ids is not None:
            put(self, "allowed_token_ids", _ids("allowed_token_ids", self.allowed_token_ids))
            if not self.allowed_token_ids:
                raise _wrong("allowed_token_ids", [], "at least one token id")
        if self.logit_bias is not None:
            put(self, "logit_bias", _bias(self.logit_bias))
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise _wrong("grammar", self.grammar, "a Grammar or null")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise _wrong("early_stopping", self.early_stopping, 'true, false or "never"')
        self._check_ranges()
        if self.use_beam_search:
            self._check_beams()

    def _check_ranges(self) -> None:
        for field, low, high, what in _RANGES:
            value = getattr(self, field)
            if value is not None and not low <= value <= high:
                raise _wrong(field, value, what)
        for field, high, what in _ABOVE_0:
            value = getattr(self, field)
            if not 0 < value <= high:
                raise _wrong(field, value, what)
        if self.best_of is not None and self.best_of < self.n:
            raise _wrong("best_of", self.best_of, f"at least n ({self.n})")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _wrong("min_tokens", self.min_tokens, f"at most max_tokens ({self.max_tokens})")
        for field in ("stop", "bad_words"):
            if "" in getattr(self, field):
                raise _wrong(field, "", "non-empty strings")
        if self.stop and not self.detokenize:
            raise RequestError("stop: strings cannot be found with detokenize false", param="stop")
        if len(self.stop) > MAX_STOP_STRINGS or sum(map(len, self.stop)) > MAX_STOP_CHARS:
            raise RequestError(
                f"stop: {len(self.stop)} strings of {sum(map(len, self.stop))} characters: at most "
                f"{MAX_STOP_STRINGS} strings of {MAX_STOP_CHARS} characters in all",
                param="stop",
            )

    def _check_beams(self) -> None:
        for field, off in NOT_WITH_BEAMS.items():
            if getattr(self, field) != off:
                said = "structured output" if field == "grammar" else field
                raise RequestError(f"use_beam_search: not together with {said}", param="use_beam_search")

    @property
    def beam_width(self) -> int:
        """Live beams of a beam search."""
        return self.best_of if self.best_of is not None else self.n

    @property
    def num_sequences(self) -> int:
        """How many outputs the engine tells of: all samples, of which the n best are returned; the n best beams."""
        return self.best_of if self.best_of is not None and not self.use_beam_search else self.n

    @property
    def num_logprobs(self) -> int:
        """How many likeliest tokens the ranks tell of with each that they draw, where they tell of any.

        Of a beam: as many as may go on, and beside them those that would end it.
        """
        asked = self.logprobs or 0
        return max(asked, self.beam_width + len(self.stop_token_ids)) if self.use_beam_search else asked

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def needs_logprobs(self) -> bool:
        """Whether the engine must return each token's log-probability (asked for, or to rank beams or best_of)."""
        return self.logprobs is not None or self.use_beam_search or self.num_sequences > self.n

    def replace(self, **changes: Any) -> SamplingParams:
        """A validated copy with some fields changed."""
        return msgspec.structs.replace(self, **changes)


class BeamSearchParams(msgspec.Struct, frozen=True):
    """vLLM's parameters of a beam search, for `LLM.beam_search`; the `beam_width` best outputs are returned.

    `temperature` and `include_stop_str_in_output` have no effect: beams are ranked by the model's own
    log-probabilities, and an output has the token that ended it. Raises RequestError as SamplingParams does.
    """

    beam_width: int
    max_tokens: int | None
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        _ = self.sampling

    @property
    def sampling(self) -> SamplingParams:
        """The same as SamplingParams."""
        if type(self.beam_width) is not int or not 1 <= self.beam_width <= MAX_SEQUENCES:
            raise _wrong("beam_width", self.beam_width, f"1 to {MAX_SEQUENCES}")
        return SamplingParams(
            n=self.beam_width,
            use_beam_search=True,
            temperature=self.temperature,
            max_tokens=self.max_tokens,
            ignore_eos=self.ignore_eos,
            length_penalty=self.length_penalty,
            early_stopping=self.early_stopping,
            logprobs=min(2 * self.beam_width, MAX_LOGPROBS),
            detokenize=False,
        )


_FLAGS = (
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "detokenize",
    "watermark",
    "use_beam_search",
)
_NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "typical_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "length_penalty",
)
_INTEGERS = {
    "n": False,
    "best_of": True,
    "top_k": False,
    "seed": True,
    "max_tokens": True,
    "min_tokens": False,
    "logprobs": True,
    "prompt_logprobs": True,
    "truncate_prompt_tokens": True,
    "priority": False,
}
NOT_WITH_BEAMS: dict[str, Any] = {
    "logit_bias": None,
    "allowed_token_ids": None,
    "bad_words": (),
    "watermark": False,
    "prompt_logprobs": None,
    "grammar": None,
}
"""Fields that a beam search wants left alone, and the value that does."""
_RANGES: tuple[tuple[str, float, float, str], ...] = (
    ("n", 1, MAX_SEQUENCES, f"1 to {MAX_SEQUENCES}"),
    ("best_of", 1, MAX_SEQUENCES, f"1 to {MAX_SEQUENCES}"),
    ("temperature", 0, 100, "0 (greedy) to 100"),
    ("top_k", -1, 2**31 - 1, "-1 or 0 (off), or at least 1"),
    ("min_p", 0, 1, "0 to 1"),
    ("seed", -(2**63), 2**63 - 1, "a signed 64-bit integer"),
    ("presence_penalty", -2, 2, "-2 to 2"),
    ("frequency_penalty", -2, 2, "-2 to 2"),
    ("max_tokens", 1, 2**31 - 1, "at least 1"),
    ("min_tokens", 0, 2**31 - 1, "at least 0"),
    ("logprobs", 0, MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}"),
    ("prompt_logprobs", 0, MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}"),
    ("truncate_prompt_tokens", 1, 2**31 - 1, "at least 1"),
    ("length_penalty", -10, 10, "-10 to 10"),
    ("priority", -(2**31), 2**31 - 1, "a signed 32-bit integer"),
)


_ABOVE_0: tuple[tuple[str, float, str], ...] = (
    ("top_p", 1, "above 0, at most 1"),
    ("typical_p", 1, "above 0, at most 1"),
    ("repetition_penalty", float("inf"), "above 0"),
)
RANGES: dict[str, dict[str, float]] = {
    **{field: {"minimum": low, "maximum": high} for field, low, high, _ in _RANGES},
    **{field: {"exclusiveMinimum": 0, "maximum": high} for field, high, _ in _ABOVE_0 if high < float("inf")},
    "repetition_penalty": {"exclusiveMinimum": 0},
}
"""What numbers a field may have, in JSON Schema's words."""


def _wrong(field: str, got: object, allowed: str) -> RequestError:
    return RequestError(f"{field}: got {got!r:.200}, allowed: {allowed}", param=field)


def _strings(field: str, value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, Sequence) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise _wrong(field, value, "a string or a list of strings")


def _ids(field: str, value: object) -> tuple[int, ...]:
    if isinstance(value, Sequence | set | frozenset) and all(type(item) is int and item >= 0 for item in value):
        return tuple(value)
    raise _wrong(field, value, "a list of token ids (integers from 0)")


def _bias(value: object) -> dict[int, float]:
    if not isinstance(value, dict):
        raise _wrong("logit_bias", value, "an object of token id: number")
    out: dict[int, float] = {}
    for key, bias in value.items():
        try:
            token = int(key)
        except (TypeError, ValueError):
            raise _wrong("logit_bias", key, "token ids as keys") from None
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise _wrong("logit_bias", bias, "numbers from -100 to 100")
        if token < 0:
            raise _wrong("logit_bias", key, "token ids from 0")
        out[token] = float(bias)
    return out
