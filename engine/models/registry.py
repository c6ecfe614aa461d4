"""Which class serves which architecture: one line a model. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from engine.errors import ConfigError

if TYPE_CHECKING:
    from engine.models.base import Model


@dataclass(frozen=True)
class ModelEntry:
    """Where an architecture's class is, and the values its config.json may leave out (Transformers' own defaults)."""

    module: str
    name: str
    config_defaults: dict[str, Any] = field(default_factory=dict)

    def load_class(self) -> type[Model]:
        found: type[Model] = getattr(import_module(self.module), self.name)
        return found


_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rms_norm_eps": 1e-6,
}
_QWEN = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
}

_MODELS = {
    "LlamaForCausalLM": ModelEntry("engine.models.llama", "Llama", _LLAMA),
    "Qwen2ForCausalLM": ModelEntry("engine.models.qwen", "Qwen2", _QWEN),
    "Qwen3ForCausalLM": ModelEntry("engine.models.qwen", "Qwen3", {**_QWEN, "head_dim": 128}),
}


def find_model(architecture: str) -> ModelEntry:
    """The entry of an architecture of config.json. Raises ConfigError naming it and those that are served."""
    try:
        return _MODELS[architecture]
    except KeyError:
        raise ConfigError("model", architecture, f"unsupported architecture; supported: {', '.join(_MODELS)}") from None
