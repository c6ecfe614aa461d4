"""Writing into the paged K/V cache: new tokens into slots, whole blocks into blocks.

A cache is [num_blocks, block_size, Hkv, D]; slot = block * block_size + offset.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kernels.registry import kernel
from kernels.rms_norm import rms_norm
from kernels.rotary import apply_rotary


@kernel
def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Write each token's key and value into its slot of the caches.

    k, v [T, Hkv, D]; k_cache, v_cache [N, block_size, Hkv, D], mutated; slots [T] int64, -1 skips the token (padding).
    No two tokens share a slot.
    """
    if bool((slots < 0).any()):
        keep = slots >= 0
        k, v, slots = k[keep], v[keep], slots[keep]
    k, v = k.to(k_cache.dtype), v.to(v_cache.dtype)
    if k_cache.is_contiguous() and v_cache.is_contiguous():
        k_cache.view(-1, *k_cache.shape[2:]).index_copy_(0, slots, k)
        v_cache.view(-1, *v_cache.shape[2:]).index_copy_(0, slots, v)
    else:
        index = (slots // k_cache.shape[1], slots % k_cache.shape[1])
        k_cache[index] = k
        v_cache[index] = v


@kernel
def copy_blocks(caches: Sequence[Tensor], src_dst: Tensor) -> None:
    """Copy whole blocks inside every cache: block src_dst[i, 0] onto block src_dst[i, 1].

    caches: tensors [N, ...] of any shapes, mutated (every layer's K and V in one call); src_dst [P, 2] int64, a
    negative source skips the pair. No block is a destination twice, or both a source and a destination.
    """
    src_dst = src_dst[src_dst[:, 0] >= 0]
    src, dst = src_dst.unbind(1)
    for cache in caches:
        cache[dst] = cache[src]


@kernel
def rotary_and_write_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Rotate q and k to their positions and write k and v into the cache; one kernel on a GPU.

    q [T, Hq, D]; k, v [T, Hkv, D] (views into one packed product are welcome); cos_sin [max_position, R] float32;
    positions, slots [T] int64; k_cache, v_cache [N, block_size, Hkv, D], mutated. With q_norm and k_norm [D], every
    head is RMS-normalised first (Qwen3). Returns the rotated q [T, Hq, D], a new tensor.
    """
    if q_norm is not None:
        q = rms_norm.definition(q, q_norm, eps)
    if k_norm is not None:
        k = rms_norm.definition(k, k_norm, eps)
    q, k = apply_rotary.definition(q, k, cos_sin, positions)
    write_kv.definition(k, v, k_cache, v_cache, slots)
    return q
