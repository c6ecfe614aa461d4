"""RMSNorm against Hugging Face's LlamaRMSNorm, and Triton against the definition."""

from __future__ import annotations

import pytest
import torch

from kernels.rms_norm import fused_add_rms_norm, rms_norm
from tests.kernels.reference import both, relative_error

# bfloat16: the interpreter truncates where a GPU rounds to nearest; two roundings of 2^-8 each.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1.6e-2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_definition_is_llamas(dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    torch.manual_seed(0)
    module = LlamaRMSNorm(48, eps=1e-5).to(dtype)
    module.weight.data = torch.randn(48).to(dtype)
    x, residual = torch.randn(7, 48).to(dtype), torch.randn(7, 48).to(dtype)
    assert torch.equal(rms_norm(x, module.weight, 1e-5), module(x))
    normed, total = fused_add_rms_norm(x, residual, module.weight, 1e-5)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, module(x + residual))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1), (3, 65), (2, 5, 300), (2, 4096)])
def test_triton(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(*shape[:-1], 3, shape[-1]).to(dtype)[..., 1, :]  # rows with a stride
    residual, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    expected, actual = both(rms_norm, x, weight, 1e-5)
    assert actual.shape == x.shape and actual.dtype == dtype
    assert relative_error(actual, expected) < TOLERANCE[dtype]
    expected, actual = both(fused_add_rms_norm, x, residual, weight, 1e-5)
    assert relative_error(actual[0], expected[0]) < TOLERANCE[dtype]
    assert relative_error(actual[1], expected[1]) < TOLERANCE[dtype]


def test_no_rows() -> None:
    expected, actual = both(rms_norm, torch.empty(0, 8), torch.ones(8), 1e-5)
    assert actual.shape == expected.shape == (0, 8)
