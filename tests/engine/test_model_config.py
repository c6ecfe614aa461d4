"""Reading model folders, and what they decide of the configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.model_config import ModelConfig, resolve

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def folder_with(tmp_path: Path, generation: dict[str, Any] | None = None, **values: Any) -> Path:
    """A model folder of JSON files alone."""
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **values}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    return tmp_path


def load(folder: Path) -> ModelConfig:
    return ModelConfig.load(EngineConfig(model=str(folder)))


def config_error(folder: Path | str, **settings: Any) -> ConfigError:
    config = EngineConfig(model=str(folder), **settings)
    with pytest.raises(ConfigError) as caught:
        resolve(config, ModelConfig.load(config))
    return caught.value


@pytest.mark.parametrize(
    "name, config",
    [("LlamaForCausalLM", LlamaConfig()), ("Qwen2ForCausalLM", Qwen2Config()), ("Qwen3ForCausalLM", Qwen3Config())],
)
def test_missing_keys_are_transformers_defaults(tmp_path: Path, name: str, config: Any) -> None:
    model = load(folder_with(tmp_path, architectures=[name]))
    for ours, theirs in {"num_layers": "num_hidden_layers"}.items():
        assert getattr(model, ours) == getattr(config, theirs)
    for key in (
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "intermediate_size",
        "max_position_embeddings",
        "rms_norm_eps",
        "head_dim",
        "tie_word_embeddings",
        "hidden_act",
    ):
        assert getattr(model, key) == getattr(config, key, config.hidden_size // config.num_attention_heads), key
    assert model.rope.theta == config.rope_parameters["rope_theta"] and model.rope.kind == "default"
    assert not any(model.sliding_windows)


def test_values_of_the_folder(tmp_path: Path) -> None:
    model = load(
        folder_with(
            tmp_path,
            {"eos_token_id": [7, 8]},
            eos_token_id=8,
            bos_token_id=5,
            hidden_size=64,
            num_attention_heads=4,
            head_dim=None,
            torch_dtype="bfloat16",
            tie_word_embeddings=True,
        )
    )
    assert model.eos_token_ids == (8, 7) and model.bos_token_id == 5
    assert model.head_dim == 16 and model.num_key_value_heads == 4
    assert model.torch_dtype == "bfloat16" and model.tie_word_embeddings


def test_a_folder_without_generation_config_or_eos(tmp_path: Path) -> None:
    assert load(folder_with(tmp_path, architectures=["Qwen2ForCausalLM"])).eos_token_ids == ()


@pytest.mark.parametrize(
    "rope, positions",
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 4096),
        ({"rope_parameters": YARN}, 131072),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, 8192),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 1024,
                }
            },
            2048,
        ),
    ],
)
def test_positions_with_rope_scaling(tmp_path: Path, rope: dict[str, Any], positions: int) -> None:
    assert load(folder_with(tmp_path, max_position_embeddings=2048, **rope)).max_position_embeddings == positions


def test_sliding_windows_are_of_the_later_layers(tmp_path: Path) -> None:
    values = {"architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": 4, "sliding_window": 64}
    folder = folder_with(tmp_path, **values, use_sliding_window=True, max_window_layers=3)
    assert load(folder).sliding_windows == (0, 0, 0, 64)
    kinds = ["sliding_attention", "full_attention"] * 2
    assert (
        load(folder_with(tmp_path, **values, use_sliding_window=True, layer_types=kinds)).sliding_windows == (64, 0) * 2
    )
    assert load(folder_with(tmp_path, **values, layer_types=kinds)).sliding_windows == (0,) * 4


def test_resolve_fills_what_is_open(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, torch_dtype="bfloat16")
    config = EngineConfig(model=str(folder), device="cpu")
    resolved = resolve(config, ModelConfig.load(config))
    assert resolved.max_model_len == 2048 and resolved.dtype == "bfloat16"
    assert resolved.device == "cpu" and resolved.tokenizer == str(folder)
    assert resolve(resolved, ModelConfig.load(config)) == resolved


def test_resolve_keeps_what_is_set(tmp_path: Path) -> None:
    config = EngineConfig(
        model=str(folder_with(tmp_path)),
        device="cpu",
        dtype="bfloat16",
        max_model_len=100,
        tokenizer="elsewhere",
        step_token_multiple=64,
    )
    assert resolve(config, ModelConfig.load(config)) == config


def test_float16_becomes_float32_on_a_cpu(tmp_path: Path) -> None:
    config = EngineConfig(model=str(folder_with(tmp_path, torch_dtype="float16")), device="cpu")
    assert resolve(config, ModelConfig.load(config)).dtype == "float32"


@pytest.mark.parametrize(
    "settings, key, says",
    [
        ({"max_model_len": 2049}, "max_model_len", "at most 2048"),
        (
            {"tensor_parallel_size": 3},
            "tensor_parallel_size",
            "does not divide num_key_value_heads (8); use 1, 2, 4 or 8",
        ),
        ({"dtype": "float16"}, "dtype", "float32 or bfloat16 on a CPU"),
        (
            {"enable_chunked_prefill": False, "max_num_batched_tokens": 100},
            "max_num_batched_tokens",
            "at least max_model_len (2048)",
        ),
    ],
)
def test_settings_the_model_cannot_have(tmp_path: Path, settings: dict[str, Any], key: str, says: str) -> None:
    folder = folder_with(tmp_path, num_key_value_heads=8, intermediate_size=64)
    error = config_error(folder, device="cpu", **settings)
    assert error.key == key and says in str(error)


@pytest.mark.parametrize(
    "values, says",
    [
        ({"architectures": ["MadeUpForCausalLM"]}, "MadeUpForCausalLM"),
        ({"architectures": []}, "architectures"),
        ({"hidden_size": "big"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"rope_scaling": [1]}, "rope_scaling"),
    ],
)
def test_folders_that_cannot_be_served(tmp_path: Path, values: dict[str, Any], says: str) -> None:
    error = config_error(folder_with(tmp_path, **values))
    assert error.key == "model" and says in str(error)


def test_broken_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    assert "cannot read its config.json" in str(config_error(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    assert "must be a JSON object" in str(config_error(tmp_path))


def test_folders_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no such folder" in str(config_error(tmp_path / "nowhere"))
    assert "no such folder" in str(config_error("nowhere"))
    assert "no config.json" in str(config_error(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    error = config_error("nobody/no-such-model")
    assert error.key == "model" and "Hugging Face hub" in str(error)
