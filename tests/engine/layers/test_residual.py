"""ResidualStream: the same sums and norms whichever way they are put together, and what is put together on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from engine.layers.linear import ColumnParallelLinear, RowParallelLinear
from engine.layers.norm import RMSNorm
from engine.layers.place import Place
from engine.layers.residual import ResidualStream
from engine.parallel.communicator import Solo
from kernels import hopper, launch, linear
from kernels.launch import Chip, rehearse_on

HIDDEN, INNER = 4096, 14336


def layers(place: Place, hidden: int, inner: int) -> tuple[RMSNorm, ColumnParallelLinear, RowParallelLinear]:
    gate_up = ColumnParallelLinear(place, hidden, {"gate_proj": inner, "up_proj": inner})
    return RMSNorm(place, hidden, 1e-5), gate_up, RowParallelLinear(place, inner, hidden, "down_proj")


def test_a_layer_is_its_definition() -> None:
    torch.manual_seed(0)
    norm, gate_up, down = layers(Place(torch.device("cpu"), torch.float32, Solo()), 24, 40)
    for weight in (norm.weight, gate_up.weight, down.weight):
        weight.copy_(torch.randn(weight.shape) / 5)
    x = torch.randn(7, 24)
    stream = ResidualStream(x)
    for _ in range(2):
        stream.add(down, stream.into_gated(norm, gate_up))
    found = stream.into(norm, gate_up)
    for _ in range(2):
        gate, up = (norm(x) @ gate_up.weight.T).chunk(2, dim=-1)
        x = x + (torch.nn.functional.silu(gate) * up) @ down.weight.T
    torch.testing.assert_close(found, norm(x) @ gate_up.weight.T)
    torch.testing.assert_close(stream.normed(norm), norm(x))


@pytest.mark.parametrize("joined", [False, True])
def test_it_goes_on_with_the_rows_that_are_kept(joined: bool) -> None:
    torch.manual_seed(0)
    norm, gate_up, down = layers(Place(torch.device("cpu"), torch.float32, Solo()), 24, 40)
    for weight in (norm.weight, gate_up.weight, down.weight):
        weight.copy_(torch.randn(weight.shape) / 5)
    x, rows = torch.randn(7, 24), torch.tensor([6, 2, 2])
    stream, whole = ResidualStream(x), ResidualStream(x)
    for part in (stream, whole):
        part.add(down, part.into_gated(norm, gate_up))
        inner = part.into_gated(norm, gate_up) if joined else torch.randn(7, 40, generator=torch.Generator())
        if not joined:
            part.normed(norm)
        if part is stream:
            part.keep(rows)
            inner = inner[rows]
        part.add(down, inner)
    torch.testing.assert_close(stream.normed(norm), whole.normed(norm)[rows])
    stream.add(down, torch.randn(3, 40))
    with pytest.raises(AssertionError, match="waits to be added"):
        stream.keep(rows[:1])


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The CUDA kernels that tensors on the device "meta" would launch on an H200."""
    names: list[str] = []
    monkeypatch.setattr(launch._Rehearsed, "chip", None)
    monkeypatch.setattr(launch._Rehearsed, "met", None)
    monkeypatch.setattr(linear, "why_not", lambda _: None)
    monkeypatch.setattr(hopper, "USED", {"products", "norms"})
    monkeypatch.setattr("kernels.rms_norm._rms_norm_kernel", {(256,): lambda *_, **__: names.append("norm")})
    rehearse_on(Chip((9, 0), 132), lambda _, variant, __: names.append(variant))
    yield names
    launch.capability.cache_clear()
    launch.num_multiprocessors.cache_clear()


def test_norms_join_the_large_products_around_them(launched: list[str]) -> None:
    norm, gate_up, down = layers(Place(torch.device("meta"), torch.bfloat16, Solo()), HIDDEN, INNER)
    stream = ResidualStream(torch.empty(256, HIDDEN, dtype=torch.bfloat16, device="meta"))
    for _ in range(2):
        stream.add(down, stream.into_gated(norm, gate_up))
    stream.normed(norm)
    marks = ["norms" if "norms=True" in name else "normed" if "normed=True" in name else name[:4] for name in launched]
    # The first product's norm has none in front; the last norm has none behind.
    assert marks == ["norm", "Tile", "norms", "normed", "Tile", "norm"]
