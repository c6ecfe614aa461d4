"""ModelConfig: what a Hugging Face folder says about its model; resolve: what it decides of the engine's configuration.

Plain JSON, no Transformers: reading it costs milliseconds and imports nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.models.registry import find_model

_HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.tiktoken", "*.jinja", "merges.txt", "vocab.txt"]
_DTYPES = ("float32", "bfloat16", "float16")
_CPU_DTYPES = ("float32", "bfloat16")
TILE_ROWS = 128
"""Of a GPU's matrix products: a part of a tile takes as long as a whole one."""
Config = TypeVar("Config", bound=EngineConfig)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: its base, and how it was stretched to longer contexts ("default": not at all)."""

    theta: float
    kind: str = "default"
    parameters: dict[str, Any] = field(default_factory=dict)
    """The scaling's own keys, as the folder has them: factor, low_freq_factor, …"""


@dataclass(frozen=True)
class ModelConfig:
    """The shape of one model. Pickles; crosses to the ranks."""

    folder: str
    """Local path, a hub name resolved."""
    architecture: str
    """Of config.json's `architectures`; a key of the registry."""
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    intermediate_size: int
    max_position_embeddings: int
    """Tokens the model can place, rope scaling included."""
    eos_token_ids: tuple[int, ...]
    """Of config.json and generation_config.json; may be empty."""
    bos_token_id: int | None
    torch_dtype: str
    tie_word_embeddings: bool
    rms_norm_eps: float
    hidden_act: str
    rope: RopeConfig
    sliding_windows: tuple[int, ...]
    """Of each layer; 0: full attention."""
    raw: dict[str, Any] = field(repr=False, compare=False)
    """config.json."""

    @classmethod
    def load(cls, config: EngineConfig) -> ModelConfig:
        """Read the model's config.json and generation_config.json; a hub name is downloaded first.

        Raises ConfigError under "model" for a folder that is missing, incomplete or of an architecture not served.
        """
        folder = _find_folder(config)
        raw = _read_json(folder / "config.json", config.model)
        generation_file = folder / "generation_config.json"
        generation = _read_json(generation_file, config.model) if generation_file.exists() else {}
        names = raw.get("architectures") or []
        if not isinstance(names, list) or not names:
            raise ConfigError("model", config.model, "its config.json must name its `architectures`")
        architecture = str(names[0])
        defaults = find_model(architecture).config_defaults
        return _from_json(str(folder), architecture, {**defaults, **_without_none(raw)}, raw, generation, config.model)


def _from_json(
    folder: str, architecture: str, values: dict[str, Any], raw: dict[str, Any], generation: dict[str, Any], model: str
) -> ModelConfig:
    def integer(key: str, default: int | None = None) -> int:
        value = values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError("model", model, f"{key} in its config.json is {value!r}; it must be a positive integer")
        return value

    heads, hidden, layers = integer("num_attention_heads"), integer("hidden_size"), integer("num_hidden_layers")
    rope = _rope(values, model)
    dtype = str(values.get("dtype") or values.get("torch_dtype") or "float32").removeprefix("torch.")
    bos = values.get("bos_token_id")
    return ModelConfig(
        folder=folder,
        architecture=architecture,
        hidden_size=hidden,
        num_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=integer("num_key_value_heads", heads),
        head_dim=integer("head_dim", hidden // heads),
        vocab_size=integer("vocab_size"),
        intermediate_size=integer("intermediate_size"),
        max_position_embeddings=_max_positions(integer("max_position_embeddings"), rope),
        eos_token_ids=_eos_ids(values.get("eos_token_id"), generation.get("eos_token_id")),
        bos_token_id=bos if isinstance(bos, int) else None,
        torch_dtype=dtype,
        tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
        rms_norm_eps=float(values.get("rms_norm_eps", 1e-6)),
        hidden_act=str(values.get("hidden_act", "silu")),
        rope=rope,
        sliding_windows=_sliding_windows(values, layers),
        raw=raw,
    )


def resolve(config: Config, model_config: ModelConfig) -> Config:
    """A copy of `config` with what the model and the machine decide filled in: max_model_len, dtype, device and others.

    Raises ConfigError, naming the key, for a setting the model cannot be served with.
    """
    find_model(model_config.architecture)
    limit = model_config.max_position_embeddings
    max_model_len = limit if config.max_model_len is None else config.max_model_len
    if max_model_len > limit:
        raise ConfigError("max_model_len", max_model_len, f"at most {limit}, the positions this model was made for")
    _check_tensor_parallel(config.tensor_parallel_size, model_config)
    device = config.device if config.device != "auto" else _best_device()
    dtype = _auto_dtype(model_config.torch_dtype, device) if config.dtype == "auto" else config.dtype
    if device == "cpu" and dtype not in _CPU_DTYPES:
        raise ConfigError("dtype", dtype, f"{' or '.join(_CPU_DTYPES)} on a CPU")
    if config.max_num_batched_tokens < max_model_len and not config.enable_chunked_prefill:
        raise ConfigError(
            "max_num_batched_tokens",
            config.max_num_batched_tokens,
            f"at least max_model_len ({max_model_len}) when enable_chunked_prefill is off",
        )
    return config.replace(
        max_model_len=max_model_len,
        device=device,
        dtype=dtype,
        tokenizer=config.tokenizer or model_config.folder,
        step_token_multiple=config.step_token_multiple or (1 if device == "cpu" else TILE_ROWS),
    )


def _find_folder(config: EngineConfig) -> Path:
    """The model's local folder. A name that is no path is looked for on the hub."""
    path = Path(config.model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError("model", config.model, "this folder has no config.json")
        return path.resolve()
    looks_local = config.model.startswith((".", "/", "~")) or config.model.count("/") != 1 or path.exists()
    if looks_local:
        raise ConfigError(
            "model", config.model, "no such folder; give a Hugging Face folder or a hub name (owner/name)"
        )
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(config.model, revision=config.revision, allow_patterns=_HUB_PATTERNS))
    except Exception as error:  # the hub client raises many kinds; all mean: not to be had
        reason = str(error).strip().splitlines()
        raise ConfigError(
            "model",
            config.model,
            "no such folder here, and not to be had from the Hugging Face hub: "
            f"{type(error).__name__}: {reason[0] if reason else ''}",
        ) from error


def _read_json(path: Path, model: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError("model", model, f"cannot read its {path.name}: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError("model", model, f"its {path.name} must be a JSON object")
    return value


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _rope(values: dict[str, Any], model: str) -> RopeConfig:
    """From `rope_parameters` (Transformers 5) or from `rope_theta` and `rope_scaling` (before)."""
    scaling = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise ConfigError("model", model, "rope_scaling in its config.json must be an object")
    kind = str(scaling.get("rope_type") or scaling.get("type") or "default")
    needed = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        "yarn": ("factor",),
    }
    if kind not in needed:
        raise ConfigError("model", model, f"rope scaling of type {kind!r} is not supported; {', '.join(needed)} are")
    missing = [key for key in needed[kind] if scaling.get(key) is None]
    if missing:
        raise ConfigError("model", model, f"rope scaling of type {kind!r} needs {', '.join(missing)}")
    theta = float(scaling.get("rope_theta") or values.get("rope_theta") or 10000.0)
    parameters = {k: v for k, v in scaling.items() if k not in ("rope_type", "type", "rope_theta")}
    if kind == "yarn":
        parameters.setdefault("original_max_position_embeddings", values.get("max_position_embeddings"))
    return RopeConfig(theta, kind, parameters if kind != "default" else {})


def _max_positions(positions: int, rope: RopeConfig) -> int:
    """Positions with the scaling counted. Llama 3.1's folders count it already."""
    if rope.kind == "linear":
        return int(positions * float(rope.parameters["factor"]))
    if rope.kind == "yarn":
        return max(
            positions, int(rope.parameters["original_max_position_embeddings"] * float(rope.parameters["factor"]))
        )
    return positions


def _eos_ids(*sources: Any) -> tuple[int, ...]:
    """Every id any source names, in order, once."""
    ids: dict[int, None] = {}
    for source in sources:
        for value in source if isinstance(source, list) else [source]:
            if isinstance(value, int):
                ids[value] = None
    return tuple(ids)


def _sliding_windows(values: dict[str, Any], layers: int) -> tuple[int, ...]:
    window = values.get("sliding_window")
    if not window or not values.get("use_sliding_window", False):
        return (0,) * layers
    kinds = values.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == layers:
        return tuple(int(window) if kind == "sliding_attention" else 0 for kind in kinds)
    first = int(values.get("max_window_layers", 28))
    return tuple(int(window) if layer >= first else 0 for layer in range(layers))


def _check_tensor_parallel(size: int, model: ModelConfig) -> None:
    counts = {
        "num_key_value_heads": model.num_key_value_heads,
        "num_attention_heads": model.num_attention_heads,
        "intermediate_size": model.intermediate_size,
    }
    for name, count in counts.items():
        if count % size:
            fits = [str(n) for n in range(1, 65) if all(c % n == 0 for c in counts.values())]
            raise ConfigError("tensor_parallel_size", size, f"does not divide {name} ({count}); use {_or(fits)}")


def _or(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _best_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _auto_dtype(model_dtype: str, device: str) -> str:
    """The model's own; what a CPU cannot compute in well becomes float32."""
    if device == "cpu":
        return model_dtype if model_dtype in _CPU_DTYPES else "float32"
    return model_dtype if model_dtype in _DTYPES else "bfloat16"
