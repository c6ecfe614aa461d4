"""Sampling: the kept sets against a sort, draws against the plain race, Triton against the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import sampling
from kernels.philox import gumbel_noise
from kernels.registry import Choice, force
from kernels.sampling import LogitBias, Penalties, SamplingTensors, sample
from tests.kernels.reference import both, kept_tokens


def parameters(rows: int, **kept: bool) -> SamplingTensors:
    """Greedy, cold and hot rows, each kind of filter alone and together."""

    def pick(values: list[float]) -> Tensor:
        return torch.tensor([values[i % len(values)] for i in range(rows)])

    params = SamplingTensors(
        temperature=pick([0.8, 0.0, 1.0, 0.5, 1.5]),
        seeds=torch.arange(rows) * 88172645463325252,
        positions=torch.arange(rows) * 3,
    )
    if kept.get("filters"):
        params.top_k = pick([0, 5, 3, 0, 1000, 1, 20]).int()
        params.top_p = pick([0.9, 1.0, 0.5, 0.2])
        params.min_p = pick([0.0, 0.1, 0.0])
    return params


def one_row(params: SamplingTensors, row: int) -> SamplingTensors:
    fields: dict[str, Any] = {
        name: value[row : row + 1] if isinstance(value, Tensor) else value for name, value in vars(params).items()
    }
    return SamplingTensors(**fields)


@pytest.mark.parametrize("size", [7, 130, 1000])
@pytest.mark.parametrize("spread", [0.3, 4.0])
def test_draws_are_the_race_over_the_sorted_kept_set(size: int, spread: float) -> None:
    torch.manual_seed(size)
    logits = torch.randn(60, size) * spread
    params = parameters(60, filters=True)
    drawn = sample(logits, params)
    noise = gumbel_noise(params.seeds, params.positions, size)
    for row in range(60):
        temperature = float(params.temperature[row])
        if temperature == 0:
            assert drawn[row] == logits[row].argmax()
            continue
        assert params.top_k is not None and params.top_p is not None and params.min_p is not None
        kept = sorted(
            kept_tokens(
                logits[row], temperature, int(params.top_k[row]), float(params.top_p[row]), float(params.min_p[row])
            )
        )
        race = logits[row] / temperature + noise[row]
        assert drawn[row] == kept[int(race[kept].argmax())]
        assert drawn[row] == sample(logits[row : row + 1], one_row(params, row))


def test_frequencies_follow_the_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0])
    rows = 20_000
    params = SamplingTensors(torch.full((rows,), 0.7), torch.full((rows,), 5), torch.arange(rows))
    counts = sample(logits.expand(rows, 5), params).bincount(minlength=5) / rows
    probabilities = (logits / 0.7).softmax(0)
    # Within five standard errors of each probability.
    assert ((counts - probabilities).abs() < 5 * (probabilities / rows).sqrt() + 1e-9).all()


def test_ties() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0]] * 200)
    greedy = SamplingTensors(torch.zeros(200), torch.arange(200), torch.arange(200))
    for choice in ("torch", "triton"):
        with force(choice):  # type: ignore[arg-type]
            assert sample(logits[:3], one_row(greedy, 0)).tolist()[:1] == [1]
    drawn = SamplingTensors(torch.ones(200), torch.arange(200), torch.arange(200))
    drawn.top_k = torch.ones(200, dtype=torch.int32)
    assert set(sample(logits, drawn).tolist()) == {1, 2, 3}, "ties with the k-th are kept"
    drawn.top_k, drawn.top_p = None, torch.full((200,), 0.01)
    assert set(sample(logits, drawn).tolist()) == {1, 2, 3}, "ties at the edge of the nucleus are kept"


def adjusted(rows: int, size: int) -> SamplingTensors:
    params = parameters(rows, filters=True)
    params.penalties = Penalties(
        rows=torch.arange(rows) % 5 - 1,
        output_counts=torch.randint(0, 3, (4, size), dtype=torch.int32),
        prompt_mask=sampling.pack_bitmask(torch.rand(4, size) < 0.3),
        presence=torch.rand(rows),
        frequency=torch.rand(rows),
        repetition=1 + torch.rand(rows),
    )
    params.bias = LogitBias(
        torch.tensor([0, 1, 1, -1, 3]), torch.tensor([3, 4, 4, 0, 5]), torch.tensor([5.0, -3.0, 1.0, 9.0, -torch.inf])
    )
    params.allowed = sampling.pack_bitmask(torch.rand(rows, size) < 0.6)
    return params


def test_adjusting_follows_the_formulas() -> None:
    torch.manual_seed(0)
    logits, params = torch.randn(12, 50), adjusted(12, 50)
    out = sampling.adjust_logits(logits, params)
    p, bias = params.penalties, params.bias
    assert p is not None and bias is not None and params.allowed is not None
    allowed = sampling.unpack_bitmask(params.allowed, 50)
    prompts = sampling.unpack_bitmask(p.prompt_mask, 50)
    for row in range(12):
        table = int(p.rows[row])
        for token in range(50):
            x = float(logits[row, token])
            if table >= 0:
                count = int(p.output_counts[table, token])
                if count or prompts[table, token]:
                    x = x / float(p.repetition[row]) if x > 0 else x * float(p.repetition[row])
                x -= count * float(p.frequency[row]) + (count > 0) * float(p.presence[row])
            for where, which, value in zip(bias.rows, bias.token_ids, bias.values, strict=True):
                x += float(value) if (int(where), int(which)) == (row, token) else 0.0
            x = x if allowed[row, token] else -torch.inf
            assert float(out[row, token]) == pytest.approx(x, abs=1e-5)
    assert sampling.adjust_logits(logits, parameters(12)) is logits


@pytest.mark.parametrize("kept", [{}, {"filters": True}])
@pytest.mark.parametrize("size", [7, 130, 5001])
def test_triton_draws_the_same(size: int, kept: dict[str, bool]) -> None:
    torch.manual_seed(size)
    for spread in (0.5, 4.0):
        expected, actual = both(sample, torch.randn(10, size) * spread, parameters(10, **kept))
        assert torch.equal(expected, actual)


@pytest.mark.parametrize("values", ["ties", "equal", "wide", "few"])
def test_triton_finds_the_kth_largest(values: str) -> None:
    """Of ties, of one value, of both signs and every exponent, and where fewer than k tokens are allowed."""
    torch.manual_seed(1)
    top_k = torch.tensor([1, 2, 63, 64, 65, 129, 1000, 4999], dtype=torch.int32)
    rows, size = len(top_k), 5001
    logits = {
        "ties": torch.randint(-20, 20, (rows, size)).float() / 8,
        "equal": torch.full((rows, size), -1.5),
        "wide": torch.randn(rows, size) * 10.0 ** torch.randint(-30, 2, (rows, size)),
        "few": torch.randn(rows, size).where(torch.rand(rows, size) < 0.01, -torch.inf),
    }[values]
    params = SamplingTensors(torch.full((rows,), 0.7), torch.arange(rows), torch.arange(rows), top_k=top_k)
    expected, actual = both(sample, logits, params)
    assert torch.equal(expected, actual)


@pytest.mark.parametrize("size", [50, 4099])
def test_triton_adjusts_the_same(size: int) -> None:
    torch.manual_seed(size)
    logits, params = torch.randn(11, size), adjusted(11, size)
    expected, actual = both(sampling.adjust_logits, logits, params)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    expected, actual = both(sample, logits, params)
    assert torch.equal(expected, actual)


def test_rows_nothing_can_be_drawn_from_end() -> None:
    """NaN logits must not hang the search; which token comes out does not matter."""
    logits = torch.full((2, 40), float("nan"))
    params = parameters(2, filters=True)
    for choice in ("torch", "triton"):
        with force(choice):  # type: ignore[arg-type]
            drawn = sample(logits, params)
        assert ((drawn >= 0) & (drawn < 40)).all()


def test_count_tokens() -> None:
    for choice in ("torch", "triton"):
        counts = torch.zeros(3, 9, dtype=torch.int32)
        with force(choice):  # type: ignore[arg-type]
            for _ in range(2):
                sampling.count_tokens(torch.tensor([4, 4, 8]), torch.tensor([0, -1, 2]), counts)
        assert counts.nonzero().tolist() == [[0, 4], [2, 8]] and counts.sum() == 4


@pytest.mark.parametrize("choice", ["torch", "triton"])
@pytest.mark.parametrize(("size", "top_n"), [(3, 5), (130, 0), (4099, 4)])
def test_logprobs(choice: Choice, size: int, top_n: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, size)
    tokens = torch.tensor([0, 1, 2, size - 1])
    with force(choice):
        chosen, rank, ids, values = sampling.gather_logprobs(logits, tokens, top_n)
    reference = logits.double().log_softmax(-1)
    order = reference.argsort(dim=-1, descending=True)
    for row, token in enumerate(tokens.tolist()):
        assert float(chosen[row]) == pytest.approx(float(reference[row, token]), abs=1e-5)
        assert int(rank[row]) == 1 + order[row].tolist().index(token)
    count = min(top_n, size)
    assert torch.equal(ids, order[:, :count])
    torch.testing.assert_close(values.double(), reference.gather(1, ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("choice", ["torch", "triton"])
def test_local_argmax(choice: Choice) -> None:
    logits = torch.tensor([[1.0, 7.0, 7.0], [-5.0, -9.0, -5.0]]).half()
    with force(choice):
        values, indices = sampling.local_argmax(logits)
    assert values.tolist() == [7.0, -5.0] and indices.tolist() == [1, 0]


def test_bitmasks_round_trip() -> None:
    allowed = torch.rand(3, 77) < 0.5
    assert torch.equal(sampling.unpack_bitmask(sampling.pack_bitmask(allowed), 77), allowed)
