"""Philox4x32-10 against the published vectors and plain integers, and the shape of its noise."""

from __future__ import annotations

import math

import torch

from kernels.philox import gumbel_noise, gumbel_noise_at, philox, uniform


def plain_philox(key: int, counter: tuple[int, int, int, int]) -> list[int]:
    """The ten rounds on Python's integers."""
    mask = 0xFFFFFFFF
    k0, k1 = key & mask, key >> 32
    c0, c1, c2, c3 = counter
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & mask, (p0 >> 32) ^ c3 ^ k1, p0 & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return [c0, c1, c2, c3]


def test_published_vector() -> None:
    # Random123's known answers, philox4x32-10 of zeros.
    zero = torch.tensor(0)
    assert [int(v) for v in philox(zero, zero, zero)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_against_plain_integers() -> None:
    seeds = torch.tensor([1, 2**62 + 12345, -1, -(2**63), 0xFFFFFFFF])
    positions = torch.tensor([0, 5, 131071, 2**31, 7])
    groups = torch.tensor([0, 3, 32063, 1, 2**20])
    lanes = torch.stack(philox(seeds, positions, groups), dim=1)
    for row in range(5):
        expected = plain_philox(int(seeds[row]) % 2**64, (int(groups[row]), int(positions[row]), 0, 0))
        assert lanes[row].tolist() == expected


def test_uniform_stays_inside_and_is_fine_near_zero() -> None:
    u = uniform(torch.tensor([0, 1, 2**31, 2**32 - 1]))
    assert u.tolist() == [2.0**-33, 1.5 * 2.0**-32, 0.5, 1 - 2.0**-24]


def test_noise_of_a_row_does_not_depend_on_its_batch() -> None:
    seeds, positions = torch.tensor([3, 9, 27]), torch.tensor([1, 1, 2])
    noise = gumbel_noise(seeds, positions, 1001)
    assert torch.equal(noise[1:2], gumbel_noise(seeds[1:2], positions[1:2], 1001))
    assert torch.equal(
        noise[2, 990:], gumbel_noise_at(seeds[2].expand(11), positions[2].expand(11), torch.arange(990, 1001))
    )


def test_noise_is_gumbel() -> None:
    noise = gumbel_noise(torch.arange(50), torch.zeros(50, dtype=torch.int64), 4000).double()
    # Mean and variance of 200,000 standard Gumbel draws, within four standard errors.
    assert abs(noise.mean() - 0.5772156649) < 4 * math.sqrt(math.pi**2 / 6 / 200_000)
    assert abs(noise.var() - math.pi**2 / 6) < 0.03
    assert noise.min() > -3.3 and noise.max() < 22.3
