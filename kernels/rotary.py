"""Rotary position embedding, NeoX style: a head's first and second half are the two coordinates."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.launch import dependent_launch, next_power_of_2
from kernels.registry import jit, kernel, tl


def rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate x [T, H, D] by cos_sin [T, R] (cosines in the first R/2 columns, sines in the rest); R <= D.

    Computed in float32 and rounded once; columns from R on pass through. Returns a new tensor.
    """
    half = cos_sin.shape[-1] // 2
    cos = cos_sin[:, None, :half]
    sin = cos_sin[:, None, half:]
    x1 = x[..., :half].float()
    x2 = x[..., half : 2 * half].float()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out[..., :half] = x1 * cos - x2 * sin
    out[..., half : 2 * half] = x2 * cos + x1 * sin
    if 2 * half < x.shape[-1]:
        out[..., 2 * half :] = x[..., 2 * half :]
    return out


@kernel
def apply_rotary(q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the queries and keys of each token to its position.

    q [T, Hq, D]; k [T, Hk, D]; cos_sin [max_position, R] float32 with R/2 cosines, then R/2 sines, R <= D (the columns
    from R on are not rotated); positions [T] int64. Returns new (q, k).
    Source: RoFormer, Su et al. 2021, in GPT-NeoX's layout.
    """
    rows = cos_sin[positions]
    return rotate(q, rows), rotate(k, rows)


@jit
def load_cos_sin(cos_sin_row, HALF: tl.constexpr, HALF_P2: tl.constexpr):
    """One position's cosines and sines."""
    i = tl.arange(0, HALF_P2)
    cos = tl.load(cos_sin_row + i, mask=i < HALF, other=0.0)
    return cos, tl.load(cos_sin_row + HALF + i, mask=i < HALF, other=0.0)


@jit
def rotate_heads(
    x, row, heads, num_heads, stride_h, norm_weight, eps, cos, sin,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, HALF_P2: tl.constexpr, REST_P2: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """One token's `heads` of x, normalised (NORM) and rotated: (first half, second half, columns past 2 HALF)."""
    i = tl.arange(0, HALF_P2)
    r = tl.arange(0, REST_P2)
    in_heads = (heads < num_heads)[:, None]
    mask = in_heads & (i < HALF)[None, :]
    rest_mask = in_heads & (r < HEAD_DIM - 2 * HALF)[None, :]
    base = x + row + heads[:, None] * stride_h
    x1 = tl.load(base + i[None, :], mask=mask, other=0.0)
    x2 = tl.load(base + HALF + i[None, :], mask=mask, other=0.0)
    rest = tl.load(base + 2 * HALF + r[None, :], mask=rest_mask, other=0.0)
    if NORM:
        dtype = x1.dtype
        a, b, c = x1.to(tl.float32), x2.to(tl.float32), rest.to(tl.float32)
        scale = 1.0 / tl.sqrt_rn((tl.sum(a * a, 1) + tl.sum(b * b, 1) + tl.sum(c * c, 1)) / HEAD_DIM + eps)
        w1 = tl.load(norm_weight + i, mask=i < HALF, other=0.0).to(tl.float32)
        w2 = tl.load(norm_weight + HALF + i, mask=i < HALF, other=0.0).to(tl.float32)
        w3 = tl.load(norm_weight + 2 * HALF + r, mask=r < HEAD_DIM - 2 * HALF, other=0.0).to(tl.float32)
        x1 = ((a * scale[:, None]).to(dtype).to(tl.float32) * w1[None, :]).to(dtype)
        x2 = ((b * scale[:, None]).to(dtype).to(tl.float32) * w2[None, :]).to(dtype)
        rest = ((c * scale[:, None]).to(dtype).to(tl.float32) * w3[None, :]).to(dtype)
    cos, sin = cos[None, :], sin[None, :]
    x1, x2 = x1.to(tl.float32), x2.to(tl.float32)
    return x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest


@jit
def store_heads(
    out, row, heads, num_heads, stride_h, x1, x2, rest,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, HALF_P2: tl.constexpr, REST_P2: tl.constexpr,
):  # fmt: skip
    """Write what rotate_heads gave at out + row + head * stride_h."""
    i = tl.arange(0, HALF_P2)
    r = tl.arange(0, REST_P2)
    in_heads = (heads < num_heads)[:, None]
    mask = in_heads & (i < HALF)[None, :]
    base = out + row + heads[:, None] * stride_h
    tl.store(base + i[None, :], x1.to(out.dtype.element_ty), mask=mask)
    tl.store(base + HALF + i[None, :], x2.to(out.dtype.element_ty), mask=mask)
    rest_mask = in_heads & (r < HEAD_DIM - 2 * HALF)[None, :]
    tl.store(base + 2 * HALF + r[None, :], rest.to(out.dtype.element_ty), mask=rest_mask)


@jit
def _rotary_kernel(
    q, k, q_out, k_out, cos_sin, positions, num_q_blocks,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_c,
    HQ: tl.constexpr, HK: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, HALF_P2: tl.constexpr,
    REST_P2: tl.constexpr, HEADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    t = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    cos, sin = load_cos_sin(cos_sin + tl.load(positions + t) * stride_c, HALF, HALF_P2)
    if block < num_q_blocks:
        heads = block * HEADS + tl.arange(0, HEADS)
        x1, x2, rest = rotate_heads(
            q, t * stride_qt, heads, HQ, stride_qh, q, 0.0, cos, sin, HEAD_DIM, HALF, HALF_P2, REST_P2, False
        )  # fmt: skip
        store_heads(q_out, t * (HQ * HEAD_DIM), heads, HQ, HEAD_DIM, x1, x2, rest, HEAD_DIM, HALF, HALF_P2, REST_P2)
    else:
        heads = (block - num_q_blocks) * HEADS + tl.arange(0, HEADS)
        x1, x2, rest = rotate_heads(
            k, t * stride_kt, heads, HK, stride_kh, k, 0.0, cos, sin, HEAD_DIM, HALF, HALF_P2, REST_P2, False
        )  # fmt: skip
        store_heads(k_out, t * (HK * HEAD_DIM), heads, HK, HEAD_DIM, x1, x2, rest, HEAD_DIM, HALF, HALF_P2, REST_P2)


def head_blocks(num_heads: int, head_dim: int, rotary_dim: int) -> dict[str, int]:
    """The compile-time sizes rotate_heads needs, and HEADS, the heads a program handles (about 1,024 elements)."""
    half = rotary_dim // 2
    heads = max(1, min(next_power_of_2(num_heads), 1024 // next_power_of_2(head_dim)))
    return {
        "HEAD_DIM": head_dim,
        "HALF": half,
        "HALF_P2": next_power_of_2(half),
        "REST_P2": next_power_of_2(max(1, head_dim - 2 * half)),
        "HEADS": heads,
    }


def _why_not(q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor) -> str | None:
    if q.stride(-1) != 1 or k.stride(-1) != 1 or cos_sin.stride(-1) != 1 or positions.stride(-1) != 1:
        return "a head's elements are not contiguous"
    return None


@apply_rotary.triton(supports=_why_not)
def _apply_rotary_triton(q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    sizes = head_blocks(q.shape[1], q.shape[2], cos_sin.shape[1])
    num_q_blocks, num_k_blocks = -(-q.shape[1] // sizes["HEADS"]), -(-k.shape[1] // sizes["HEADS"])
    if q.shape[0]:
        _rotary_kernel[(q.shape[0], num_q_blocks + num_k_blocks)](
            q, k, q_out, k_out, cos_sin, positions, num_q_blocks,
            *q.stride()[:2], *k.stride()[:2], cos_sin.stride(0), HQ=q.shape[1], HK=k.shape[1], **sizes, num_warps=2,
            **dependent_launch(q),
        )  # fmt: skip
    return q_out, k_out
