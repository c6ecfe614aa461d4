"""Decode attention on Hopper (compute capability 9.0): bulk copies read the cache, all heads of a token at a time.

The kernel is decode_hopper.cu; here are its launch and its limits. The work is cut as in kernels.paged_decode: tiles of
16 tokens, one slice a block.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kernels.cuda_source import CudaKernel
from kernels.hopper import FIRST_OUT, SHARED_BYTES, kernel_text, why_not
from kernels.launch import compile_in_rehearsal, dependent_launch

TILE = 16
LEAST_SEQUENCES = 9
"""Fewer are cut into so many slices that merging them takes longer than reading."""
BEHIND_GATE, BESIDE_PREFILL = 1, 2  # as in decode_hopper.cu
MAX_GROUP = 8
"""Query heads to a key/value head."""
LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class DecodeShape:
    """What one kernel is compiled for."""

    heads: int
    """Of keys and values."""
    group: int
    """Query heads that attend with each of them."""
    head_dim: int
    half: bool = False
    rotary: bool = False

    @property
    def blocks_per_multiprocessor(self) -> int:
        """So many that about eight warps compute beside each other."""
        return max(1, 8 // self.heads)

    @property
    def stage_bytes(self) -> int:
        return 2 * TILE * self.heads * self.head_dim * 2

    @property
    def stages(self) -> int:
        share = (SHARED_BYTES - 1024 * self.blocks_per_multiprocessor) // self.blocks_per_multiprocessor
        return min(6, share // (self.stage_bytes + 16))

    def source(self) -> str:
        """The kernel's text, whole."""
        values = {
            "HEADS": self.heads, "GROUP": self.group, "HEAD_DIM": self.head_dim, "STAGES": self.stages,
            "HALF": int(self.half), "ROTARY": int(self.rotary),
        }  # fmt: skip
        return kernel_text("decode_hopper", values)


@cache
def shape_kernel(shape: DecodeShape) -> CudaKernel:
    shared_bytes = shape.stages * (shape.stage_bytes + 16)
    return CudaKernel(shape.source(), "decode", threads=32 * shape.heads + 32, shared_bytes=shared_bytes)


@dataclass(frozen=True)
class NewTokens:
    """Keys and values [B, Hkv, D] of the contexts' last tokens, as projected, as q is then; cosines and sines."""

    k: Tensor
    v: Tensor
    cos_sin: Tensor

    def unsupported(self, q: Tensor, k_cache: Tensor) -> str | None:
        """Why the kernel cannot rotate and write them; None when it can."""
        head_dim = q.shape[2]
        if self.cos_sin.shape[1] != head_dim or self.cos_sin.dtype != torch.float32 or self.cos_sin.stride(1) != 1:
            return "a part of a head is rotated only"
        if not q.dtype == self.k.dtype == self.v.dtype == k_cache.dtype:
            return "keys and values of another type than the cache"
        if self.k.stride() != self.v.stride() or self.k.stride()[1:] != (head_dim, 1):
            return "the heads of keys or values are not next to each other"
        return "tokens begin at odd places" if self.k.stride(0) % 2 or self.cos_sin.stride(0) % 2 else None


def shape_of(q: Tensor, k_cache: Tensor, *, rotary: bool = False) -> DecodeShape:
    heads = k_cache.shape[2]
    return DecodeShape(heads, q.shape[1] // heads, q.shape[2], q.dtype == torch.float16, rotary)


def unsupported(k_cache: Tensor) -> str | None:
    """Why the kernel cannot attend over such a cache; None when it can."""
    _, block_size, heads, head_dim = k_cache.shape
    if k_cache.dtype not in (torch.float16, torch.bfloat16) or head_dim not in (64, 128):
        return f"a cache of {k_cache.dtype} with heads of {head_dim}"
    if heads > 8 or block_size % TILE or block_size > 256:
        return f"{heads} key/value heads, blocks of {block_size} tokens"
    if k_cache.stride()[1:] != (heads * head_dim, head_dim, 1):
        return "the tokens of a block are not contiguous"
    return why_not(k_cache.device)


def decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, context_lens: Tensor, *, scale: float,
    work: Any, into: Tensor | None = None, behind_gate: bool = False, beside_prefill: bool = False,
    new: NewTokens | None = None,
) -> Tensor:  # fmt: skip
    """kernels.paged_attention.decode over the slices of `work`, a paged_decode.DecodeWork with tiles of 16 tokens.

    new: kernels.paged_attention.rotary_decode.
    """
    num_seqs, num_heads, head_dim = q.shape
    shape = shape_of(q, k_cache, rotary=new is not None)
    kernel = shape_kernel(shape)
    out = torch.empty((num_seqs, num_heads, head_dim), dtype=q.dtype, device=q.device) if into is None else into
    slots = work.num_slices * 2 * shape.heads
    partial = torch.empty(slots * 8 * head_dim, dtype=torch.float32, device=q.device)
    partial_ml = torch.empty(slots * 16, dtype=torch.float32, device=q.device)
    if q.is_meta:
        compile_in_rehearsal("kernels.decode_hopper.decode", repr(shape), kernel.compile)
    if q.is_meta or num_seqs == 0:
        return out
    assert work.config.tile == TILE and q.stride(2) == 1 and q.stride(0) % 2 == 0 and q.stride(1) % 2 == 0
    pointer, integer, number = ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong
    assert k_cache.data_ptr() % 16 == 0 and v_cache.data_ptr() % 16 == 0
    added = (new.k, new.v, new.cos_sin) if new is not None else (q, q, q)  # of which nothing is read then
    caches = (k_cache, v_cache)
    tensors = (*caches, q, *added, block_tables, context_lens, work.plan, work.arrived, partial, partial_ml, out)
    cut = (num_seqs, work.num_slices, work.config.start_tiles)
    written = BESIDE_PREFILL if beside_prefill else BEHIND_GATE if behind_gate else 0
    values = (*cut, k_cache.shape[1], work.sliding_window, into is not None, written)
    rows = (added[0], added[2], *caches, block_tables)
    strides = (*q.stride()[:2], *(tensor.stride(0) for tensor in rows), *out.stride()[:2])
    arguments = [
        *(pointer(tensor.data_ptr()) for tensor in tensors),
        *(integer(value) for value in values),
        ctypes.c_float(scale * LOG2E),
        *(number(stride) for stride in strides),
        ctypes.c_uint64(FIRST_OUT),
    ]
    kernel.launch(q.device, work.num_slices, arguments, dependent=bool(dependent_launch(q)["PDL"]))
    return out
