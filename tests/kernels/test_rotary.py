"""Rotary embedding against Hugging Face's Llama, partial rotation, and Triton against the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.rotary import apply_rotary
from tests.kernels.reference import both, relative_error


def cos_sin_table(rotary_dim: int, length: int = 64, theta: float = 10000.0) -> Tensor:
    frequencies = theta ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)
    angles = torch.outer(torch.arange(length).float(), frequencies)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def test_definition_is_llamas() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    torch.manual_seed(0)
    q, k = torch.randn(5, 4, 32), torch.randn(5, 2, 32)
    table, positions = cos_sin_table(32), torch.tensor([0, 1, 7, 63, 2])
    cos, sin = table[positions].chunk(2, dim=-1)
    cos, sin = torch.cat([cos, cos], -1)[None], torch.cat([sin, sin], -1)[None]
    expected = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    actual = apply_rotary(q, k, table, positions)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b[0].transpose(0, 1), rtol=0, atol=1e-6)


def test_columns_past_the_table_pass_through() -> None:
    q, k = torch.randn(3, 2, 40), torch.randn(3, 1, 40)
    rotated, _ = apply_rotary(q, k, cos_sin_table(16), torch.tensor([5, 6, 7]))
    assert torch.equal(rotated[..., 16:], q[..., 16:])
    alone, _ = apply_rotary(q[..., :16], k[..., :16], cos_sin_table(16), torch.tensor([5, 6, 7]))
    assert torch.equal(rotated[..., :16], alone)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "rotary_dim"), [(4, 2, 128, 128), (3, 3, 80, 80), (9, 1, 64, 20)])
def test_triton(heads: int, kv_heads: int, dim: int, rotary_dim: int, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    packed = torch.randn(5, (heads + kv_heads) * dim).to(dtype)
    q, k = (part.view(5, -1, dim) for part in packed.split([heads * dim, kv_heads * dim], 1))
    expected, actual = both(apply_rotary, q, k, cos_sin_table(rotary_dim), torch.tensor([0, 1, 7, 63, 2]))
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape and a.dtype == dtype
        assert relative_error(a, b) < tolerance
