"""largest_step: what a device is put through before its memory is shared out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.layers.attention import Runs, StepInput
from engine.layers.rotary import cos_sin_table
from engine.model_config import ModelConfig
from engine.models.base import Model
from kernels.launch import dependent_launches
from kernels.sampling import SamplingTensors, sample


def largest_step(
    config: EngineConfig, model_config: ModelConfig, model: Model, device: torch.device, dtype: torch.dtype
) -> None:
    """Run the model over max_num_batched_tokens prompt tokens and draw max_num_seqs tokens; nothing is kept.

    Every token's last hidden state is wanted, as for the log-probabilities of prompts: no step takes more memory.
    The cache is one block that every table entry names and that no token is written to.
    """
    num_tokens = max(config.max_num_batched_tokens, config.max_num_seqs)
    length = min(num_tokens, config.model_len)
    num_seqs = -(-num_tokens // length)
    num_blocks = -(-length // config.block_size)
    heads = model_config.num_key_value_heads // config.tensor_parallel_size
    block = torch.zeros((1, config.block_size, heads, model_config.head_dim), dtype=dtype, device=device)
    longs: dict[str, Any] = {"dtype": torch.int64, "device": device}
    ints: dict[str, Any] = {"dtype": torch.int32, "device": device}
    num_tokens = num_seqs * length
    ends = torch.arange(0, num_tokens + 1, length, dtype=torch.int32).to(device)
    step = StepInput(
        token_ids=_count(num_tokens, **longs) % model_config.vocab_size,
        positions=_count(num_tokens, **longs) % length,
        slots=torch.full((num_tokens,), -1, **longs),
        num_decodes=0,
        decodes=None,
        prefills=Runs(
            torch.zeros((num_seqs, num_blocks), **ints), torch.full((num_seqs,), length, **ints), ends, length
        ),
        caches=[(block, block)] * model_config.num_layers,
        cos_sin=cos_sin_table(model_config.rope, model_config.head_dim, length, device),
    )
    with dependent_launches(False):
        hidden = model.forward(step)
    rows = config.max_num_seqs
    logits = model.logits(hidden[:rows])
    floats: dict[str, Any] = {"dtype": torch.float32, "device": device}
    params = SamplingTensors(
        temperature=torch.full((rows,), 0.8, **floats),
        seeds=_count(rows, **longs),
        positions=_count(rows, **longs),
        top_p=torch.full((rows,), 0.9, **floats),
    )
    sample(logits, params)


def _count(size: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """0 to size - 1. Made on the host: on the device "meta", torch would import half of its compiler for an arange."""
    return torch.arange(size, dtype=dtype).to(device)
