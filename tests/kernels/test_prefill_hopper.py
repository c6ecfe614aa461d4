"""Prefill attention on Hopper: the kernel's text run on the CPU, variants that fit the chip, and where it is taken."""

from __future__ import annotations

import ctypes
import re
from itertools import accumulate, product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import hopper, launch, paged_attention, paged_decode, prefill_hopper
from kernels.hopper import SHARED_BYTES
from kernels.launch import Chip, rehearse_on
from kernels.paged_decode import DecodeConfig
from kernels.prefill_hopper import KEYS, LOG2E, ROWS, Variant, chosen, variant_kernel, why_not
from tests.kernels.hopper_on_cpu import needs_compiler, pointer, run, tensor_map
from tests.kernels.reference import attention

PARAMETERS = (
    "TensorMap*, TensorMap*, TensorMap*, half_bits*, int*, int*, int*, int*, int, int, int, int, int, int, float, int, "
    "int, u64"
)
VARIANTS = [
    Variant(head_dim, block_size, window, False)
    for head_dim, block_size, window in product((64, 128), (16, 32, 64, 128), (False, True))
]


@pytest.fixture
def met(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """A process in which the device "meta" is an H200, with a compiler, and the kernel is in use: what is compiled."""
    names: list[tuple[str, str]] = []
    monkeypatch.setattr(launch._Rehearsed, "chip", None)
    monkeypatch.setattr(launch._Rehearsed, "met", None)
    monkeypatch.setattr(hopper, "USED", {"prefill"})
    monkeypatch.setattr(hopper, "nvrtc_version", lambda: (12, 8))
    hopper.why_not.cache_clear()
    rehearse_on(Chip((9, 0), 132), lambda *what: names.append(what[:2]))
    yield names  # type: ignore[misc]
    hopper.why_not.cache_clear()
    launch.capability.cache_clear()
    launch.num_multiprocessors.cache_clear()


def tensors(
    head_dim: int = 128, block_size: int = 16, dtype: torch.dtype = torch.bfloat16, device: str = "meta"
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of 300 tokens and 4 heads, and caches of 50 blocks and 2 heads."""
    shape = (50, block_size, 2, head_dim)
    q = torch.empty(300, 4, head_dim, dtype=dtype, device=device)
    return q, torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device)


@needs_compiler
@pytest.mark.parametrize("beside_decodes", [False, True])
@pytest.mark.parametrize(
    ("variant", "heads", "kv_heads", "window", "runs"),
    [
        (Variant(64, 16, False, False), 2, 1, 0, [(130, 130), (0, 0), (140, 20), (1, 1)]),
        (Variant(64, 32, True, False), 1, 1, 70, [(300, 140), (64, 1)]),
        (Variant(128, 16, False, False), 2, 2, 0, [(300, 100)]),
    ],
    ids=str,
)
def test_the_kernel_run_on_a_cpu(
    variant: Variant, heads: int, kv_heads: int, window: int, runs: list[tuple[int, int]], beside_decodes: bool,
    tmp_path: Path,
) -> None:  # fmt: skip
    """Runs are (context, new tokens); rows that are nobody's around them, NaN behind each context."""
    torch.manual_seed(0)
    head_dim, block_size = variant.head_dim, variant.block_size
    num_blocks, before, after = 40, 2, 3
    k, v = (torch.randn(num_blocks, block_size, kv_heads, head_dim).bfloat16() for _ in range(2))
    tables = torch.full((len(runs), 24), 1 << 20, dtype=torch.int32)
    free = torch.randperm(num_blocks).tolist()
    for row, (length, _) in enumerate(runs):
        for i in range(-(-length // block_size)):
            tables[row, i] = free.pop()
        if length % block_size:
            for kept in (k, v):
                kept[tables[row, length // block_size], length % block_size :] = float("nan")
    contexts, new = ([run[i] for run in runs] for i in (0, 1))
    starts = [0, *accumulate(new)]
    context_lens, cu = torch.tensor(contexts, dtype=torch.int32), torch.tensor(starts, dtype=torch.int32) + before
    whole_q = torch.randn(before + starts[-1] + after, heads + 1, head_dim).bfloat16()
    q_late = torch.full_like(whole_q, float("nan"))  # until the kernel in front has ended
    q = whole_q[:, :heads]
    out = torch.full((len(q) + 1, heads, head_dim), -7.0).bfloat16()
    taken = torch.zeros(1, dtype=torch.int32)
    caches = [cache.view(-1, kv_heads * head_dim) for cache in (k, v)]
    rows = q_late.as_strided((len(q), heads * head_dim), (q.stride(0), 1))
    integers = (len(q), len(runs), heads, heads // kv_heads, tables.stride(0), num_blocks * block_size)
    run(
        tmp_path, variant.source(), "attend", PARAMETERS,
        [
            tensor_map(rows, ROWS), *(tensor_map(cache, block_size) for cache in caches),
            *(pointer(tensor) for tensor in (out, tables, context_lens, cu, taken)),
            *(ctypes.c_int(value) for value in integers), ctypes.c_float(0.125 * LOG2E), ctypes.c_int(window),
            ctypes.c_int(beside_decodes), ctypes.c_ulonglong(0),
        ],
        grid=2, cluster=1, threads=384, last=[(q_late, whole_q)], gate=beside_decodes,
    )  # fmt: skip
    expected = attention(q[before : before + starts[-1]], k, v, tables, context_lens, new, 0.125, window)
    found = out[before : before + starts[-1]].double()
    assert (found - expected).norm() / expected.norm() < 4e-3
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)
    assert not out[before + starts[-1] : -1].any(), "rows that are nobody's are zeros"
    assert (out[:before] == -7).all() if beside_decodes else not out[:before].any(), "those in front may be decodes'"
    assert (out[-1] == -7).all(), "the row behind the last was written to"
    assert not taken.any(), "the counter is zero between launches"


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_variants_fit_the_chip(variant: Variant) -> None:
    kernel = variant_kernel(variant)
    assert min(variant.stages[1:]) >= 2 and kernel.shared_bytes <= SHARED_BYTES
    # The swizzle's pattern repeats every 8 rows of 128 bytes; tiles, their panels and each cache block start with it.
    assert variant.q_bytes % 1024 == variant.tile_bytes % 1024 == variant.block_size * 128 % 1024 == 0
    # Scores, probabilities in half the registers, and output: of the 232 registers of a consumer's thread.
    assert KEYS // 2 + KEYS // 4 + variant.head_dim // 2 <= 200
    assert KEYS % variant.block_size == 0
    # What the warpgroups take is what the block was given: 168 registers a thread.
    taken, left = (int(re.search(rf"{what}_registers<(\d+)>", kernel.source)[1]) for what in (" take", " leave"))  # type: ignore[index]
    assert 2 * taken + left == 3 * 168


def test_the_source_says_its_variant() -> None:
    text = Variant(64, 16, True, True).source()
    assert "#define KEYS 128" in text and "#define WINDOW 1" in text and "#define BLOCK 16" in text
    assert "m64n128k16.f32.f16.f16" in text and "m64n64k16.f32.f16.f16" in text
    products = text.partition("typedef")[0]
    assert len(re.findall(r'"\+f"\(d\[', products)) == 128 // 2 + 64 // 2


@pytest.mark.usefixtures("met")
def test_where_it_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(*tensors(), 256, scale=0.1)
    assert not chosen(*tensors(), prefill_hopper.MIN_NEW_TOKENS - 1, scale=0.1)
    assert "soft-capped" in str(why_not(*tensors(), scale=0.1, softcap=20.0))
    assert "not positive" in str(why_not(*tensors(), scale=-0.1))
    assert why_not(*tensors(head_dim=64), scale=0.1) is None
    assert "heads of 96" in str(why_not(*tensors(head_dim=96), scale=0.1))
    assert "blocks of 256" in str(why_not(*tensors(block_size=256), scale=0.1))
    assert "float32" in str(why_not(*tensors(dtype=torch.float32), scale=0.1))
    q, k, v = tensors()
    assert "in pieces" in str(why_not(q, torch.stack([k, v], dim=1)[:, 0], v, scale=0.1))
    assert "in pieces" in str(why_not(q.transpose(0, 1).contiguous().transpose(0, 1), k, v, scale=0.1))
    packed = torch.empty(300, 8 * 128 + 4, dtype=q.dtype, device="meta")[:, : 4 * 128].view(300, 4, 128)
    assert "16 bytes" in str(why_not(packed, k, v, scale=0.1))
    assert "compute capability 9.0" in str(why_not(*tensors(device="cpu"), scale=0.1))
    monkeypatch.setattr(hopper, "nvrtc_version", lambda: (12, 3))
    hopper.why_not.cache_clear()
    assert "libnvrtc" in str(why_not(*tensors(), scale=0.1))


@pytest.mark.usefixtures("met")
def test_it_runs_beside_decodes_where_both_have_kernels_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors()
    many, few = (
        paged_decode.DecodeWork(torch.empty(0), torch.empty(0), 132, config, 0)
        for config in (DecodeConfig(tile=16, hopper=True), DecodeConfig())
    )

    def beside(q: Tensor, work: paged_decode.DecodeWork | None, longest: int = ROWS) -> bool:
        plan = paged_attention.DecodePlan([], work)
        return paged_attention.can_be_beside(q, k.to(q.device), v.to(q.device), plan, longest, scale=0.1)

    assert beside(q, many)
    assert not beside(q, few), "Triton's decode attention waits for what is in front"
    assert not beside(q, None)
    assert not beside(q, many, prefill_hopper.MIN_NEW_TOKENS - 1), "Triton's prefill attention writes zeros in front"
    assert not beside(q.repeat(1, 5, 1), many), "a group of ten"
    monkeypatch.setattr(hopper, "USED", {"decode"})
    assert not beside(q, many)


def test_a_rehearsal_meets_the_variant_of_a_call(met: list[tuple[str, str]]) -> None:
    q, k, v = tensors()
    ints = [torch.empty(size, dtype=torch.int32, device="meta") for size in ((3, 9), (3,), (4,))]
    out = paged_attention.prefill(q, k, v, *ints, 2 * ROWS, scale=0.1, sliding_window=70)
    assert out.shape == q.shape and out.is_meta
    assert met == [("kernels.prefill_hopper.attend", repr(Variant(128, 16, True, False)))]
