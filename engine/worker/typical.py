"""Locally typical sampling: keep the tokens whose surprise is nearest to the expected one."""

from __future__ import annotations

import torch
from torch import Tensor


def keep_typical(logits: Tensor, temperature: Tensor, typical_p: Tensor) -> Tensor:
    """Leave out the untypical tokens of each row.

    logits [B, V] float32; temperature [B], 0 keeps the row as it is; typical_p [B], 1 keeps it too. Tokens are taken
    in the order of |surprise - entropy| until their mass reaches typical_p. Returns new logits, -inf where left out.
    Source: Meister et al. 2022, "Locally Typical Sampling", section 3.
    """
    logprobs = torch.log_softmax(logits / temperature.clamp(min=1e-6)[:, None], dim=-1)
    probs = logprobs.exp()
    entropy = -torch.where(probs > 0, probs * logprobs, 0.0).sum(-1, keepdim=True)
    order = (-logprobs - entropy).abs().argsort(dim=-1, stable=True)
    mass = probs.gather(-1, order).cumsum(-1)
    last = (mass < typical_p[:, None]).sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    left_out = torch.arange(logits.shape[-1], device=logits.device) > last
    left_out &= ((temperature > 0) & (typical_p < 1))[:, None]
    return logits.masked_fill(torch.zeros_like(left_out).scatter(-1, order, left_out), float("-inf"))
