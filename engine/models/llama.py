"""Llama 2, 3 and 3.1, and what its kin share with it."""

from __future__ import annotations

from torch import Tensor

from engine.errors import ConfigError
from engine.layers.attention import Attention, StepInput
from engine.layers.embedding import LogitsHead, VocabParallelEmbedding
from engine.layers.mlp import GatedMLP
from engine.layers.norm import RMSNorm
from engine.layers.place import NamedWeights, Place, under
from engine.layers.residual import ResidualStream
from engine.model_config import ModelConfig


class LlamaLayer:
    """Attention, then MLP, each reading the normalised residual stream and adding to it."""

    def __init__(self, place: Place, model: ModelConfig, attention: Attention, *, mlp_bias: bool = False) -> None:
        self.input_norm = RMSNorm(place, model.hidden_size, model.rms_norm_eps)
        self.attention = attention
        self.post_norm = RMSNorm(place, model.hidden_size, model.rms_norm_eps)
        self.mlp = GatedMLP(place, model.hidden_size, model.intermediate_size, bias=mlp_bias)

    def __call__(self, stream: ResidualStream, step: StepInput) -> None:
        self.attention(stream, self.input_norm, step)
        self.mlp(stream, self.post_norm)

    def weights(self) -> NamedWeights:
        yield from under("input_layernorm", self.input_norm.weights())
        yield from under("self_attn", self.attention.weights())
        yield from under("post_attention_layernorm", self.post_norm.weights())
        yield from under("mlp", self.mlp.weights())


class Llama:
    """LlamaForCausalLM. Kin override `attention` and keep the rest."""

    def __init__(self, place: Place, model: ModelConfig) -> None:
        if model.hidden_act != "silu":
            raise ConfigError("model", model.hidden_act, f"{model.architecture} is served with hidden_act silu only")
        mlp_bias = bool(model.raw.get("mlp_bias", False))
        self.embedding = VocabParallelEmbedding(place, model.vocab_size, model.hidden_size)
        self.layers = [
            LlamaLayer(place, model, self.attention(place, model, layer), mlp_bias=mlp_bias)
            for layer in range(model.num_layers)
        ]
        self.norm = RMSNorm(place, model.hidden_size, model.rms_norm_eps)
        tied = self.embedding if model.tie_word_embeddings else None
        self.head = LogitsHead(place, model.vocab_size, model.hidden_size, tied)

    @staticmethod
    def attention(place: Place, model: ModelConfig, layer: int) -> Attention:
        """A layer's attention: what kin differ in."""
        bias = bool(model.raw.get("attention_bias", False))
        return Attention(place, model, layer, qkv_bias=bias, out_bias=bias)

    def forward(self, step: StepInput) -> Tensor:
        for layer in self.layers:
            layer.attention.prepare(step)
        stream = ResidualStream(self.embedding(step.token_ids))
        for layer in self.layers:
            layer(stream, step)
        return stream.normed(self.norm)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)

    def weights(self) -> NamedWeights:
        yield from under("model.embed_tokens", self.embedding.weights())
        for index, layer in enumerate(self.layers):
            yield from under(f"model.layers.{index}", layer.weights())
        yield from under("model.norm", self.norm.weights())
        yield from under("lm_head", self.head.weights())
