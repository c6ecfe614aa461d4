"""The model that hashes: what ranks without weights draw, and what a request must therefore give."""

from __future__ import annotations

import random
from functools import lru_cache

import numpy as np

from engine.request import Request
from engine.sampling_params import SamplingParams

EOS = 1
VOCAB_SIZE = 97
_MASK = 2**64 - 1


def mix(*values: int) -> int:
    """A well-spread 64-bit hash of integers."""
    state = 0x243F6A8885A308D3
    for value in values:
        state = (state ^ (value & _MASK)) * 0x9E3779B97F4A7C15 & _MASK
        state ^= state >> 29
        state = state * 0xBF58476D1CE4E5B9 & _MASK
        state ^= state >> 32
    return state


def attend(values: list[int], token: int) -> int:
    """The fake's whole model: what the slot of `token` holds after those before it. Every slot counts."""
    return mix(hash(tuple(values)), token)


def draw(state: int, params: SamplingParams, seed: int, position: int, num_prompt_tokens: int, eos_every: int) -> int:
    """The token at `position`, drawn from the logits `state`: never a stop token before min_tokens."""
    key = mix(state, 0 if params.greedy else seed, position)
    if key % eos_every == 0:
        token = EOS
    else:
        token = 2 + (key >> 20) % (VOCAB_SIZE - 2)
    masked = {EOS, *params.stop_token_ids} if position - num_prompt_tokens < params.min_tokens else set()
    while token in masked:
        token = 2 + (token + 1) % (VOCAB_SIZE - 2)
    return token


def fake_logprob(state: int, token: int) -> float:
    """Exact in float32."""
    return -(mix(state, token, 7) % 4096) / 256


def fake_vector(states: list[int]) -> bytes:
    """What the states of some tokens are pooled to."""
    return np.array([sum(state % 4096 for state in states) / len(states)], "<f4").tobytes()


def likeliest(state: int, count: int) -> list[int]:
    """The tokens of the highest fake_logprob, best first."""
    return _ranking(state)[:count]


@lru_cache(maxsize=100_000)
def _ranking(state: int) -> list[int]:
    return sorted(range(VOCAB_SIZE), key=lambda token: (-fake_logprob(state, token), token))


def expected_tokens(request: Request, model_len: int, eos_every: int = 20) -> list[tuple[list[int], str]]:
    """The output tokens and the finish reason of each sample, computed straight from the definition."""
    params, prompt = request.params, request.prompt_token_ids
    if params.use_beam_search:
        return expected_beams(request, model_len)
    results = []
    for index in range(params.num_sequences):
        values: list[int] = []
        for token in prompt:
            values.append(attend(values, token))
        tokens: list[int] = []
        while True:
            position = len(prompt) + len(tokens)
            token = draw(values[-1], params, request.sample_seed(index), position, len(prompt), eos_every)
            tokens.append(token)
            stops = (token == EOS and not params.ignore_eos) or token in params.stop_token_ids
            if stops and len(tokens) > params.min_tokens:
                results.append((tokens, "stop"))
                break
            if position + 1 >= model_len or len(tokens) == params.max_tokens:
                results.append((tokens, "length"))
                break
            values.append(attend(values, token))
    return results


def expected_beams(request: Request, model_len: int) -> list[tuple[list[int], str]]:
    """The outputs of a beam search, by trying every token after every beam."""
    params, prompt = request.params, request.prompt_token_ids
    width, penalty = params.beam_width, params.length_penalty
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else {EOS})
    longest = min(model_len - len(prompt), params.max_tokens or model_len)
    values: list[int] = []
    for token in prompt:
        values.append(attend(values, token))
    live: list[tuple[float, list[int], list[int]]] = [(0.0, [], values)]
    ended: list[tuple[float, list[int], str]] = []
    for length in range(1, longest + 1):
        tried = [
            (-(score + fake_logprob(values[-1], token)), order, rank, token)
            for order, (score, _, values) in enumerate(live)
            for rank, token in enumerate(likeliest(values[-1], VOCAB_SIZE))
            if token not in stops or length > params.min_tokens
        ]
        first = sorted(tried)[: width * (2 + len(stops))]
        best = [(-score, [*live[order][1], token], live[order][2]) for score, order, _, token in first]
        for score, tokens, _ in best[:width]:
            if tokens[-1] in stops or length == longest:
                reason = "stop" if tokens[-1] in stops else "length"
                ended.append((score / length**penalty, tokens, reason))
        ended = sorted(ended, key=lambda entry: -entry[0])[:width]
        going = [beam for beam in best if beam[1][-1] not in stops][:width]
        live = [(score, tokens, [*values, attend(values, tokens[-1])]) for score, tokens, values in going]
        if len(ended) == width:
            if params.early_stopping is True:
                break
            hoped = longest if params.early_stopping == "never" and penalty > 0 else length
            if live[0][0] / hoped**penalty <= ended[-1][0]:
                break
    return [(tokens, reason) for _, tokens, reason in ended[: params.n]]


def random_prompt(rng: random.Random, length: int) -> list[int]:
    """Token ids, never the end of sequence."""
    return [rng.randrange(2, VOCAB_SIZE) for _ in range(length)]
