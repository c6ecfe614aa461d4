"""Decode attention on Hopper: the kernel's text run on the CPU, and where it is taken."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import decode_hopper, hopper, launch
from kernels.decode_hopper import LOG2E, DecodeShape, NewTokens, shape_kernel, shape_of, unsupported
from kernels.kv_cache import rotary_and_write_kv
from kernels.launch import Chip, rehearse_on
from kernels.paged_attention import decode, plan_decode
from kernels.paged_decode import hopper_config
from tests.kernels.hopper_on_cpu import needs_compiler, pointer, run
from tests.kernels.reference import attention

PARAMETERS = (
    "half_bits*, half_bits*, half_bits*, half_bits*, half_bits*, float*, int*, int*, int*, u32*, float4*, float*, "
    "half_bits*, int, int, int, int, int, int, int, float, long long, long long, long long, long long, long long, "
    "long long, long long, long long, long long, u64"
)


def plan_of(lens: list[int], num_slices: int, window: int, start: int) -> Tensor:
    """What kernels.paged_decode's plan kernel makes of tiles of 16 tokens."""
    live = max(b + 1 for b, n in enumerate(lens) if n)
    units = [start + max(-(-n // 16) - (max(n - window, 0) // 16 if window else 0), 1) for n in lens[:live]]
    before = [sum(units[:b]) for b in range(len(lens))]
    per_slice = -(-sum(units) // num_slices)
    places = [min(g * per_slice, sum(units)) for g in range(num_slices)]
    sequences = [sum(b + n <= place for b, n in zip(before, units, strict=False)) for place in places]
    firsts = [place - before[seq] - start if seq < live else 0 for seq, place in zip(sequences, places, strict=True)]
    return torch.tensor([per_slice, live, *sequences, *firsts, *(b + start for b in before)], dtype=torch.int32)


@needs_compiler
@pytest.mark.parametrize(
    ("written", "rotary"),
    [
        ("nothing", False),
        ("nothing", True),
        ("behind a gate", False),
        ("behind a gate", True),
        ("beside prefill", False),
    ],
)
@pytest.mark.parametrize(
    ("heads", "group", "head_dim", "block_size", "window", "num_slices", "start", "lens"),
    [
        (2, 4, 128, 16, 0, 3, 1, [40, 1, 0, 77, 16]),
        (1, 8, 64, 32, 0, 5, 2, [200, 33, 0, 0, 0, 0, 0, 0]),
        (3, 3, 64, 16, 25, 2, 0, [90, 24, 0, 26, 57, 0]),
        (1, 4, 64, 16, 0, 32, 2, [40, 1, 0, 200, 16, 0]),
    ],
)
def test_the_kernel_run_on_a_cpu(
    heads: int, group: int, head_dim: int, block_size: int, window: int, num_slices: int, start: int,
    lens: list[int], written: str, rotary: bool, tmp_path: Path,
) -> None:  # fmt: skip
    """Sequences cut between slices, one in many, empty ones, NaN behind the last token; bound: rounding.

    The kernel in front writes q and the last tokens, and all else as well when nothing may be read before it has ended;
    beside prefill it writes nothing of what is read. With rotary the last tokens' keys and values are not in the cache
    yet, and nothing is rotated.
    """
    torch.manual_seed(0)
    num_blocks = 40
    k, v = (torch.randn(num_blocks, block_size, heads, head_dim).bfloat16() for _ in range(2))
    whole_q = torch.randn(len(lens), heads * group + 2, head_dim).bfloat16()
    q = whole_q[:, : heads * group]
    tables = torch.full((len(lens), 16), -(2**20), dtype=torch.int32)
    free = torch.randperm(num_blocks).tolist()
    for b, length in enumerate(lens):
        for i in range(-(-length // block_size)):
            tables[b, i] = free.pop()
        if length % block_size:
            for cache in (k, v):
                cache[tables[b, length // block_size], length % block_size :] = float("nan")
    context_lens = torch.tensor(lens, dtype=torch.int32)
    shape = shape_of(q, k, rotary=rotary)
    projected = torch.randn(len(lens), heads * 2 + 1, head_dim).bfloat16()
    new_k, new_v, cos_sin = projected[:, :heads], projected[:, heads : 2 * heads], torch.rand(256, head_dim)
    wanted_q, wanted_k, wanted_v = q, k.clone(), v.clone()
    if rotary:
        last = (context_lens.long() - 1).clamp(min=0)
        slots = tables.long().gather(1, (last // block_size)[:, None])[:, 0] * block_size + last % block_size
        slots[context_lens == 0] = -1
        for cache in (k, v):
            cache.view(-1, heads, head_dim)[slots[slots >= 0]] = float("nan")
        wanted_q = rotary_and_write_kv.definition(q, new_k, new_v, cos_sin, last, wanted_k, wanted_v, slots)
    out = torch.full((len(lens) + 1, heads * group, head_dim), -7.0).bfloat16()
    slots = num_slices * 2 * heads
    partial, partial_ml = torch.full((slots * 8 * head_dim,), float("nan")), torch.full((slots * 16,), float("nan"))
    arrived = torch.zeros(len(lens), heads, dtype=torch.int32)
    plan = plan_of(lens, num_slices, window, start)
    tensors = (k, v, q, new_k, new_v, cos_sin, tables, context_lens, plan, arrived, partial, partial_ml, out)
    strides = (*q.stride()[:2], new_k.stride(0), cos_sin.stride(0), k.stride(0), v.stride(0))
    strides = (*strides, tables.stride(0), *out.stride()[:2])
    writes = []
    behind_gate = written == "behind a gate"
    new = (whole_q, projected) if rotary else (whole_q, k, v)
    for tensor in (*new, *(() if behind_gate else (tables, context_lens, plan))):
        if written == "beside prefill":
            continue
        writes.append((tensor, tensor.clone()))
        if behind_gate and (tensor is k or tensor is v):
            for b, length in enumerate(lens):
                if length:
                    tensor[tables[b, (length - 1) // block_size], (length - 1) % block_size] = float("nan")
        else:
            tensor.fill_(-(2**20))
    run(
        tmp_path.parent, shape.source(), "decode", PARAMETERS,
        [
            *(pointer(tensor) for tensor in tensors),
            *(ctypes.c_int(value) for value in (len(lens), num_slices, start, block_size, window, window > 0)),
            ctypes.c_int(("nothing", "behind a gate", "beside prefill").index(written)),
            ctypes.c_float(0.125 * LOG2E), *(ctypes.c_longlong(stride) for stride in strides), ctypes.c_ulonglong(0),
        ],
        grid=num_slices, cluster=1, threads=32 * heads + 32, last=writes,
    )  # fmt: skip
    expected = attention(wanted_q, wanted_k, wanted_v, tables, context_lens, [1] * len(lens), 0.125, window)
    found = out[:-1].double()
    if window:  # that call keeps rows of no context
        assert (found[context_lens == 0] == -7).all()
        found[context_lens == 0] = 0
    assert (found - expected).norm() / expected.norm() < 4e-3
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)
    for cache, wanted in ((k, wanted_k), (v, wanted_v)):
        torch.testing.assert_close(cache, wanted, atol=0.01, rtol=0.01, equal_nan=True)
    assert (out[-1] == -7).all(), "the row behind the last was written to"
    assert not arrived.any(), "counters are zero between launches"


def test_new_tokens_that_it_cannot_rotate() -> None:
    qkv, cos_sin = torch.empty(5, 12, 64, dtype=torch.bfloat16), torch.empty(100, 64)
    q, k, v = qkv[:, :8], qkv[:, 8:10], qkv[:, 10:]
    cache = torch.empty(3, 16, 2, 64, dtype=torch.bfloat16)
    assert NewTokens(k, v, cos_sin).unsupported(q, cache) is None
    assert "a part of a head" in str(NewTokens(k, v, cos_sin[:, :32]).unsupported(q, cache))
    assert "a part of a head" in str(NewTokens(k, v, cos_sin.half()).unsupported(q, cache))
    assert "another type" in str(NewTokens(k, v, cos_sin).unsupported(q, cache.half()))
    assert "next to each other" in str(NewTokens(qkv[:, 8::2], v, cos_sin).unsupported(q, cache))
    odd = torch.empty(5, 12 * 64 + 1, dtype=torch.bfloat16)
    places = [odd[:, i * 64 : (i + 2) * 64].unflatten(1, (2, 64)) for i in (8, 10)]
    assert "odd places" in str(NewTokens(*places, cos_sin).unsupported(q, cache))


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_blocks_fit_a_multiprocessor(heads: int, head_dim: int) -> None:
    shape = DecodeShape(heads, 4, head_dim)
    assert shape.stages >= 3
    kernel = shape_kernel(shape)
    assert shape.blocks_per_multiprocessor * (kernel.shared_bytes + 1024) <= 228 * 1024
    assert shape.stages * shape.stage_bytes * shape.blocks_per_multiprocessor >= 96 * 1024, "bytes in flight"


def test_what_it_cannot_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_hopper, "why_not", lambda _: None)
    cache = torch.empty(3, 16, 8, 128, dtype=torch.bfloat16)
    assert unsupported(cache) is None
    assert "torch.float32" in str(unsupported(cache.float()))
    assert "heads of 96" in str(unsupported(cache[..., :96]))
    assert "16 key/value heads" in str(unsupported(cache.view(3, 8, 16, 128)))
    assert "blocks of 8" in str(unsupported(cache.view(6, 8, 8, 128)))
    assert "contiguous" in str(unsupported(cache[:, :, :4]))
    monkeypatch.undo()
    assert "compute capability 9.0" in str(unsupported(cache))


def test_it_is_taken_on_hopper_for_many_sequences_once_it_is_enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = torch.empty(3, 16, 4, 128, dtype=torch.bfloat16)
    monkeypatch.setattr(decode_hopper, "why_not", lambda _: None)
    monkeypatch.setattr(hopper, "USED", {"prefill"})
    assert hopper_config(cache, 256) is None
    monkeypatch.setattr(hopper, "USED", {"decode"})
    assert hopper_config(cache, 2) is None
    config = hopper_config(cache, 256)
    assert config is not None and config.tile == 16 and config.programs_per_multiprocessor == 8


def test_a_rehearsal_meets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[tuple[str, str]] = []
    monkeypatch.setattr(launch._Rehearsed, "chip", None)
    monkeypatch.setattr(launch._Rehearsed, "met", None)
    monkeypatch.setattr(hopper, "USED", {"decode"})
    monkeypatch.setattr(decode_hopper, "why_not", lambda _: None)
    monkeypatch.setattr("kernels.paged_decode._plan_kernel", {(5,): lambda *_, **__: None})
    rehearse_on(Chip((9, 0), 132), lambda *what: met.append(what[:2]))
    try:
        meta = {"dtype": torch.bfloat16, "device": "meta"}
        q, k = torch.empty(64, 32, 128, **meta), torch.empty(9, 16, 8, 128, **meta)
        tables, lens = (torch.empty(size, dtype=torch.int32, device="meta") for size in ((64, 5), (64,)))
        plan = plan_decode(k, tables, lens)
        assert plan.work is not None and plan.work.num_slices == 132
        assert decode(q, k, k, tables, lens, scale=1.0, plan=plan).is_meta
    finally:
        launch.capability.cache_clear()
        launch.num_multiprocessors.cache_clear()
        hopper.why_not.cache_clear()
    assert met == [("kernels.decode_hopper.decode", repr(DecodeShape(8, 4, 128)))]
