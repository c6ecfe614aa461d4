"""Gated activations: Triton against the definitions, over odd widths and strided rows."""

from __future__ import annotations

import pytest
import torch

from kernels.activation import gelu_and_mul, gelu_tanh_and_mul, silu_and_mul
from kernels.registry import Kernel
from tests.kernels.reference import both, relative_error

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1.6e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("op", [silu_and_mul, gelu_and_mul, gelu_tanh_and_mul], ids=lambda op: op.__name__)
@pytest.mark.parametrize("shape", [(1, 2), (3, 2, 2 * 1500), (5, 2 * 33)])
def test_triton(op: Kernel, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(*shape[:-1], 2, shape[-1]) * 3).to(dtype)[..., 0, :]
    expected, actual = both(op, x)
    assert actual.shape == (*shape[:-1], shape[-1] // 2) and actual.dtype == dtype
    assert relative_error(actual, expected) < TOLERANCE[dtype]


def test_the_gate_comes_first() -> None:
    x = torch.tensor([[2.0, -1.0, 10.0, 100.0]])
    expected = torch.nn.functional.silu(x[:, :2]) * x[:, 2:]
    torch.testing.assert_close(silu_and_mul(x), expected)
