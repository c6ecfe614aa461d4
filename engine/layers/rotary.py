"""Rotary embedding tables: the angles of every position, with the ways models stretch them to longer contexts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engine.model_config import RopeConfig


def cos_sin_table(rope: RopeConfig, head_dim: int, num_positions: int, device: torch.device) -> Tensor:
    """[num_positions, head_dim] float32: head_dim/2 cosines, then as many sines, of each position's angles."""
    frequencies, scale = _KINDS[rope.kind](rope, head_dim)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies[None, :]
    return (torch.cat([angles.cos(), angles.sin()], dim=-1) * scale).to(device)


def _default(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    return 1.0 / rope.theta**exponents, 1.0


def _linear(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """Position interpolation, Chen et al. 2023."""
    frequencies, scale = _default(rope, head_dim)
    return frequencies / float(rope.parameters["factor"]), scale


def _llama3(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    frequencies, scale = _default(rope, head_dim)
    factor, low, high, original = (
        float(rope.parameters[key])
        for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    turns = original * frequencies / (2 * math.pi)  # full turns over the original context
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # share of the unstretched frequency
    return (1 - kept) * frequencies / factor + kept * frequencies, scale


def _yarn(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """YaRN, Peng et al. 2023: interpolate slow dimensions, keep fast ones, ramp between; scale the scores."""
    frequencies, _ = _default(rope, head_dim)
    parameters = rope.parameters
    factor, original = float(parameters["factor"]), float(parameters["original_max_position_embeddings"])

    def dimension(turns: float) -> float:
        """The (fractional) dimension that makes `turns` full turns over the original context."""
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first = dimension(float(parameters.get("beta_fast") or 32))
    last = dimension(float(parameters.get("beta_slow") or 1))
    if parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    width = last - first if last != first else 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - first) / width).clamp(0, 1)
    return frequencies / factor * ramp + frequencies * (1 - ramp), _yarn_score_scale(parameters, factor)


def _yarn_score_scale(parameters: dict[str, Any], factor: float) -> float:
    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    given = parameters.get("attention_factor")
    if given is not None:
        return float(given)
    mscale, mscale_all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return scale(float(mscale)) / scale(float(mscale_all_dim))
    return scale(1.0)


_KINDS: dict[str, Callable[[RopeConfig, int], tuple[Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
