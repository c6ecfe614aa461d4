from __future__ import annotations

import pytest

from cluster.spares import spares_wanted
from engine.config import EngineConfig

NODES = ["a", "a", "b"]
"""Of three ranks."""


@pytest.mark.parametrize(
    ("device", "warm_spares", "wanted"),
    [
        ("cuda", None, {"a": 2, "b": 1}),  # a GPU's rank is replaced by a process of its own
        ("cpu", None, {"a": 1, "b": 1}),
        ("cuda", 3, {"a": 3, "b": 3}),
        ("cpu", 0, {"a": 0, "b": 0}),
    ],
)
def test_spares_wanted(device: str, warm_spares: int | None, wanted: dict[str, int]) -> None:
    config = EngineConfig.from_args(model="m", device=device, warm_spares=warm_spares)
    assert spares_wanted(config, NODES) == wanted
