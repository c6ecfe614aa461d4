"""Paged attention, decode and ragged prefill: the definitions, and Triton, against loops in float64."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from torch import Tensor

from kernels import paged_attention, paged_decode, paged_prefill
from kernels.kv_cache import rotary_and_write_kv
from kernels.paged_attention import decode, plan_decode, prefill
from kernels.paged_decode import DecodeConfig
from kernels.paged_prefill import PrefillConfig
from kernels.registry import Choice, force
from tests.kernels.reference import attention, relative_error

TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
BLOCK_SIZE = 4


def batch(lens: list[int], kv_heads: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys, values, shuffled tables whose unused entries are out of range, and lengths."""
    torch.manual_seed(0)
    width = max(-(-length // BLOCK_SIZE) for length in lens) + 1
    blocks = iter(torch.randperm(len(lens) * width).tolist())
    tables = torch.full((len(lens), width), 1 << 28, dtype=torch.int32)
    for row, length in enumerate(lens):
        for i in range(-(-length // BLOCK_SIZE)):
            tables[row, i] = next(blocks)
    shape = (len(lens) * width, BLOCK_SIZE, kv_heads, dim)
    return torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), tables, torch.tensor(lens, dtype=torch.int32)


LENS = [1, 37, 0, 130, 64, 5]
VARIANTS = [(0, 0.0), (20, 0.0), (0, 3.0), (33, 3.0)]


@pytest.mark.parametrize(
    ("choice", "dtype"),
    [("torch", torch.float32), ("torch", torch.bfloat16), ("triton", torch.float32), ("triton", torch.float16)],
)
@pytest.mark.parametrize(("window", "softcap"), VARIANTS)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 64), (6, 1, 40)])
def test_decode(
    choice: Choice, dtype: torch.dtype, window: int, softcap: float, heads: int, kv_heads: int, dim: int
) -> None:
    k, v, tables, lens = batch(LENS, kv_heads, dim, dtype)
    q = torch.randn(len(LENS), heads + 2, dim).to(dtype)[:, 1:-1]
    expected = attention(q, k, v, tables, lens, [1] * len(LENS), dim**-0.5, window, softcap)
    with force(choice):
        out = decode(q, k, v, tables, lens, scale=dim**-0.5, sliding_window=window, softcap=softcap)
        plan = plan_decode(k, tables, lens, sliding_window=window)
        shared = [
            decode(q, k, v, tables, lens, scale=dim**-0.5, sliding_window=window, softcap=softcap, plan=plan)
            for _ in range(2)
        ]
    assert out.dtype == dtype and out.shape == q.shape
    assert relative_error(out, expected) < TOLERANCE[dtype]
    assert not out[2].any()
    assert all(torch.equal(again, out) for again in shared)


@pytest.mark.parametrize("choice", ["torch", "triton"])
def test_decode_into_rows_of_others(choice: Choice) -> None:
    k, v, tables, lens = batch(LENS, 2, 64, torch.float32)
    q, into = torch.randn(len(LENS), 4, 64), torch.randn(len(LENS), 4, 64)
    before = into.clone()
    with force(choice):
        expected = decode(q, k, v, tables, lens, scale=0.1)
        out = decode(q, k, v, tables, lens, scale=0.1, into=into)
    assert out.data_ptr() == into.data_ptr()
    assert torch.equal(out[lens > 0], expected[lens > 0]) and torch.equal(out[lens == 0], before[lens == 0])


@pytest.mark.parametrize("dim", [96, 128, 256])
def test_large_heads(dim: int) -> None:
    k, v, tables, lens = batch([19, 50], 1, dim, torch.float32)
    q = torch.randn(2, 2, dim)
    expected = attention(q, k, v, tables, lens, [1, 1], dim**-0.5)
    with force("triton"):
        assert relative_error(decode(q, k, v, tables, lens, scale=dim**-0.5), expected) < 1e-6
    new = torch.randn(9 + 30, 2, dim)
    expected = attention(new, k, v, tables, lens, [9, 30], dim**-0.5)
    cu = torch.tensor([0, 9, 39], dtype=torch.int32)
    with force("triton"):
        assert relative_error(prefill(new, k, v, tables, lens, cu, 30, scale=dim**-0.5), expected) < 1e-6


@pytest.mark.parametrize(
    ("slices_a_processor", "min_tiles", "start_tiles", "padding"),
    [(1, 1, 1, 0), (1, 3, 0, 11), (3, 1, 1, 11), (3, 3, 4, 0), (16, 1, 1, 11), (16, 3, 0, 0), (64, 1, 4, 30)],
)
def test_decode_is_the_same_however_it_is_sliced(
    slices_a_processor: int, min_tiles: int, start_tiles: int, padding: int
) -> None:
    context_lens = [*LENS, *[0] * padding]
    k, v, tables, lens = batch(context_lens, 2, 32, torch.float32)
    q = torch.randn(len(context_lens), 4, 32)
    expected = attention(q, k, v, tables, lens, [1] * len(context_lens), 0.2)
    config = DecodeConfig(16, 4, 2, slices_a_processor, min_tiles, start_tiles)
    work = paged_decode.make_work(k, lens, 0, config)
    out = paged_decode.decode(q, k, v, tables, lens, scale=0.2, softcap=0.0, work=work)
    assert relative_error(out, expected) < 1e-6
    assert not work.arrived.any(), "the counters are not back at zero"


@pytest.mark.parametrize("start_tiles", [0, 1, 3])
def test_slices_are_equal_and_cover_every_tile_once(start_tiles: int) -> None:
    lens = torch.tensor([700, 1, 0, 64, 65, 3000, 0, 0], dtype=torch.int32)
    k = torch.empty(1, BLOCK_SIZE, 2, 32)
    config = DecodeConfig(tile=64, programs_per_multiprocessor=5, start_tiles=start_tiles)
    work = paged_decode.make_work(k, lens, 0, config)
    plan, slices, live = work.plan.tolist(), work.num_slices, 6
    units = [start_tiles + max(1, -(-n // 64)) for n in lens.tolist()[:live]]
    before = [0, *accumulate(units)]
    assert plan[1] == live, "what lies behind the last context is nobody's work"
    assert plan[2 + 2 * slices :][:live] == [start_tiles + b for b in before[:-1]]
    per_slice = plan[0]
    assert per_slice == -(-sum(units) // slices)
    for g in range(slices):
        place = min(g * per_slice, sum(units))
        if place < sum(units):
            seq = max(b for b in range(live) if before[b] <= place)
            assert (plan[2 + g], plan[2 + slices + g]) == (seq, place - before[seq] - start_tiles)
        else:
            assert plan[2 + g] == live


def test_rotary_decode_rotates_writes_and_decodes() -> None:
    """Against its parts; padding rows in between, a context that begins a block."""
    context_lens = [40, 0, 1, BLOCK_SIZE + 1, 100, 0]
    k, v, tables, lens = batch(context_lens, 2, 32, torch.float32)
    qkv, cos_sin = torch.randn(6, 8, 32), torch.rand(128, 32)
    q, new_k, new_v = qkv[:, :4], qkv[:, 4:6], qkv[:, 6:]
    slots = [int(tables[b, (n - 1) // BLOCK_SIZE]) * BLOCK_SIZE + (n - 1) % BLOCK_SIZE if n else -1
             for b, n in enumerate(context_lens)]  # fmt: skip
    wanted_k, wanted_v = k.clone(), v.clone()
    positions = torch.tensor([max(n - 1, 0) for n in context_lens])
    rotated = rotary_and_write_kv(q, new_k, new_v, cos_sin, positions, wanted_k, wanted_v, torch.tensor(slots))
    wanted = paged_attention.decode(rotated, wanted_k, wanted_v, tables, lens, scale=0.2)
    out = paged_attention.rotary_decode(q, new_k, new_v, cos_sin, k, v, tables, lens, scale=0.2)
    torch.testing.assert_close(out, wanted)
    assert torch.equal(k, wanted_k) and torch.equal(v, wanted_v)


RUNS = [(1, 1), (37, 20), (5, 0), (130, 70), (64, 64), (90, 1), (16, 3)]  # (context, new tokens)


@pytest.mark.parametrize(
    ("choice", "dtype"),
    [("torch", torch.float32), ("torch", torch.bfloat16), ("triton", torch.float32), ("triton", torch.float16)],
)
@pytest.mark.parametrize(("window", "softcap"), VARIANTS)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 64), (1, 1, 40)])
def test_prefill(
    choice: Choice, dtype: torch.dtype, window: int, softcap: float, heads: int, kv_heads: int, dim: int
) -> None:
    k, v, tables, lens = batch([context for context, _ in RUNS], kv_heads, dim, dtype)
    new = [count for _, count in RUNS]
    cu = torch.tensor([0, *accumulate(new)], dtype=torch.int32)
    padding = 3
    q = torch.randn(sum(new) + padding, heads, dim).to(dtype)
    expected = attention(q, k, v, tables, lens, new, dim**-0.5, window, softcap)
    with force(choice):
        out = prefill(q, k, v, tables, lens, cu, max(new), scale=dim**-0.5, sliding_window=window, softcap=softcap)
    assert out.dtype == dtype
    assert relative_error(out, expected) < TOLERANCE[dtype]
    assert not out[sum(new) :].any()


@pytest.mark.parametrize(("block_m", "block_n"), [(16, 16), (16, 64), (64, 16)])
@pytest.mark.parametrize("window", [0, 5, 40])
def test_prefill_is_the_same_in_any_tiles(block_m: int, block_n: int, window: int) -> None:
    k, v, tables, lens = batch([context for context, _ in RUNS], 1, 16, torch.float32)
    new = [count for _, count in RUNS]
    cu = torch.tensor([0, *accumulate(new)], dtype=torch.int32)
    q = torch.randn(sum(new), 1, 16)
    expected = attention(q, k, v, tables, lens, new, 0.25, window)
    config = PrefillConfig(block_m, block_n, 4, 2)
    out = paged_prefill.prefill(q, k, v, tables, lens, cu, max(new), scale=0.25, sliding_window=window, config=config)
    assert relative_error(out, expected) < 1e-6


def test_interleaved_caches() -> None:
    """Keys and values as two planes of one tensor, blocks apart."""
    k, v, tables, lens = batch([9, 30], 2, 16, torch.float32)
    both = torch.stack([k, v], dim=1)
    q = torch.randn(2, 4, 16)
    for choice in ("torch", "triton"):
        with force(choice):  # type: ignore[arg-type]
            apart = decode(q, k, v, tables, lens, scale=0.25)
            together = decode(q, both[:, 0], both[:, 1], tables, lens, scale=0.25)
        torch.testing.assert_close(apart, together, rtol=0, atol=1e-6)


def test_the_definition_gathers_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    lens_list = [5, 300, 17, 120, 0, 60] * 7
    k, v, tables, lens = batch(lens_list, 1, 8, torch.float32)
    q = torch.randn(len(lens_list), 2, 8)
    monkeypatch.setattr(paged_attention, "GATHER_BYTES", 4096)
    plan = plan_decode(k, tables, lens)
    assert len(plan.chunks) > 5
    rows = torch.cat([chunk.rows for chunk in plan.chunks if chunk.rows is not None])
    assert rows.sort().values.tolist() == list(range(len(lens_list)))
    expected = attention(q, k, v, tables, lens, [1] * len(lens_list), 0.3)
    assert relative_error(decode(q, k, v, tables, lens, scale=0.3, plan=plan), expected) < 1e-6


@pytest.mark.parametrize("choice", ["torch", "triton"])
def test_heads_that_do_not_divide_are_refused(choice: Choice) -> None:
    k, v, tables, lens = batch([3], 2, 8, torch.float32)
    with force(choice), pytest.raises(ValueError, match="3 query heads are not a multiple of 2"):
        decode(torch.randn(1, 3, 8), k, v, tables, lens, scale=1.0)


def test_what_triton_refuses() -> None:
    k = torch.empty(1, BLOCK_SIZE, 1, 512)
    assert decode.supports is not None
    assert decode.supports(torch.empty(1, 1, 512), k, k) == "head size 512 is over 256"
    strided = torch.empty(1, BLOCK_SIZE, 8, 2).transpose(2, 3)
    assert "not contiguous" in str(decode.supports(torch.empty(1, 2, 8), strided, strided))
