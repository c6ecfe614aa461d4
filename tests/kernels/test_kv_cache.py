"""Writes into the paged cache: the right slots and no others, by the definitions and by Triton."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import rms_norm
from kernels.kv_cache import copy_blocks, rotary_and_write_kv, write_kv
from kernels.registry import Choice, force
from kernels.rotary import apply_rotary
from tests.kernels.reference import relative_error

CHOICES: list[Choice] = ["torch", "triton"]
SLOTS = torch.tensor([17, -1, 3, 40, 0])


def caches(layout: str, kv_heads: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Four blocks of 16 tokens, keys and values; "interleaved": a block's keys and values side by side."""
    if layout == "apart":
        k, v = torch.randn(2, 4, 16, kv_heads, dim).to(dtype)
        return k, v
    both = torch.randn(4, 2, 16, kv_heads, dim).to(dtype)
    return both[:, 0], both[:, 1]


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("layout", ["apart", "interleaved"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_write(choice: Choice, layout: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    k_cache, v_cache = caches(layout, 3, 20, dtype)
    before = k_cache.clone(), v_cache.clone()
    k, v = torch.randn(5, 6, 20).to(dtype)[:, 1:4], torch.randn(5, 3, 20).to(dtype)
    with force(choice):
        write_kv(k, v, k_cache, v_cache, SLOTS)
    for cache, old, new in ((k_cache, before[0], k), (v_cache, before[1], v)):
        for token, slot in enumerate(SLOTS.tolist()):
            if slot >= 0:
                old[slot // 16, slot % 16] = new[token]
        assert torch.equal(cache, old)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("layout", ["apart", "interleaved"])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "rotary_dim"), [(4, 2, 64, 64), (9, 3, 40, 16)])
@pytest.mark.parametrize("normalised", [False, True])
def test_rotary_and_write_is_its_parts(
    choice: Choice, layout: str, heads: int, kv_heads: int, dim: int, rotary_dim: int, normalised: bool
) -> None:
    torch.manual_seed(0)
    packed = torch.randn(5, heads + 2 * kv_heads, dim)
    q, k, v = packed[:, :heads], packed[:, heads : heads + kv_heads], packed[:, heads + kv_heads :]
    cos_sin, positions = torch.randn(30, rotary_dim), torch.tensor([4, 0, 29, 7, 7])
    k_cache, v_cache = caches(layout, kv_heads, dim, torch.float32)
    expected_k, expected_v = k_cache.clone(), v_cache.clone()
    norm = torch.randn(dim) if normalised else None
    with force(choice):
        out = rotary_and_write_kv(
            q, k, v, cos_sin, positions, k_cache, v_cache, SLOTS, q_norm=norm, k_norm=norm, eps=1e-5
        )
    if norm is not None:
        q, k = rms_norm.rms_norm(q, norm, 1e-5), rms_norm.rms_norm(k, norm, 1e-5)
    expected_q, k = apply_rotary(q, k, cos_sin, positions)
    write_kv(k, v, expected_k, expected_v, SLOTS)
    assert relative_error(out, expected_q) < 1e-6
    assert relative_error(k_cache, expected_k) < 1e-6
    assert torch.equal(v_cache, expected_v)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copy_blocks(choice: Choice, dtype: torch.dtype) -> None:
    layers = [torch.randn(6, 4, 3, 6).to(dtype) for _ in range(3)]
    expected = [layer.clone() for layer in layers]
    for layer in expected:
        layer[5], layer[2] = layer[0], layer[1]
    with force(choice):
        copy_blocks(layers, torch.tensor([[0, 5], [-1, 3], [1, 2]]))
    assert all(torch.equal(a, b) for a, b in zip(layers, expected, strict=True))
