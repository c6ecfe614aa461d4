"""Model: what a worker asks of an architecture."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from engine.layers.attention import StepInput
from engine.layers.place import NamedWeights, Place
from engine.model_config import ModelConfig


class Model(Protocol):
    """One rank's share of a causal language model. Its weights are uninitialised until loaded."""

    def __init__(self, place: Place, model: ModelConfig) -> None: ...

    def forward(self, step: StepInput) -> Tensor:
        """The last hidden states of the step's `wanted` tokens [R, hidden_size], or of all, whole on every rank."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [R, hidden_size] -> logits [R, vocab_size], whole on every rank."""
        ...

    def weights(self) -> NamedWeights:
        """Every tensor the checkpoint must have, under its name there, and where this rank's slice goes."""
        ...
