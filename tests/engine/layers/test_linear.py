"""Split layers: the ranks' shares together are the whole layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.layers.embedding import LogitsHead, VocabParallelEmbedding
from engine.layers.linear import ColumnParallelLinear, RowParallelLinear
from engine.layers.place import NamedWeights, Place
from engine.parallel.communicator import Communicator
from tests.engine.parallel.test_communicator import on_ranks


def place(communicator: Communicator) -> Place:
    return Place(torch.device("cpu"), torch.float32, communicator)


def load(weights: NamedWeights, tensors: dict[str, Tensor]) -> None:
    """Fill each weight with its slice of the tensor of its name."""
    for name, weight in weights:
        assert tuple(tensors[name].shape) == weight.shape
        weight.target.zero_()
        source = tensors[name].narrow(weight.dim, min(weight.start, weight.shape[weight.dim]), weight.count)
        weight.target.narrow(weight.dim, 0, weight.count).copy_(source)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_columns_of_every_part_are_dealt_out(size: int, bias: bool) -> None:
    tensors = {"q.weight": random(8, 6), "k.weight": random(4, 6), "q.bias": random(8), "k.bias": random(4)}
    x = random(3, 6)

    def run(communicator: Communicator) -> tuple[Tensor, ...]:
        layer = ColumnParallelLinear(place(communicator), 6, {"q": 8, "k": 4}, bias=bias)
        load(layer.weights(), tensors)
        return layer(x).split(layer.sizes, dim=1)

    shares = on_ranks(size, run)
    for part, name in enumerate(("q", "k")):
        wanted = F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"] if bias else None)
        torch.testing.assert_close(torch.cat([share[part] for share in shares], dim=1), wanted)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_rows_are_added_and_the_bias_once(size: int, bias: bool) -> None:
    tensors = {"o.weight": random(5, 8), "o.bias": random(5)}
    x = random(3, 8)

    def run(communicator: Communicator) -> Tensor:
        layer = RowParallelLinear(place(communicator), 8, 5, "o", bias=bias)
        load(layer.weights(), tensors)
        return layer(x.chunk(size, dim=1)[communicator.rank])

    for found in on_ranks(size, run):
        torch.testing.assert_close(found, F.linear(x, tensors["o.weight"], tensors["o.bias"] if bias else None))


@pytest.mark.parametrize("vocab_size", [10, 64, 70, 128, 129, 200])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_vocabulary_is_split_and_padded(size: int, vocab_size: int) -> None:
    rows = random(vocab_size, 4)
    token_ids = torch.arange(vocab_size)

    def run(communicator: Communicator) -> tuple[Tensor, Tensor]:
        embedding = VocabParallelEmbedding(place(communicator), vocab_size, 4)
        head = LogitsHead(place(communicator), vocab_size, 4, tied=embedding)
        load(embedding.weights(), {"weight": rows})
        assert list(head.weights()) == []
        return embedding(token_ids), head(rows[:3])

    for embedded, logits in on_ranks(size, run):
        assert torch.equal(embedded, rows)
        torch.testing.assert_close(logits, rows[:3] @ rows.t())
