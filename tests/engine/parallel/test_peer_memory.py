"""Which all-reduce runs; the kernels themselves need GPUs and are checked by scripts.bench_collectives."""

from __future__ import annotations

import re

import pytest
import torch

from engine.errors import ConfigError
from engine.parallel.peer_memory import DATA_BYTES, PACKET_BYTES, choose, forced_method, peer_kernel
from kernels.cuda_source import nvrtc


@pytest.mark.parametrize("size", [2, 4, 8])
def test_larger_messages_take_methods_with_more_bandwidth(size: int) -> None:
    order = ["packets", "one_shot", "two_shot", "nccl"]
    chosen = [order.index(choose(1 << bits, size)) for bits in range(4, 30)]
    assert chosen == sorted(chosen)
    assert chosen[0] == 0 and chosen[-1] == 3


@pytest.mark.parametrize("size", [2, 4, 8])
def test_a_method_is_chosen_only_for_what_its_buffers_hold(size: int) -> None:
    for num_bytes in range(16, 20 << 20, 4096 + 16):
        method = choose(num_bytes, size)
        assert method != "packets" or 2 * num_bytes <= PACKET_BYTES
        assert method == "nccl" or num_bytes <= DATA_BYTES


def test_the_environment_forces_a_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MANTA_ALL_REDUCE", raising=False)
    assert forced_method() is None
    monkeypatch.setenv("MANTA_ALL_REDUCE", "two_shot")
    assert forced_method() == "two_shot"
    monkeypatch.setenv("MANTA_ALL_REDUCE", "three_shot")
    with pytest.raises(ConfigError, match=r"MANTA_ALL_REDUCE: 'three_shot': allowed: packets, one_shot"):
        forced_method()


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_rank_has_kernels_of_its_own(dtype: torch.dtype, capability: tuple[int, int]) -> None:
    kernel = peer_kernel(dtype, "one_shot", 1, 2, capability)
    assert kernel is peer_kernel(dtype, "one_shot", 1, 2, capability)
    assert kernel.source != peer_kernel(dtype, "one_shot", 0, 2, capability).source
    assert kernel.source == peer_kernel(dtype, "packets_add_norm", 1, 2, capability).source, "compiled once"
    if nvrtc() is not None:
        assert b"one_shot_add_norm" in kernel.compile()


def test_nothing_is_read_before_the_kernel_in_front_has_ended() -> None:
    """Each kernel begins with enter(), which waits, and touches nothing before."""
    source = peer_kernel(torch.bfloat16, "one_shot", 0, 2, (9, 0)).source
    enter = source.partition("u32 enter(")[2].partition("}")[0]
    order = [enter.index(text) for text in ("launch_dependents", "griddepcontrol.wait", "ld.volatile")]
    assert order == sorted(order)
    bodies = re.findall(r"__global__ void __launch_bounds__\(THREADS\) \w+\([^)]*\) {\n(.*?)\n}", source, re.DOTALL)
    bodies.append(source.partition("void add_norm(")[2].partition("{\n")[2])
    assert len(bodies) == 4
    for body in bodies:
        before = body.partition("enter(state)")[0]
        assert "enter(state)" in body and not re.search(r"\bin\[|load_peer|meet\(|residual\[", before)
