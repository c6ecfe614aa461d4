from __future__ import annotations

import pytest

from engine.executor import CacheCapacity


def test_the_smallest_rank_bounds_the_cache() -> None:
    ranks = [CacheCapacity(90, 16, 7), CacheCapacity(100, 16, 5)]
    assert CacheCapacity.least(ranks) == CacheCapacity(90, 16, 5)
    assert CacheCapacity.least(ranks[:1]) == ranks[0]


def test_ranks_that_disagree_on_the_block_size() -> None:
    with pytest.raises(AssertionError, match="block size"):
        CacheCapacity.least([CacheCapacity(90, 16), CacheCapacity(90, 32)])
