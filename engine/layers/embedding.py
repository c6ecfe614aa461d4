"""The vocabulary's two matrices, split over the ranks by tokens: embedding going in, logits coming out."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from engine.layers.place import NamedWeights, Place, WeightSlice
from kernels.embedding import embedding
from kernels.linear import linear

VOCAB_MULTIPLE = 64
"""A rank's rows of the vocabulary are padded to a multiple of this."""


class VocabParallelEmbedding:
    """Rows [rank * rows, (rank + 1) * rows) of the embedding matrix, the vocabulary padded to fill the last rank.

    Called with token ids [T] int64 it gives [T, hidden_size], whole on every rank.
    """

    def __init__(self, place: Place, vocab_size: int, hidden_size: int) -> None:
        self.place, self.vocab_size = place, vocab_size
        self.shape = (vocab_size, hidden_size)
        rows = -(-vocab_size // (place.size * VOCAB_MULTIPLE)) * VOCAB_MULTIPLE if place.size > 1 else vocab_size
        self.start = place.rank * rows
        self.weight = place.empty(rows, hidden_size)

    def __call__(self, token_ids: Tensor) -> Tensor:
        if self.place.size == 1:
            return F.embedding(token_ids, self.weight)
        return self.place.communicator.all_reduce(embedding(token_ids, self.weight, self.start))

    def weights(self) -> NamedWeights:
        yield "weight", WeightSlice(self.weight, self.shape, 0, self.start)


class LogitsHead:
    """Logits of every token, from hidden states [R, hidden_size] -> [R, vocab_size], whole on every rank.

    Given the embedding it shares that matrix (tied weights); otherwise it has its own.
    """

    def __init__(self, place: Place, vocab_size: int, hidden_size: int, tied: VocabParallelEmbedding | None) -> None:
        self.place, self.vocab_size, self.tied = place, vocab_size, tied
        self.rows = tied or VocabParallelEmbedding(place, vocab_size, hidden_size)

    def __call__(self, hidden: Tensor) -> Tensor:
        logits: Tensor = linear(hidden, self.rows.weight)
        if self.place.size == 1:
            return logits
        return self.place.communicator.all_gather(logits)[:, : self.vocab_size]

    def weights(self) -> NamedWeights:
        if self.tied is None:
            yield from self.rows.weights()
