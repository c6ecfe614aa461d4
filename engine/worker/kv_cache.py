"""KvCache: the paged keys and values of one rank, and how many blocks of them its memory holds."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.executor import CacheCapacity
from engine.model_config import ModelConfig
from kernels.kv_cache import copy_blocks


class KvCache:
    """Keys and values of every layer, [num_blocks, block_size, kv heads of this rank, head_dim] each."""

    def __init__(
        self, capacity: CacheCapacity, model: ModelConfig, ranks: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (capacity.num_blocks, capacity.block_size, model.num_key_value_heads // ranks, model.head_dim)
        self.layers = [(_zeros(shape, dtype, device), _zeros(shape, dtype, device)) for _ in range(model.num_layers)]
        self._all = [tensor for layer in self.layers for tensor in layer]

    def copy(self, pairs: Tensor) -> None:
        """Copy blocks in every layer: pairs [P, 2] int64 of (source, target)."""
        copy_blocks(self._all, pairs)


def block_bytes(config: EngineConfig, model: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of one block, keys and values of every layer, on one rank."""
    heads = model.num_key_value_heads // config.tensor_parallel_size
    return 2 * model.num_layers * config.block_size * heads * model.head_dim * dtype.itemsize


def plan_capacity(config: EngineConfig, model: ModelConfig, dtype: torch.dtype, free_bytes: int) -> CacheCapacity:
    """How many blocks to have: `num_blocks` if it is set, else what fits in free_bytes.

    Raises ConfigError when one sequence of max_model_len would not fit, or when the blocks asked for do not.
    """
    each = block_bytes(config, model, dtype)
    fitting = free_bytes // each
    needed = -(-config.model_len // config.block_size)
    if config.num_blocks is not None:
        if config.num_blocks > fitting:
            raise ConfigError("num_blocks", config.num_blocks, f"at most {fitting}: a block takes {each} bytes")
        if config.num_blocks < needed:
            raise ConfigError(
                "num_blocks",
                config.num_blocks,
                f"at least {needed}, for one sequence of max_model_len ({config.model_len}) tokens",
            )
        return CacheCapacity(config.num_blocks, config.block_size)
    if fitting < needed:
        raise ConfigError(
            "max_model_len",
            config.model_len,
            f"at most {fitting * config.block_size} tokens fit in the {free_bytes / 2**30:.2f} GiB there are for the "
            f"KV cache; lower it, or give the cache more memory ({_memory_key(config)})",
        )
    return CacheCapacity(fitting, config.block_size)


def _memory_key(config: EngineConfig) -> str:
    return "cpu_kv_cache_gib" if config.device == "cpu" else "gpu_memory_utilization"


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU the pages are not touched until they are written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(shape)
