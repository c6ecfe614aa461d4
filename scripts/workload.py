"""Request traces that every engine is measured on: lists of (prompt token ids, output tokens), the same for a seed.

Token ids are uniform over the vocabulary but for ten at each end; lengths are lognormal, like those of public chat
traces: means of about 220 tokens in and 190 out.
"""

from __future__ import annotations

import random

Trace = list[tuple[list[int], int]]

_EDGE = 10  # ids at both ends of a vocabulary are often special


def chat(num_requests: int, vocab_size: int, *, seed: int = 0, lo: int = 4, hi: int = 1024) -> Trace:
    """Requests of chat-like lengths, each between lo and hi tokens in and out."""
    rng = random.Random(seed)

    def length(mu: float, sigma: float) -> int:
        return min(hi, max(lo, int(rng.lognormvariate(mu, sigma))))

    trace: Trace = []
    for _ in range(num_requests):
        prompt_tokens, output_tokens = length(4.85, 1.05), length(4.90, 0.90)
        trace.append((_token_ids(rng, vocab_size, prompt_tokens), output_tokens))
    return trace


def fixed(num_requests: int, vocab_size: int, prompt_tokens: int, output_tokens: int, *, seed: int = 0) -> Trace:
    """Requests of one shape."""
    rng = random.Random(seed)
    return [(_token_ids(rng, vocab_size, prompt_tokens), output_tokens) for _ in range(num_requests)]


def _token_ids(rng: random.Random, vocab_size: int, count: int) -> list[int]:
    return [rng.randrange(_EDGE, vocab_size - _EDGE) for _ in range(count)]
