"""vLLM's names for engine arguments, so that programs written for its `LLM` run with ours."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from engine.config import EngineConfig

logger = logging.getLogger(__name__)

_RENAMED = {"scheduling_policy": "policy"}
_DTYPES = {"half": "float16", "float": "float32"}

# Knobs of another engine's machinery: the same program is right without them.
_NO_EFFECT = {
    "allowed_local_media_path",
    "async_scheduling",
    "block_manager",
    "calculate_kv_scales",
    "compilation_config",
    "config_format",
    "cpu_offload_gb",
    "disable_async_output_proc",
    "disable_cascade_attn",
    "disable_custom_all_reduce",
    "disable_log_requests",
    "disable_log_stats",
    "disable_sliding_window",
    "distributed_executor_backend",
    "download_dir",
    "enable_log_requests",
    "gpu_memory_fraction",
    "limit_mm_per_prompt",
    "max_context_len_to_capture",
    "max_logprobs",
    "max_num_partial_prefills",
    "max_parallel_loading_workers",
    "max_seq_len_to_capture",
    "mm_processor_kwargs",
    "num_lookahead_slots",
    "num_scheduler_steps",
    "preemption_mode",
    "ray_workers_use_nsight",
    "runner",
    "scheduler_delay_factor",
    "swap_space",
    "task",
    "tokenizer_mode",
    "tokenizer_revision",
    "use_tqdm_on_load",
    "use_v2_block_manager",
    "worker_use_ray",
}

# Features that would change the results: only the value that means "off" is accepted.
_OFF: dict[str, tuple[Any, ...]] = {
    "data_parallel_size": (1,),
    "enable_lora": (False, None),
    "hf_overrides": (None,),
    "kv_cache_dtype": ("auto",),
    "logits_processors": (None,),
    "pipeline_parallel_size": (1,),
    "quantization": (None,),
    "skip_tokenizer_init": (False,),
    "speculative_config": (None,),
}


def translate(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """`arguments` under EngineConfig's names. Those without a meaning here are left out, named in one warning.

    What is neither known here nor there stays, for EngineConfig to refuse.
    """
    out: dict[str, Any] = {}
    ignored = []
    for name, value in arguments.items():
        name = _RENAMED.get(name, name)
        if name in EngineConfig.model_fields:
            out[name] = _dtype(value) if name == "dtype" else value
        elif name in _NO_EFFECT:
            ignored.append(name)
        elif not (name in _OFF and value in _OFF[name]):
            out[name] = value
    if ignored:
        logger.warning("these arguments have no effect here and are ignored: %s", ", ".join(sorted(ignored)))
    return out


def _dtype(value: Any) -> Any:
    """The name of a dtype given as a name, vLLM's short name or a torch.dtype."""
    name = str(value).removeprefix("torch.")
    return _DTYPES.get(name, name)
