"""Rotary tables against Transformers'."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engine.layers.rotary import cos_sin_table
from engine.model_config import RopeConfig

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}
YARN = {"factor": 4.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    "kind, parameters",
    [
        ("default", {}),
        ("linear", {"factor": 4.0}),
        ("llama3", LLAMA3),
        ("llama3", {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 64}),
        ("yarn", YARN),
        ("yarn", {**YARN, "attention_factor": 1.25}),
        ("yarn", {**YARN, "beta_fast": 20.0, "beta_slow": 2.0, "truncate": False}),
        ("yarn", {**YARN, "mscale": 0.7, "mscale_all_dim": 1.1}),
    ],
)
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_tables_are_transformers(kind: str, parameters: dict[str, Any], theta: float, head_dim: int) -> None:
    config = LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": kind, "rope_theta": theta, **parameters},
    )
    positions = torch.arange(2048)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    table = cos_sin_table(RopeConfig(theta, kind, parameters), head_dim, 2048, torch.device("cpu"))
    assert table.shape == (2048, head_dim) and table.dtype == torch.float32
    half = head_dim // 2
    torch.testing.assert_close(table[:, :half], cos[0, :, :half], atol=3e-4, rtol=0)
    torch.testing.assert_close(table[:, half:], sin[0, :, :half], atol=3e-4, rtol=0)
