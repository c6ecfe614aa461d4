"""BeamSearchOutput: what a beam search found, as programs written for vLLM's `LLM.beam_search` read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from engine.output import Logprobs, RequestOutput
from engine.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class BeamSearchSequence:
    """One continuation of a prompt, with the prompt."""

    tokens: list[int]
    """The prompt's, then the output's, with what ended it."""
    logprobs: Logprobs
    """One entry an output token."""
    cum_logprob: float
    """Sum of the output's log-probabilities, without length penalty."""
    text: str
    """All tokens as text, special ones too."""
    finish_reason: str | None
    """"stop" or "length"; "error" with no output."""
    stop_reason: int | str | None = None


@dataclass(frozen=True, slots=True)
class BeamSearchOutput:
    """The continuations of one prompt, best first."""

    sequences: list[BeamSearchSequence]

    @classmethod
    def of(cls, result: RequestOutput, tokenizer: Tokenizer) -> Self:
        sequences = []
        for output in result.outputs:
            tokens = result.prompt_token_ids + output.token_ids
            sequences.append(
                BeamSearchSequence(
                    tokens,
                    output.logprobs or [],
                    output.cumulative_logprob or 0.0,
                    tokenizer.decode_raw(tokens),
                    output.finish_reason,
                    output.stop_reason,
                )
            )
        return cls(sequences)
