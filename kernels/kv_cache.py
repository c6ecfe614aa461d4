"""Writing into the paged K/V cache: new tokens into slots, whole blocks into blocks.

A cache is [num_blocks, block_size, Hkv, D]; slot = block * block_size + offset.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.launch import dependent_launch, next_power_of_2
from kernels.registry import jit, kernel, tl
from kernels.rms_norm import rms_norm
from kernels.rotary import apply_rotary, head_blocks, load_cos_sin, rotate_heads, store_heads


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
    behind_gate: bool = False,  # noqa: ARG001 - orders the GPU's kernels
) -> Tensor:
    """Rotate q and k to their positions and write k and v into the cache; one kernel on a GPU.

    q [T, Hq, D]; k, v [T, Hkv, D] (views into one packed product are welcome); cos_sin [max_position, R] float32;
    positions, slots [T] int64; k_cache, v_cache [N, block_size, Hkv, D], mutated. With q_norm and k_norm [D], every
    head is RMS-normalised first (Qwen3). behind_gate: since a kernels.launch.gate() nothing was written but its
    results, which q, k and v are. Returns the rotated q [T, Hq, D], a new tensor.
    """
    if q_norm is not None:
        q = rms_norm.definition(q, q_norm, eps)
    if k_norm is not None:
        k = rms_norm.definition(k, k_norm, eps)
    q, k = apply_rotary.definition(q, k, cos_sin, positions)
    write_kv.definition(k, v, k_cache, v_cache, slots)
    return q


@jit
def _write_kv_kernel(
    k, v, k_cache, v_cache, slots, stride_kt, stride_kh, stride_vt, stride_vh,
    stride_kn, stride_ks, stride_kch, stride_vn, stride_vs, stride_vch,
    HKV: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + t)
    if slot >= 0:
        h = tl.arange(0, H)[:, None]
        d = tl.arange(0, D)[None, :]
        mask = (h < HKV) & (d < HEAD_DIM)
        block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
        key = tl.load(k + t * stride_kt + h * stride_kh + d, mask=mask, other=0.0)
        value = tl.load(v + t * stride_vt + h * stride_vh + d, mask=mask, other=0.0)
        k_ptrs = k_cache + block * stride_kn + offset * stride_ks + h * stride_kch + d
        v_ptrs = v_cache + block * stride_vn + offset * stride_vs + h * stride_vch + d
        tl.store(k_ptrs, key.to(k_cache.dtype.element_ty), mask=mask)
        tl.store(v_ptrs, value.to(v_cache.dtype.element_ty), mask=mask)


@jit
def _rotary_and_write_kernel(
    q, k, v, q_out, cos_sin, positions, k_cache, v_cache, slots, q_norm, k_norm, eps, num_q_blocks,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_c,
    stride_kn, stride_ks, stride_kch, stride_vn, stride_vs, stride_vch,
    HQ: tl.constexpr, HKV: tl.constexpr, BLOCK_SIZE: tl.constexpr, D: tl.constexpr, Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, HALF_P2: tl.constexpr, REST_P2: tl.constexpr,
    HEADS: tl.constexpr, BEHIND_GATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if not BEHIND_GATE:
            tl.extra.cuda.gdc_wait()
    t = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    slot = tl.load(slots + t, cache_modifier=".cg")
    position = tl.load(positions + t, cache_modifier=".cg")
    cos, sin = load_cos_sin(cos_sin + position * stride_c, HALF, HALF_P2)
    if PDL and BEHIND_GATE:
        tl.extra.cuda.gdc_wait()
    if part < num_q_blocks:
        heads = part * HEADS + tl.arange(0, HEADS)
        x1, x2, rest = rotate_heads(
            q, t * stride_qt, heads, HQ, stride_qh, q_norm, eps, cos, sin, HEAD_DIM, HALF, HALF_P2, REST_P2, Q_NORM
        )  # fmt: skip
        store_heads(q_out, t * (HQ * HEAD_DIM), heads, HQ, HEAD_DIM, x1, x2, rest, HEAD_DIM, HALF, HALF_P2, REST_P2)
    else:
        if slot >= 0:
            block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
            heads = (part - num_q_blocks) * HEADS + tl.arange(0, HEADS)
            x1, x2, rest = rotate_heads(
                k, t * stride_kt, heads, HKV, stride_kh, k_norm, eps, cos, sin,
                HEAD_DIM, HALF, HALF_P2, REST_P2, K_NORM,
            )  # fmt: skip
            row = block * stride_kn + offset * stride_ks
            store_heads(k_cache, row, heads, HKV, stride_kch, x1, x2, rest, HEAD_DIM, HALF, HALF_P2, REST_P2)
            d = tl.arange(0, D)[None, :]
            mask = (heads < HKV)[:, None] & (d < HEAD_DIM)
            value = tl.load(v + t * stride_vt + heads[:, None] * stride_vh + d, mask=mask, other=0.0)
            v_ptrs = v_cache + block * stride_vn + offset * stride_vs + heads[:, None] * stride_vch + d
            tl.store(v_ptrs, value.to(v_cache.dtype.element_ty), mask=mask)


@jit
def _copy_blocks_kernel(caches, src_dst, words, CHUNK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    pair = tl.program_id(1).to(tl.int64)
    cache = tl.load(caches + tl.program_id(2)).to(tl.pointer_type(tl.int32))
    src = tl.load(src_dst + pair * 2)
    dst = tl.load(src_dst + pair * 2 + 1)
    i = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    if src >= 0:
        tl.store(cache + dst * words + i, tl.load(cache + src * words + i, mask=i < words), mask=i < words)


def _why_not(*tensors: object, **_: object) -> str | None:
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.stride(-1) != 1:
            return "a head's elements are not contiguous"
    return None


@write_kv.triton(supports=_why_not)
def _write_kv_triton(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    num_tokens, num_heads, head_dim = k.shape
    if num_tokens:
        _write_kv_kernel[(num_tokens,)](
            k, v, k_cache, v_cache, slots, *k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3],
            *v_cache.stride()[:3], HKV=num_heads, HEAD_DIM=head_dim, BLOCK_SIZE=k_cache.shape[1],
            H=next_power_of_2(num_heads), D=next_power_of_2(head_dim), num_warps=2, **dependent_launch(k),
        )  # fmt: skip


@rotary_and_write_kv.triton(supports=_why_not)
def _rotary_and_write_kv_triton(
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
    behind_gate: bool = False,
) -> Tensor:
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    sizes = head_blocks(num_heads, head_dim, cos_sin.shape[1])
    num_q_blocks, num_kv_blocks = -(-num_heads // sizes["HEADS"]), -(-num_kv_heads // sizes["HEADS"])
    if num_tokens:
        _rotary_and_write_kernel[(num_tokens, num_q_blocks + num_kv_blocks)](
            q, k, v, out, cos_sin, positions, k_cache, v_cache, slots,
            q if q_norm is None else q_norm, k if k_norm is None else k_norm, eps, num_q_blocks,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], cos_sin.stride(0), *k_cache.stride()[:3],
            *v_cache.stride()[:3], HQ=num_heads, HKV=num_kv_heads, BLOCK_SIZE=k_cache.shape[1],
            D=next_power_of_2(head_dim), Q_NORM=q_norm is not None, K_NORM=k_norm is not None, **sizes,
            BEHIND_GATE=behind_gate, num_warps=2, **dependent_launch(q),
        )  # fmt: skip
    return out


def _why_not_copy(caches: Sequence[Tensor], src_dst: Tensor) -> str | None:
    first = caches[0]
    if any(cache.shape != first.shape or cache.dtype != first.dtype or not cache.is_contiguous() for cache in caches):
        return "the caches differ in shape or dtype, or are not contiguous"
    if first[0].numel() * first.element_size() % 4 or not src_dst.is_contiguous():
        return "a block is not a whole number of 4-byte words, or the pairs are not contiguous"
    return None


@copy_blocks.triton(supports=_why_not_copy)
def _copy_blocks_triton(caches: Sequence[Tensor], src_dst: Tensor) -> None:
    first = caches[0]
    pointers = torch.tensor([cache.data_ptr() for cache in caches], dtype=torch.int64)
    pointers = pointers.to(first.device, non_blocking=True)
    words = first[0].numel() * first.element_size() // 4
    if len(src_dst):
        _copy_blocks_kernel[(-(-words // 4096), len(src_dst), len(caches))](
            pointers, src_dst, words, CHUNK=4096, num_warps=4, **dependent_launch(src_dst)
        )
