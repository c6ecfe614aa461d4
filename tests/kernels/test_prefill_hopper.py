"""Prefill attention on Hopper, as far as no GPU is needed: variants that fit the chip, and where it is chosen."""

from __future__ import annotations

import re
from itertools import product

import pytest
import torch
from torch import Tensor

from kernels import hopper, launch, paged_attention, prefill_hopper
from kernels.hopper import SHARED_BYTES
from kernels.launch import Chip, rehearse_on
from kernels.prefill_hopper import ROWS, HopperPrefillConfig, Variant, chosen, variant_kernel, why_not

VARIANTS = [
    Variant(head_dim, block_size, window, False, HopperPrefillConfig(keys))
    for head_dim, block_size, window, keys in product((64, 128), (8, 16, 32), (False, True), (64, 128, 160))
]


@pytest.fixture
def met(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """A process in which the device "meta" is an H200, with a compiler, and the kernel is in use: what is compiled."""
    names: list[tuple[str, str]] = []
    monkeypatch.setattr(launch._Rehearsed, "chip", None)
    monkeypatch.setattr(launch._Rehearsed, "met", None)
    monkeypatch.setattr(prefill_hopper, "ENABLED", True)
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


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_variants_fit_the_chip(variant: Variant) -> None:
    kernel = variant_kernel(variant)
    assert 2 <= variant.stages <= 4 and kernel.shared_bytes <= SHARED_BYTES
    # The swizzle's pattern repeats every 8 rows of 128 bytes; tiles, their panels and each cache block start with it.
    assert variant.q_bytes % 1024 == variant.tile_bytes % 1024 == variant.block_size * 128 % 1024 == 0
    # Scores, probabilities in half the registers, and output of a consumer's thread, of its 240 registers.
    assert variant.config.keys // 2 + variant.config.keys // 4 + variant.head_dim // 2 <= 200
    # A quarter of the registers' threads give up what the other two groups take.
    assert 240 * 2 + 24 <= 65536 // 128


def test_the_source_says_its_variant() -> None:
    text = Variant(128, 16, True, True, HopperPrefillConfig(160)).source()
    assert "#define KEYS 160" in text and "#define WINDOW 1" in text and "#define BLOCK 16" in text
    assert "m64n160k16.f32.f16.f16" in text and "m64n128k16.f32.f16.f16" in text
    products = text.partition("typedef")[0]
    assert len(re.findall(r'"\+f"\(d\[', products)) == 160 // 2 + 128 // 2
    with pytest.raises(AssertionError):
        Variant(128, 64, False, False, HopperPrefillConfig(160)).source()


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


def test_a_rehearsal_meets_the_variant_of_a_call(met: list[tuple[str, str]]) -> None:
    q, k, v = tensors()
    ints = [torch.empty(size, dtype=torch.int32, device="meta") for size in ((3, 9), (3,), (4,))]
    out = paged_attention.prefill(q, k, v, *ints, 2 * ROWS, scale=0.1, sliding_window=70)
    assert out.shape == q.shape and out.is_meta
    assert met == [("kernels.prefill_hopper.attend", repr(Variant(128, 16, True, False)))]
