"""EngineConfig: everything that shapes an engine, frozen and validated; unknown keys are refused."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engine.errors import ConfigError
from engine.step import Pooling

DType = Literal["auto", "float32", "bfloat16", "float16"]


class EngineConfig(BaseModel):
    """What a person sets for one engine; the field names are the field's usual ones.

    Values the model decides (`max_model_len` when None) are filled in by `resolve`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    # Model
    model: str
    """A Hugging Face folder, or a hub name."""
    tokenizer: str | None = None
    """Another folder or hub name for the tokenizer; None: the model's."""
    revision: str | None = None
    trust_remote_code: bool = False
    chat_template: str | None = None
    """A Jinja file (or the template itself) instead of the tokenizer's own."""
    dtype: DType = "auto"
    pooling: Pooling = "last"
    """How a prompt that is embedded becomes one vector: its last hidden state, or the mean of all."""
    load_format: Literal["auto", "safetensors", "dummy"] = "auto"
    """dummy: random weights, for speed runs; no weight file is read."""
    max_model_len: int | None = Field(None, ge=1)
    """Prompt plus output tokens of one sequence; None: what the model was made for."""
    seed: int = 0
    """Of dummy weights; not of sampling."""

    # Where
    device: Literal["auto", "cpu", "cuda"] = "auto"
    tensor_parallel_size: int = Field(1, ge=1)
    step_channel: Literal["socket", "actor"] = "socket"
    """How step plans reach the ranks: sockets, or plain actor calls."""
    warm_spares: int | None = Field(None, ge=0)
    """Processes a node that have imported everything and wait to replace ranks; they hold no GPU memory. None: as many
    as one failure replaces, one on CPUs and all of a node's ranks on GPUs."""
    resources_timeout_s: float = Field(600.0, gt=0)
    """How long a start, or the engine's return after a node was lost, waits for what the cluster lacks."""

    # Cache
    block_size: Literal[8, 16, 32, 64, 128] = 16
    num_blocks: int | None = Field(None, ge=1)
    """KV blocks; None: as many as fit in the measured memory."""
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    """Share of the device's memory this process may use in all."""
    cpu_kv_cache_gib: float = Field(1.0, gt=0)
    """On a CPU: the KV cache takes at most this, and at most half of the memory that is free."""
    enable_prefix_caching: bool = True

    # Scheduling
    max_num_seqs: int = Field(256, ge=1)
    max_num_batched_tokens: int = Field(8192, ge=1)
    step_token_multiple: int | None = Field(None, ge=1)
    """Steps of at least as many decodes, and pieces of prompts beside them, are cut to a multiple of this many tokens
    where that puts off no more than half of the pieces. None: 128, the rows of a GPU's tiles, or 1 on a CPU."""
    enable_chunked_prefill: bool = True
    policy: Literal["fcfs", "priority"] = "fcfs"
    steps_ahead: int = Field(2, ge=1, le=4)
    """Steps in flight at once; 1 reads each step before it plans the next."""

    # CUDA
    enforce_eager: bool = False
    """No CUDA graphs."""

    @classmethod
    def from_args(cls, **args: Any) -> Self:
        """Validate keyword arguments. Raises ConfigError naming the key, what came and what is allowed."""
        try:
            return cls(**args)
        except ValidationError as error:
            raise config_error(error, cls) from None

    def replace(self, **changes: Any) -> Self:
        """A validated copy with some fields changed."""
        return type(self).from_args(**{**self.model_dump(), **changes})

    @property
    def model_len(self) -> int:
        """max_model_len once resolved."""
        assert self.max_model_len is not None, "config not resolved"
        return self.max_model_len


def config_error(error: ValidationError, model: type[BaseModel], prefix: str = "") -> ConfigError:
    """The first fault of a pydantic error as a ConfigError with the key's full path."""
    fault = error.errors(include_url=False)[0]
    key = ""
    for part in fault["loc"]:
        key += f"[{part}]" if isinstance(part, int) else f".{part}" if key else str(part)
    if fault["type"] == "extra_forbidden":
        names = ", ".join(sorted(_fields_at(model, fault["loc"][:-1])))
        return ConfigError(prefix + key, fault["input"], f"unknown key; allowed: {names}")
    if fault["type"] == "missing":
        return ConfigError(prefix + key, None, "this key is required")
    return ConfigError(prefix + key, fault["input"], fault["msg"])


def _fields_at(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Field names of the (possibly nested) model that `path` leads to."""
    for part in path:
        field = model.model_fields.get(str(part))
        inner = field.annotation if field else None
        candidates = [inner, *getattr(inner, "__args__", ())]
        found = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not found:
            return []
        model = found[0]
    return list(model.model_fields)
