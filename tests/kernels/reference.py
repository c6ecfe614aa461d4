"""Plain references of the kernels' tests: loops over sequences and rows, float64, no cleverness."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kernels.registry import force


def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tables: Tensor,
    context_lens: Tensor,
    query_lens: list[int],
    scale: float,
    sliding_window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """Causal attention of each sequence's last query_lens[b] tokens, one query and one head at a time, in float64."""
    num_heads, head_dim = q.shape[1:]
    block_size, num_kv_heads = k_cache.shape[1:3]
    out = torch.zeros(q.shape, dtype=torch.float64)
    row = 0
    for b, num_new in enumerate(query_lens):
        context_len = int(context_lens[b])
        slots = [int(tables[b, i // block_size]) * block_size + i % block_size for i in range(context_len)]
        k = k_cache.reshape(-1, num_kv_heads, head_dim)[slots].double()
        v = v_cache.reshape(-1, num_kv_heads, head_dim)[slots].double()
        for i in range(num_new if context_len else 0):
            end = context_len - num_new + i + 1
            start = max(0, end - sliding_window) if sliding_window else 0
            for head in range(num_heads):
                kv_head = head * num_kv_heads // num_heads
                scores = k[start:end, kv_head] @ q[row + i, head].double() * scale
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                out[row + i, head] = scores.softmax(0) @ v[start:end, kv_head]
        row += num_new
    return out


def kept_tokens(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> set[int]:
    """The tokens a row may draw, by sorting: top_k, then top_p of the renormalised rest, then min_p; ties kept."""
    x = [float(v) / temperature for v in logits.double()]
    order = sorted(range(len(x)), key=lambda i: -x[i])
    if top_k:
        kth = x[order[min(top_k, len(x)) - 1]]
        order = [i for i in order if x[i] >= kth]
    weights = {i: math.exp(x[i] - x[order[0]]) for i in order}
    total = sum(weights.values())
    kept = []
    for i in order:
        above = sum(weights[j] for j in order if x[j] > x[i]) if top_p < 1 else 0.0
        if (top_p >= 1 or above < top_p * total or above == 0) and weights[i] >= min_p:
            kept.append(i)
    return set(kept)


def relative_error(out: Tensor, reference: Tensor) -> float:
    """‖out - reference‖ / ‖reference‖ in float64; NaN when either has one."""
    difference = (out.double().cpu() - reference.double().cpu()).norm()
    return float(difference / reference.double().norm().clamp(min=1e-30))


def both(op: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """The operation's results by its definition and by its Triton kernel (interpreted, on a machine without a GPU)."""
    with force("torch"):
        expected = op(*args, **kwargs)
    with force("triton"):
        actual = op(*args, **kwargs)
    return expected, actual
