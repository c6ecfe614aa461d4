"""A decode step's inputs and outputs on the device: read from the mirror of the sequences, and written back to it.

The mirror is `tokens` [S, W] int64, every slot's token ids, and `tables` [S, M] int32, every slot's block table. A row
of the batch names its slot; -1 is a padding row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.registry import jit, kernel, tl


@dataclass
class DecodeInputs:
    """What one decode step of B rows reads; written by `gather_inputs`."""

    token_ids: Tensor  # [B] int64; padding rows: 0
    positions: Tensor  # [B] int64, of those tokens; padding rows: 0
    next_positions: Tensor  # [B] int64, of the tokens to be drawn
    cache_slots: Tensor  # [B] int64, block * block_size + offset; padding rows: -1
    context_lens: Tensor  # [B] int32, the input token included; padding rows: 0
    block_tables: Tensor  # [B, M] int32; entries past the context may be anything


@kernel
def gather_inputs(
    rows: Tensor, positions: Tensor, tokens: Tensor, tables: Tensor, block_size: int, out: DecodeInputs
) -> None:
    """Fill `out` for the token at `positions` of each row's slot.

    rows, positions [B] int32; tokens [S, W] int64; tables [S, M] int32; `out` is mutated.
    """
    slots = rows.clamp(min=0).to(torch.int64)
    at = positions.to(torch.int64)
    real = rows >= 0
    out.token_ids.copy_(torch.where(real, tokens[slots, at], 0))
    out.positions.copy_(torch.where(real, at, 0))
    out.next_positions.copy_(out.positions + 1)
    block = tables[slots, at // block_size].to(torch.int64)
    out.cache_slots.copy_(torch.where(real, block * block_size + at % block_size, -1))
    out.context_lens.copy_(torch.where(real, positions + 1, 0))
    out.block_tables.copy_(tables[slots])


@kernel
def append_tokens(rows: Tensor, positions: Tensor, token_ids: Tensor, tokens: Tensor, drawn: Tensor) -> None:
    """Append each row's drawn token to its slot and step to it.

    rows [B] int32; token_ids [B] int64; tokens [S, W] int64 gets tokens[rows, positions + 1] = token_ids; positions [B]
    int32 grow by one; drawn [B] int32 gets a copy of token_ids. Padding rows change nothing but `drawn`.
    """
    real = rows >= 0
    tokens[rows[real].to(torch.int64), positions[real].to(torch.int64) + 1] = token_ids[real]
    positions += real.to(torch.int32)
    drawn.copy_(token_ids)


@kernel
def set_blocks(tables: Tensor, changes: Tensor) -> None:
    """tables[slot, column] = block for every column (slot, column, block) of changes [3, n] int32; tables is mutated.

    n is a multiple of 16, so that one compiled kernel serves; slots of -1 are padding. No entry is named twice.
    """
    changes = changes[:, changes[0] >= 0]
    tables[changes[0].to(torch.int64), changes[1].to(torch.int64)] = changes[2]


@jit
def _gather_kernel(
    rows, positions, tokens, tables, token_ids, positions_out, next_positions, cache_slots, context_lens, tables_out,
    stride_tokens, stride_tables, stride_out, BLOCK_SIZE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    slot = tl.load(rows + b)
    position = tl.load(positions + b)
    real = slot >= 0
    slot = tl.maximum(slot, 0).to(tl.int64)
    position = tl.where(real, position, 0)
    tl.store(token_ids + b, tl.load(tokens + slot * stride_tokens + position, mask=real, other=0))
    tl.store(positions_out + b, position.to(tl.int64))
    tl.store(next_positions + b, position.to(tl.int64) + 1)
    table = tables + slot * stride_tables
    block = tl.load(table + position // BLOCK_SIZE).to(tl.int64)
    tl.store(cache_slots + b, tl.where(real, block * BLOCK_SIZE + position % BLOCK_SIZE, -1))
    tl.store(context_lens + b, tl.where(real, position + 1, 0))
    num_blocks = tl.where(real, position // BLOCK_SIZE + 1, 0)
    out = tables_out + b.to(tl.int64) * stride_out
    column = tl.arange(0, CHUNK)
    for first in range(0, num_blocks, CHUNK):
        inside = first + column < num_blocks
        tl.store(out + first + column, tl.load(table + first + column, mask=inside, other=0), mask=inside)


@gather_inputs.triton()
def _gather_inputs(
    rows: Tensor, positions: Tensor, tokens: Tensor, tables: Tensor, block_size: int, out: DecodeInputs
) -> None:
    _gather_kernel[(rows.shape[0],)](
        rows, positions, tokens, tables, out.token_ids, out.positions, out.next_positions, out.cache_slots,
        out.context_lens, out.block_tables, tokens.stride(0), tables.stride(0), out.block_tables.stride(0),
        BLOCK_SIZE=block_size, CHUNK=128, num_warps=1,
    )  # fmt: skip


@jit
def _append_kernel(rows, positions, token_ids, tokens, drawn, stride_tokens):
    b = tl.program_id(0)
    slot = tl.load(rows + b)
    position = tl.load(positions + b)
    token = tl.load(token_ids + b)
    real = slot >= 0
    tl.store(tokens + slot.to(tl.int64) * stride_tokens + position + 1, token, mask=real)
    tl.store(positions + b, position + 1, mask=real)
    tl.store(drawn + b, token.to(tl.int32))


@append_tokens.triton()
def _append_tokens(rows: Tensor, positions: Tensor, token_ids: Tensor, tokens: Tensor, drawn: Tensor) -> None:
    _append_kernel[(rows.shape[0],)](rows, positions, token_ids, tokens, drawn, tokens.stride(0), num_warps=1)


@jit
def _set_blocks_kernel(tables, changes, num_changes, stride_tables, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    inside = i < num_changes
    slot = tl.load(changes + i, mask=inside, other=-1).to(tl.int64)
    column = tl.load(changes + num_changes + i, mask=inside, other=0)
    block = tl.load(changes + 2 * num_changes + i, mask=inside, other=0)
    tl.store(tables + slot * stride_tables + column, block, mask=slot >= 0)


@set_blocks.triton()
def _set_blocks(tables: Tensor, changes: Tensor) -> None:
    num_changes = changes.shape[1]
    _set_blocks_kernel[(-(-num_changes // 128),)](tables, changes, num_changes, tables.stride(0), B=128, num_warps=1)
