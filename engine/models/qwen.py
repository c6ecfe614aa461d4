"""Qwen2, Qwen2.5 and Qwen3: Llama with biases on q, k and v, or with normalised query and key heads."""

from __future__ import annotations

from engine.layers.attention import Attention
from engine.layers.place import Place
from engine.model_config import ModelConfig
from engine.models.llama import Llama


class Qwen2(Llama):
    """Qwen2ForCausalLM: Qwen2 and Qwen2.5."""

    @staticmethod
    def attention(place: Place, model: ModelConfig, layer: int) -> Attention:
        return Attention(place, model, layer, qkv_bias=True)


class Qwen3(Llama):
    """Qwen3ForCausalLM (dense)."""

    @staticmethod
    def attention(place: Place, model: ModelConfig, layer: int) -> Attention:
        bias = bool(model.raw.get("attention_bias", False))
        return Attention(place, model, layer, qkv_bias=bias, out_bias=bias, qk_norm=True)
