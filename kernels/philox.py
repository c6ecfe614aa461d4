"""Random numbers that depend on (seed, position, token) only: Philox4x32-10, counter-based.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the 64-bit product of two 32-bit numbers (in int64, whose product wraps)."""
    low = b * a
    # The wrapped int64 product has the right 64 bits; only its sign must be masked off after the shift.
    return (low >> 32) & _MASK, low & _MASK


def philox(seeds: Tensor, positions: Tensor, groups: Tensor) -> list[Tensor]:
    """The four 32-bit outputs of Philox4x32-10 with key `seeds` and counter (group, position, 0, 0).

    seeds, positions, groups: int64 tensors that broadcast together; of positions and groups the low 32 bits count.
    Returns four int64 tensors of values in [0, 2**32).
    """
    key0, key1 = seeds & _MASK, (seeds >> 32) & _MASK
    c0, c1 = torch.broadcast_tensors(groups & _MASK, positions & _MASK)
    c2 = c3 = torch.zeros((), dtype=torch.int64, device=seeds.device)
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + _WEYL[0]) & _MASK, (key1 + _WEYL[1]) & _MASK
    return list(torch.broadcast_tensors(c0, c1, c2, c3))


def uniform(bits: Tensor) -> Tensor:
    """Map 32-bit integers (int64) to float32 in (0, 1), fine near 0: (bits + 1/2) / 2**32, at most 1 - 2**-24."""
    return (bits.to(torch.float32) * 2.0**-32 + 2.0**-33).clamp_(max=1 - 2.0**-24)


def gumbel_from_uniform(u: Tensor) -> Tensor:
    """Standard Gumbel noise -log(-log(1 - u)), with the inner logarithm exact for small u (large noise)."""
    return -torch.log(-torch.log1p(-u))


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Gumbel noise [B, vocab_size] float32 of every token, for rows of (seed, position) [B] int64."""
    groups = torch.arange(-(-vocab_size // 4), device=seeds.device)
    lanes = philox(seeds[:, None], positions[:, None], groups[None, :])
    bits = torch.stack(lanes, dim=-1).flatten(1)[:, :vocab_size]
    return gumbel_from_uniform(uniform(bits))


def gumbel_noise_at(seeds: Tensor, positions: Tensor, token_ids: Tensor) -> Tensor:
    """Gumbel noise [n] of single tokens: (seed, position, token) [n] int64 each."""
    lanes = torch.stack(philox(seeds, positions, token_ids // 4))
    bits = lanes.gather(0, (token_ids % 4)[None])[0]
    return gumbel_from_uniform(uniform(bits))
