"""Embeddings: prompts as unit vectors, made of the model's pooled last hidden states."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.errors import RequestError
from engine.output import RequestOutput
from engine.sampling_params import SamplingParams

Vector = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Embedding:
    """One vector."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        """How many numbers it has."""
        return len(self.embedding)


@dataclass(frozen=True, slots=True)
class EmbeddingRequestOutput:
    """One embedded prompt."""

    request_id: str
    outputs: Embedding
    prompt_token_ids: list[int]
    num_cached_tokens: int = 0
    finished: bool = True


def embedding_params(truncate_prompt_tokens: int | None = None, priority: int = 0) -> SamplingParams:
    """The parameters of a request that embeds its prompt: nothing is drawn. Raises RequestError."""
    return SamplingParams(
        temperature=0,
        max_tokens=1,
        detokenize=False,
        truncate_prompt_tokens=truncate_prompt_tokens,
        priority=priority,
    )


def check_pooling(pooling: str | None) -> None:
    """Raise RequestError unless it is a way to pool; None is the configuration's."""
    if pooling not in (None, "mean", "last"):
        raise RequestError(f"pooling: got {pooling!r:.50}, allowed: mean or last", param="pooling")


def check_dimensions(dimensions: int | None, hidden_size: int) -> None:
    """Raise RequestError unless a vector of the model can be cut to `dimensions`."""
    if dimensions is not None and not 1 <= dimensions <= hidden_size:
        raise RequestError(
            f"dimensions: got {dimensions}, allowed: 1 to {hidden_size}, the model's hidden size", param="dimensions"
        )


def unit_vector(result: RequestOutput, dimensions: int | None = None) -> Vector:
    """The vector of an embedded prompt, its first `dimensions` numbers if given, at length 1."""
    assert result.embedding is not None, "not a request with pooling"
    vector = np.frombuffer(result.embedding, "<f4")[:dimensions].astype(np.float32)
    length = np.linalg.norm(vector)
    return vector / length if length > 0 else vector
