"""Products with few rows: both Triton kernels against float64, whatever is fused, sliced or swapped."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import linear, linear_stream
from kernels.linear_configs import linear_config
from kernels.linear_gemv import GemvConfig
from kernels.linear_stream import LinearConfig
from tests.kernels.reference import both, relative_error

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1.5e-3}
EPS = 1e-5


class Inputs:
    """A product's tensors, and the exact results of everything fused around it."""

    def __init__(self, rows: int, columns: int, size: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(rows, 2, size).to(dtype)[:, 0]
        self.weight = (torch.randn(columns, size) / size**0.5).to(dtype)
        self.bias, self.residual = torch.randn(columns).to(dtype), torch.randn(rows, columns).to(dtype)
        self.norm = torch.randn(size).to(dtype)
        x, weight = self.x.double(), self.weight.double()
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * self.norm.double()
        self.plain, self.normed = x @ weight.T, normed @ weight.T

    def gated(self, product: Tensor) -> Tensor:
        gate, up = product.chunk(2, dim=-1)
        return F.silu(gate) * up


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("rows", "config"),
    [
        (1, GemvConfig(4, 128)),
        (1, GemvConfig(8, 512, 2)),
        (1, LinearConfig(16, 32, 32, 4, 3, 2, swap=True)),
        (5, LinearConfig(16, 32, 64, 4, 3, 3)),
        (40, LinearConfig(16, 64, 32, 4, 3, 4)),
        (40, LinearConfig(32, 32, 32, 4, 3, 1, swap=True)),
    ],
)
@pytest.mark.parametrize(("columns", "size"), [(36, 136), (64, 256)])
def test_products(rows: int, config: GemvConfig | LinearConfig, columns: int, size: int, dtype: torch.dtype) -> None:
    i = Inputs(rows, columns, size, dtype)
    product = config.product
    assert relative_error(product(i.x, i.weight), i.plain) < TOLERANCE[dtype]
    exact = i.plain + i.bias.double() + i.residual.double()
    assert relative_error(product(i.x, i.weight, bias=i.bias, residual=i.residual), exact) < TOLERANCE[dtype]
    assert relative_error(product(i.x, i.weight, norm_weight=i.norm, eps=EPS), i.normed) < TOLERANCE[dtype]
    gated = product(i.x, i.weight, norm_weight=i.norm, eps=EPS, act="silu")
    assert gated.shape == (rows, columns // 2) and gated.dtype == dtype
    assert relative_error(gated, i.gated(i.normed)) < TOLERANCE[dtype]
    assert not linear_stream._arrived(i.x.device).any(), "the counters are not back at zero"


@pytest.mark.parametrize("programs", [1, 2, 5, 33])
def test_the_same_however_the_steps_are_cut(programs: int) -> None:
    """Ranges that end inside tiles, on their borders, and that hold several."""
    i = Inputs(3, 160, 320, torch.float32)
    out = LinearConfig(16, 16, 16, 4, 2, programs).product(i.x, i.weight, norm_weight=i.norm, eps=EPS)
    assert relative_error(out, i.normed) < 1e-6


@pytest.mark.parametrize("rows", [1, 3, 17])
def test_operations(rows: int) -> None:
    """The operations, by definition and by Triton at the configs of the table."""
    i = Inputs(rows, 64, 256, torch.float16)
    calls = [
        (linear.linear, (i.x, i.weight, i.bias), i.plain + i.bias.double()),
        (linear.linear_add, (i.x, i.weight, i.residual), i.plain + i.residual.double()),
        (linear.norm_linear, (i.x, i.norm, EPS, i.weight), i.normed),
        (linear.linear_silu_and_mul, (i.x, i.weight), i.gated(i.plain)),
        (linear.norm_linear_silu_and_mul, (i.x, i.norm, EPS, i.weight), i.gated(i.normed)),
    ]
    for op, args, exact in calls:
        assert relative_error(op(*args), exact) < 3e-3, op.name
        assert op.supports is not None
        if op.supports(*args) is None:
            expected, actual = both(op, *args)
            assert expected.shape == actual.shape
            assert relative_error(actual, exact) < 3e-3, op.name


def test_where_the_library_is_faster_the_reason_says_so() -> None:
    x, weight = torch.empty(512, 64).half(), torch.empty(32, 64).half()
    assert linear.linear.supports is not None
    assert linear.linear.supports(x, weight) == "the library's product is faster with this many rows"
    assert linear_config("linear", 1, 32, 63) is None
    assert "differ in dtype" in str(linear.linear.supports(x[:1], weight.float()))


def test_a_norm_whose_scale_comes_later_is_the_norm() -> None:
    torch.manual_seed(0)
    x, weight, residual = torch.randn(5, 24), torch.randn(40, 24), torch.randn(5, 40)
    norm, behind, bias = torch.rand(40) + 0.5, torch.randn(16, 40), torch.randn(16)
    total, scaled, square_sums = linear.linear_add_for_norm(x, weight, residual, norm)
    torch.testing.assert_close(total, linear.linear_add(x, weight, residual))
    expected = linear.norm_linear(total, norm, 1e-5, behind, bias)
    torch.testing.assert_close(linear.scaled_linear(scaled, square_sums, 1e-5, behind, bias), expected)
    expected = linear.norm_linear_silu_and_mul(total, norm, 1e-5, behind)
    torch.testing.assert_close(linear.scaled_linear_silu_and_mul(scaled, square_sums, 1e-5, behind), expected)
