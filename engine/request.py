"""Request: what was asked, immutable. SequenceOutput: what comes back of one of its samples, a step at a time."""

from __future__ import annotations

import secrets

import msgspec

from engine.sampling_params import SamplingParams
from engine.step import Pooling, pack, unpack

_SEED_STEP = 0x9E3779B97F4A7C15  # the golden ratio in 64 bits: far-apart seeds for the samples of one request


class Request(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One request, as a driver accepts it; it crosses processes.

    `seed` is fixed when the request is made, so that a resumed request draws what it would have drawn. `resume` holds,
    for each sample, the output tokens it already had (empty: a fresh request).
    """

    request_id: str
    prompt: bytes
    """Prompt token ids, little-endian int32."""
    params: SamplingParams
    seed: int
    arrival_s: float = 0.0
    """Wall-clock time of acceptance; FCFS order survives a resume."""
    cache_salt: str = ""
    """Prefix-cache blocks are shared only between requests of the same salt."""
    resume: tuple[bytes, ...] = ()
    tenant: str = ""
    """Who asks: the scheduler serves tenants in turn."""
    pooling: Pooling | None = None
    """Embed the prompt rather than go on from it: its one output has the vector and no token."""

    @classmethod
    def create(
        cls,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        arrival_s: float = 0.0,
        cache_salt: str = "",
        tenant: str = "",
        pooling: Pooling | None = None,
    ) -> Request:
        """A fresh request; draws a seed when params has none."""
        seed = params.seed if params.seed is not None else secrets.randbits(63)
        return cls(
            request_id=request_id,
            prompt=pack(prompt_token_ids),
            params=params,
            seed=seed,
            arrival_s=arrival_s,
            cache_salt=cache_salt,
            tenant=tenant,
            pooling=pooling,
        )

    @property
    def prompt_token_ids(self) -> list[int]:
        ids: list[int] = unpack(self.prompt).tolist()
        return ids

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt) // 4

    def sample_seed(self, index: int) -> int:
        """The seed of sample `index`, in [0, 2^63): the request's own for the first."""
        return (self.seed + index * _SEED_STEP) & (2**63 - 1)


class TokenLogprobs(msgspec.Struct, array_like=True, gc=False):
    """Log-probability of one token and the most likely ones at its position."""

    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


class SequenceOutput(msgspec.Struct, array_like=True, gc=False):
    """New tokens of one sample, in order; the driver sends one list of these a step."""

    request_id: str
    index: int
    token_ids: list[int]
    """Output tokens since the last one of these; the stop token, if any, is the last."""
    finish_reason: str | None = None
    """None while it runs; "stop", "length", "abort" or "error" on its last output."""
    stop_reason: int | None = None
    """The token of stop_token_ids that ended it; None for the model's own end of sequence."""
    logprobs: list[TokenLogprobs] | None = None
    """One entry for each of token_ids, when asked."""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """Whole, once, with the first token of sample 0; the first prompt token has None."""
    num_cached_tokens: int = 0
    """Prompt tokens found in the prefix cache; told with the first token."""
    error: str | None = None
    """What went wrong, for finish_reason "error"."""
    error_detail: dict[str, str | int | float | None] | None = None
    """Beside `error`: the error's class name under "class" and its own fields; see cluster.messages.error_of."""
    matched: bool = False
    """With finish_reason "stop": its grammar came to an end with the last token, which is text, not a stop token."""
    embedding: bytes | None = None
    """float32 [hidden_size], of a request with pooling; not normalised."""
