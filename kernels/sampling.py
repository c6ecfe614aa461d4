"""Choosing the next token of each row of logits, and the log probabilities to report.

Nothing here sorts the vocabulary. A draw is an exponential race (Gumbel-max): argmax of logits / temperature + noise,
the noise a function of (seed, position, token) alone, so that a request gives the same tokens whatever it is batched
with. The kept sets of top-k, top-p and min-p are upper sets of the logits, so a winner of the race over more tokens is
the winner over the kept set if it belongs to it, and otherwise everything up to its logit can be left out of the next
race; whether it belongs to it is one count and one sum over the larger logits.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels import sampling_draw, sampling_logits
from kernels.philox import gumbel_noise, gumbel_noise_at
from kernels.registry import kernel

# Noise lies in (-3.2, 22.2): a token whose scaled logit is further below the row's largest can never win.
NOISE_SPAN = 25.5


@dataclass
class Penalties:
    """Penalties on tokens seen so far. The counts are kept for every running sequence; `rows` picks the batch's."""

    rows: Tensor  # [B] int64, row of the tables below; -1: no penalty
    output_counts: Tensor  # [S, V] int32, how often the sequence generated the token
    prompt_mask: Tensor  # [S, ceil(V / 32)] int32, bit (token % 32) of word (token // 32): the prompt has the token
    presence: Tensor  # [B] float32, subtracted once from the logit of a generated token; 0: off
    frequency: Tensor  # [B] float32, subtracted for each time it was generated; 0: off
    repetition: Tensor  # [B] float32, divides positive and multiplies negative logits of tokens seen anywhere; 1: off


@dataclass
class LogitBias:
    """Sparse additive bias, in coordinates; -inf bans a token. Entries with row -1 are padding."""

    rows: Tensor  # [K] int64, batch row
    token_ids: Tensor  # [K] int64
    values: Tensor  # [K] float32


@dataclass
class SamplingTensors:
    """What `sample` needs of each row. None stands for 'off in every row'."""

    temperature: Tensor  # [B] float32; 0: greedy
    seeds: Tensor  # [B] int64
    positions: Tensor  # [B] int64, position of the token being chosen
    top_k: Tensor | None = None  # [B] int32; 0: off
    top_p: Tensor | None = None  # [B] float32; 1: off
    min_p: Tensor | None = None  # [B] float32; 0: off
    allowed: Tensor | None = None  # [B, ceil(V / 32)] int32 bitmask of allowed tokens, all ones: off
    bias: LogitBias | None = None
    penalties: Penalties | None = None
    all_greedy: bool = field(default=False)  # no row draws: known on the host, chooses the launch
    any_filter: bool = field(default=True)  # False: no row uses top_k, top_p or min_p


def unpack_bitmask(mask: Tensor, size: int) -> Tensor:
    """[B, W] int32 bit words, lowest bit first -> [B, size] bool."""
    bits = torch.arange(32, dtype=torch.int32, device=mask.device)
    return ((mask[:, :, None] >> bits) & 1).flatten(1)[:, :size].to(torch.bool)


def pack_bitmask(allowed: Tensor) -> Tensor:
    """[B, V] bool -> [B, ceil(V / 32)] int32 bit words, lowest bit first."""
    rows, size = allowed.shape
    words = -(-size // 32)
    padded = torch.zeros(rows, words * 32, dtype=torch.int64, device=allowed.device)
    padded[:, :size] = allowed
    weights = torch.ones(32, dtype=torch.int64, device=allowed.device) << torch.arange(32, device=allowed.device)
    packed = (padded.view(rows, words, 32) * weights).sum(-1)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


@kernel
def adjust_logits(logits: Tensor, params: SamplingTensors) -> Tensor:
    """Apply penalties, then bias, then the allowed-token mask.

    logits [B, V], any float dtype. Returns a new float32 [B, V], or `logits` itself when no row asks for any of them.
    """
    if params.penalties is None and params.bias is None and params.allowed is None:
        return logits
    logits = logits.to(torch.float32, copy=True)
    if params.penalties is not None:
        apply_penalties.definition(logits, params.penalties)
    if params.bias is not None:
        bias = params.bias
        keep = bias.rows >= 0
        logits.index_put_((bias.rows[keep], bias.token_ids[keep]), bias.values[keep], accumulate=True)
    if params.allowed is not None:
        logits.masked_fill_(~unpack_bitmask(params.allowed, logits.shape[1]), float("-inf"))
    return logits


@kernel
def apply_penalties(logits: Tensor, penalties: Penalties) -> None:
    """Apply repetition, then frequency and presence penalties to logits [B, V] float32, in place.

    Source: the OpenAI API's definition of presence and frequency; CTRL, Keskar et al. 2019, for repetition.
    """
    batch = (penalties.rows >= 0).nonzero()[:, 0]
    if len(batch) == 0:
        return
    table = penalties.rows[batch]
    counts = penalties.output_counts[table]
    generated = counts > 0
    seen = generated | unpack_bitmask(penalties.prompt_mask[table], logits.shape[1])
    chosen = logits[batch]
    repetition = penalties.repetition[batch, None]
    chosen = torch.where(seen, torch.where(chosen > 0, chosen / repetition, chosen * repetition), chosen)
    chosen -= penalties.frequency[batch, None] * counts
    chosen -= penalties.presence[batch, None] * generated
    logits[batch] = chosen


@kernel
def count_tokens(token_ids: Tensor, rows: Tensor, output_counts: Tensor) -> None:
    """Count one newly generated token a row: output_counts[rows[b], token_ids[b]] += 1, skipping rows of -1.

    token_ids, rows [B] int64; output_counts [S, V] int32, mutated.
    """
    keep = rows >= 0
    ones = torch.ones_like(token_ids[keep], dtype=torch.int32)
    output_counts.index_put_((rows[keep], token_ids[keep]), ones, accumulate=True)


@kernel
def sample(logits: Tensor, params: SamplingTensors) -> Tensor:
    """Choose one token of each row.

    logits [B, V], any float dtype, not changed; params' penalties, bias and mask are applied first. A row of
    temperature 0 takes the largest logit, the lowest index among equals. Others draw from softmax(logits / temperature)
    restricted to the top_k largest logits (ties with the k-th included), of those to the smallest set of the largest
    whose renormalised mass reaches top_p (ties included), and of those to tokens at least min_p times as likely as the
    likeliest. Returns [B] int64. Rows are independent of each other.
    """
    logits = adjust_logits.definition(logits, params)
    if params.all_greedy:
        return torch.argmax(logits, dim=-1)
    random = (params.temperature > 0).nonzero()[:, 0]
    if len(random) == 0:
        return torch.argmax(logits, dim=-1)
    if len(random) == len(logits):
        return _draw(logits, params, random)
    chosen = torch.argmax(logits, dim=-1)
    chosen[random] = _draw(logits[random], params, random)
    return chosen


def _draw(logits: Tensor, params: SamplingTensors, rows: Tensor) -> Tensor:
    """Draw a token from each row of logits [n, V], whose parameters are params' rows `rows`."""
    x = logits.float() * (1 / params.temperature[rows, None])
    x -= x.amax(dim=-1, keepdim=True)
    seeds, positions = params.seeds[rows], params.positions[rows]
    filtered = params.any_filter and not (params.top_k is None and params.top_p is None and params.min_p is None)
    floor = torch.full_like(x[:, :1], -NOISE_SPAN)
    if not filtered:
        return _race(x, x >= floor, seeds, positions).argmax(dim=-1)

    size = x.shape[1]
    weights = torch.exp(x)
    if params.top_k is not None:
        top_k = params.top_k[rows].to(torch.int64)
        largest = int(top_k.max())
        if largest > 0:
            values = torch.topk(x, min(largest, size), dim=-1).values
            kth = values.gather(1, (top_k.clamp(1, size) - 1)[:, None])
            in_top_k = (x >= kth) | (top_k == 0)[:, None]
            weights.masked_fill_(~in_top_k, 0)
    mass = weights.sum(dim=-1, dtype=torch.float64)
    floor_weight = torch.zeros_like(params.temperature[rows])
    limit = torch.full_like(mass, float("inf"))
    if params.min_p is not None:
        floor_weight = params.min_p[rows]
    candidates = (weights > 0) & (x >= floor) & (weights >= floor_weight[:, None])
    if params.top_p is not None:
        top_p = params.top_p[rows]
        limit = torch.where(top_p < 1, top_p * mass, limit)
        # Tokens this unlikely weigh at most 1 - top_p together: none of them is needed to reach top_p.
        candidates &= weights > ((1 - top_p) * mass * (0.999 / size))[:, None]
        candidates |= x == 0  # the likeliest is always kept
    race = _race(x, candidates, seeds, positions)
    chosen = race.argmax(dim=-1)
    if params.top_p is None:
        return chosen
    active = torch.arange(len(rows), device=x.device)
    while True:
        # The winner is in the nucleus if what is strictly likelier does not reach top_p yet.
        pivot = x[active].gather(1, chosen[active, None])
        above = torch.where(x[active] > pivot, weights[active], 0).sum(dim=-1, dtype=torch.float64)
        rejected = (above >= limit[active]) & (above > 0)
        if not bool(rejected.any()):
            return chosen
        active, pivot = active[rejected], pivot[rejected]
        race[active] = race[active].masked_fill(x[active] <= pivot, float("-inf"))
        chosen[active] = race[active].argmax(dim=-1)


def _race(x: Tensor, candidates: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """x + Gumbel noise where `candidates`, -inf elsewhere; few candidates cost few draws of noise."""
    if 4 * int(candidates.count_nonzero()) >= x.numel():
        return torch.where(candidates, x + gumbel_noise(seeds, positions, x.shape[1]), float("-inf"))
    race = torch.full_like(x, float("-inf"))
    row, token = candidates.nonzero(as_tuple=True)
    race[row, token] = x[row, token] + gumbel_noise_at(seeds[row], positions[row], token)
    return race


@kernel
def gather_logprobs(logits: Tensor, token_ids: Tensor, top_n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log probabilities of the chosen tokens and of each row's likeliest.

    logits [B, V], any float dtype; token_ids [B] int64; top_n >= 0. Returns (logprob of the chosen [B] float32, its
    rank [B] int64, 1 for the likeliest, top token ids [B, top_n] int64, their logprobs [B, top_n] float32), largest
    first.
    """
    x = logits.float()
    normaliser = torch.logsumexp(x, dim=-1, keepdim=True)
    chosen = x.gather(1, token_ids[:, None])
    rank = (x > chosen).sum(dim=-1) + 1
    top = torch.topk(x, min(top_n, x.shape[1]), dim=-1)
    return (chosen - normaliser)[:, 0], rank, top.indices, top.values - normaliser


@kernel
def local_argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit of each row and its lowest index: what one rank of a split vocabulary offers the others.

    logits [B, V], any float dtype. Returns (values [B] float32, indices [B] int64).
    """
    indices = torch.argmax(logits, dim=-1)
    return logits.gather(1, indices[:, None])[:, 0].float(), indices


def _why_not(logits: Tensor, *_: object, **__: object) -> str | None:
    return None if logits.stride(-1) == 1 else "a row's elements are not contiguous"


@adjust_logits.triton(supports=_why_not)
def _adjust_logits_triton(logits: Tensor, params: SamplingTensors) -> Tensor:
    if params.penalties is None and params.bias is None and params.allowed is None:
        return logits
    return sampling_logits.adjust(logits, params.penalties, params.bias, params.allowed)


@apply_penalties.triton(supports=_why_not)
def _apply_penalties_triton(logits: Tensor, penalties: Penalties) -> None:
    logits.copy_(sampling_logits.adjust(logits, penalties, None, None))


@count_tokens.triton()
def _count_tokens_triton(token_ids: Tensor, rows: Tensor, output_counts: Tensor) -> None:
    sampling_logits.count_tokens(token_ids, rows, output_counts)


@sample.triton(supports=_why_not)
def _sample_triton(logits: Tensor, params: SamplingTensors) -> Tensor:
    return sampling_draw.sample(_adjust_logits_triton(logits, params), params)


@gather_logprobs.triton(supports=_why_not)
def _gather_logprobs_triton(logits: Tensor, token_ids: Tensor, top_n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return sampling_logits.gather_logprobs(logits, token_ids, top_n)


@local_argmax.triton(supports=_why_not)
def _local_argmax_triton(logits: Tensor) -> tuple[Tensor, Tensor]:
    return sampling_draw.local_argmax(logits)
