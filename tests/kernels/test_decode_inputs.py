"""A decode step's inputs and outputs: the definitions against loops, the Triton kernels against the definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.decode_inputs import DecodeInputs, append_tokens, gather_inputs, set_blocks
from kernels.registry import force, interpreting

IMPLEMENTATIONS = ["torch", pytest.param("triton", marks=pytest.mark.skipif(not interpreting(), reason="interpreter"))]
SLOTS, WIDTH, BLOCKS, BLOCK_SIZE = 7, 300, 150, 2


def empty_inputs(rows: int) -> DecodeInputs:
    long = [torch.full((rows,), 77, dtype=torch.int64) for _ in range(4)]
    return DecodeInputs(*long, torch.full((rows,), 77, dtype=torch.int32), torch.full((rows, BLOCKS), 77).int())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_inputs_are_read_from_the_mirror(implementation: str) -> None:
    rng = np.random.default_rng(0)
    tokens = torch.from_numpy(rng.integers(0, 1000, (SLOTS, WIDTH)))
    tables = torch.from_numpy(rng.integers(0, 5000, (SLOTS, BLOCKS)).astype(np.int32))
    rows = torch.tensor([4, -1, 0, 6, -1], dtype=torch.int32)
    positions = torch.tensor([0, 9, 299, 17, 3], dtype=torch.int32)
    out = empty_inputs(len(rows))
    with force(implementation):  # type: ignore[arg-type]
        gather_inputs(rows, positions, tokens, tables, BLOCK_SIZE, out)
    for row, (slot, position) in enumerate(zip(rows.tolist(), positions.tolist(), strict=True)):
        if slot < 0:
            assert (out.token_ids[row], out.positions[row], out.cache_slots[row], out.context_lens[row]) == (
                0,
                0,
                -1,
                0,
            )
            continue
        used = position // BLOCK_SIZE + 1
        assert out.token_ids[row] == tokens[slot, position]
        assert out.positions[row] == position and out.next_positions[row] == position + 1
        assert out.context_lens[row] == position + 1
        assert out.cache_slots[row] == tables[slot, used - 1] * BLOCK_SIZE + position % BLOCK_SIZE
        assert torch.equal(out.block_tables[row, :used], tables[slot, :used])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_drawn_tokens_are_appended_and_padding_changes_nothing(implementation: str) -> None:
    tokens = torch.zeros(SLOTS, WIDTH, dtype=torch.int64)
    rows = torch.tensor([4, -1, 0], dtype=torch.int32)
    positions = torch.tensor([0, 9, 298], dtype=torch.int32)
    drawn = torch.zeros(3, dtype=torch.int32)
    with force(implementation):  # type: ignore[arg-type]
        append_tokens(rows, positions, torch.tensor([11, 12, 13]), tokens, drawn)
    assert tokens.nonzero().tolist() == [[0, 299], [4, 1]]
    assert tokens[4, 1] == 11 and tokens[0, 299] == 13
    assert positions.tolist() == [1, 9, 299]
    assert drawn.tolist() == [11, 12, 13]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("count", [1, 16, 140])
def test_blocks_are_set(implementation: str, count: int) -> None:
    tables = torch.zeros(SLOTS, BLOCKS, dtype=torch.int32)
    places = np.random.default_rng(1).permutation(SLOTS * BLOCKS)[:count]
    changes = np.full((3, -(-count // 16) * 16), -1, np.int32)
    changes[:, :count] = places // BLOCKS, places % BLOCKS, np.arange(1, count + 1)
    with force(implementation):  # type: ignore[arg-type]
        set_blocks(tables, torch.from_numpy(changes))
    expected = torch.zeros(SLOTS * BLOCKS, dtype=torch.int32)
    expected[torch.from_numpy(places)] = torch.arange(1, count + 1, dtype=torch.int32)
    assert torch.equal(tables.view(-1), expected)
