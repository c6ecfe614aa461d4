"""Token embedding over a rank's slice of the vocabulary."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kernels.registry import kernel


@kernel
def embedding(token_ids: Tensor, weight: Tensor, vocab_start: int = 0) -> Tensor:
    """Look up each token's row in this rank's slice of the embedding matrix.

    token_ids [T] int64; weight [rows, H], the rows of tokens [vocab_start, vocab_start + rows). Returns [T, H]; a token
    outside the slice gives zeros, so that the sum over ranks is the embedding.
    """
    rows = weight.shape[0]
    local = token_ids - vocab_start
    outside = (local < 0) | (local >= rows)
    return F.embedding(local.clamp(0, rows - 1), weight).masked_fill(outside[:, None], 0)
