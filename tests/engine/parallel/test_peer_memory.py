"""Which all-reduce runs; the kernels themselves need GPUs and are checked by scripts.check_collectives."""

from __future__ import annotations

import pytest

from engine.errors import ConfigError
from engine.parallel.peer_memory import DATA_BYTES, PACKET_BYTES, choose, forced_method


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
