"""Prefill attention on Hopper's matrix units (compute capability 9.0): the launch of prefill_hopper.cu.

Where it runs in place of the Triton kernel is for `why_not` to say: bfloat16 and float16, heads of 64 and 128, caches
that lie whole in blocks of 16 to 128 tokens (a bulk tensor copy takes one block), no soft-cap. How many sequences there
are, how long and where their rows begin it reads on the device.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from kernels.cuda_source import CudaKernel, tensor_map
from kernels.hopper import KEPT, kernel_text, uses
from kernels.hopper import why_not as why_not_device
from kernels.launch import compile_in_rehearsal, dependent_launch, num_multiprocessors

MIN_NEW_TOKENS = 33
"""Where every run of new tokens is shorter, the Triton kernel's smaller tiles waste less.

16 runs of 40 tokens after 1,000 took 51 µs, in Triton 71.
"""
ROWS = 128
"""Queries of a piece of work."""
KEYS = 128
"""Of a tile: a multiple of every block size. With 160 the kernel was slower."""
LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Variant:
    """What one kernel is compiled for."""

    head_dim: int
    block_size: int
    window: bool
    half: bool

    @property
    def q_bytes(self) -> int:
        return ROWS * self.head_dim * 2

    @property
    def tile_bytes(self) -> int:
        """Of a tile of K, or of V."""
        return KEYS * self.head_dim * 2

    @property
    def stages(self) -> tuple[int, int, int]:
        """Of queries, of K and of V: as many as shared memory holds, beside the barriers and the alignment."""
        return (2, 4, 4) if self.head_dim == 64 else (2, 2, 3)

    @property
    def shared_bytes(self) -> int:
        q, k, v = self.stages
        return 1024 + q * (self.q_bytes + 48) + (k + v) * (self.tile_bytes + 16)

    def source(self) -> str:
        """The kernel's text, whole."""
        values = {
            "D": self.head_dim, "KEYS": KEYS, "BLOCK": self.block_size,
            **dict(zip(("Q_STAGES", "K_STAGES", "V_STAGES"), self.stages, strict=True)),
            "WINDOW": int(self.window), "HALF": int(self.half),
        }  # fmt: skip
        return kernel_text("prefill_hopper", values, KEYS, self.head_dim)


@cache
def variant_kernel(variant: Variant) -> CudaKernel:
    return CudaKernel(variant.source(), "attend", threads=384, shared_bytes=variant.shared_bytes)


@cache
def _taken(device: torch.device) -> Tensor:
    """The counter that blocks take pieces by, zero between launches. Those of one device share one stream.

    The first launch is outside of a recording, which would not set it.
    """
    return torch.zeros(1, dtype=torch.int32, device=device)


def why_not(q: Tensor, k_cache: Tensor, v_cache: Tensor, *, scale: float, softcap: float = 0.0) -> str | None:
    """Why the kernel cannot compute this; None where it can."""
    block_size, head_dim = k_cache.shape[1], q.shape[2]
    if softcap > 0 or scale <= 0:
        return "soft-capped scores, or a scale that is not positive"
    if head_dim not in (64, 128) or block_size not in (16, 32, 64, 128):
        return f"heads of {head_dim} in blocks of {block_size}"
    if q.dtype not in (torch.bfloat16, torch.float16) or not q.dtype == k_cache.dtype == v_cache.dtype:
        return f"{q.dtype} over {k_cache.dtype}"
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()) or q.stride()[1:] != (head_dim, 1):
        return "caches, or queries, in pieces"
    if q.stride(0) % 8 or q.data_ptr() % 16 or k_cache.data_ptr() % 16 or v_cache.data_ptr() % 16:
        return "rows that do not start at multiples of 16 bytes"
    if k_cache.shape[0] * block_size >= 1 << 31:
        return "more slots than 32 bits count"
    return why_not_device(q.device)


def chosen(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, max_seqlen_q: int, *, scale: float, softcap: float = 0.0
) -> bool:
    """Whether the engine's call goes to this kernel."""
    if not uses("prefill") or max_seqlen_q < MIN_NEW_TOKENS:
        return False
    return why_not(q, k_cache, v_cache, scale=scale, softcap=softcap) is None


def prefill(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, context_lens: Tensor, cu_seqlens_q: Tensor,
    max_seqlen_q: int, *, scale: float, sliding_window: int = 0, softcap: float = 0.0, beside_decodes: bool = False,
) -> Tensor:  # fmt: skip
    """kernels.paged_attention.prefill, of a call that `why_not` has nothing against."""
    assert softcap == 0 and block_tables.stride(1) == 1
    assert block_tables.dtype == context_lens.dtype == cu_seqlens_q.dtype == torch.int32
    num_rows, num_heads, head_dim = q.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    num_seqs = context_lens.shape[0]
    variant = Variant(head_dim, block_size, sliding_window > 0, q.dtype == torch.float16)
    kernel = variant_kernel(variant)
    out = torch.empty((num_rows, num_heads, head_dim), dtype=q.dtype, device=q.device)
    if q.is_meta:
        compile_in_rehearsal("kernels.prefill_hopper.attend", repr(variant), kernel.compile)
    if q.is_meta or num_rows == 0:
        return out
    pieces = num_heads * min(num_seqs * -(-max_seqlen_q // ROWS), num_rows // ROWS + num_seqs)
    slots = k_cache.shape[0] * block_size
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    tensors = (out, block_tables, context_lens, cu_seqlens_q, _taken(q.device))
    arguments = [
        tensor_map(q.as_strided((num_rows, num_heads * head_dim), (q.stride(0), 1)), ROWS),
        *(tensor_map(cache_.view(slots, num_kv_heads * head_dim), block_size) for cache_ in (k_cache, v_cache)),
        *(pointer(tensor.data_ptr()) for tensor in tensors),
        *(integer(value) for value in (num_rows, num_seqs, num_heads, num_heads // num_kv_heads)),
        integer(block_tables.stride(0)),
        integer(slots),
        ctypes.c_float(scale * LOG2E),
        integer(sliding_window),
        integer(beside_decodes),
        ctypes.c_uint64(KEPT),
    ]
    blocks = max(1, min(pieces, num_multiprocessors(q.device)))
    kernel.launch(q.device, blocks, arguments, dependent=bool(dependent_launch(q)["PDL"]))
    return out
