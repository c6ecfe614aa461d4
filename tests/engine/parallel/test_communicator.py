"""Collectives over gloo and alone; ranks that do not meet, or leave."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from engine.errors import ExecutorDied
from engine.parallel.communicator import Communicator, Gloo, Solo
from engine.parallel.group import connect
from tests.ranks import free_address


def on_ranks(size: int, run: Callable[[Communicator], Any], timeout_s: float = 200.0) -> list[Any]:
    """run(communicator) on every rank of a group, each on a thread; what they return."""
    address = free_address()

    def rank(index: int) -> Any:
        communicator = connect(index, size, address, "cpu", timeout_s)
        assert (communicator.rank, communicator.size) == (index, size)
        try:
            return run(communicator)
        finally:
            communicator.close()

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(rank, range(size)))


def test_one_rank_is_alone() -> None:
    solo = connect(0, 1, "nowhere:1", "cpu")
    assert isinstance(solo, Solo)
    tensor = torch.arange(3.0)
    assert solo.all_reduce(tensor) is tensor and solo.all_gather(tensor, 0) is tensor
    solo.barrier()
    solo.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 3])
def test_all_reduce_is_the_sum_on_every_rank(size: int, dtype: torch.dtype) -> None:
    wanted = torch.full((4, 5), float(sum(range(1, size + 1))), dtype=dtype)
    for found in on_ranks(size, lambda c: c.all_reduce(torch.full((4, 5), c.rank + 1.0, dtype=dtype))):
        assert torch.equal(found, wanted)


def test_all_reduce_gives_every_rank_the_same_bits() -> None:
    def run(communicator: Communicator) -> torch.Tensor:
        generator = torch.Generator().manual_seed(communicator.rank)
        return communicator.all_reduce(torch.randn(1000, generator=generator))

    first, *others = on_ranks(3, run)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_all_gather_is_in_rank_order(dim: int) -> None:
    part = torch.arange(6.0).view(2, 3)
    for found in on_ranks(3, lambda c: c.all_gather((part + 10 * c.rank).t().contiguous().t(), dim)):
        assert torch.equal(found, torch.cat([part, part + 10, part + 20], dim=dim))


def test_groups_of_one_process_do_not_meet() -> None:
    with ThreadPoolExecutor(2) as threads:
        sums = list(
            threads.map(lambda value: on_ranks(2, lambda c: float(c.all_reduce(torch.tensor([value])))), [1.0, 5.0])
        )
    assert sums == [[2.0, 2.0], [10.0, 10.0]]


def test_barrier_waits_for_all() -> None:
    reached: list[int] = []

    def run(communicator: Communicator) -> int:
        reached.append(communicator.rank)
        communicator.barrier()
        return len(reached)

    assert on_ranks(3, run) == [3, 3, 3]


def test_ranks_that_never_come() -> None:
    with pytest.raises(ExecutorDied, match="rank 0 of 2 did not meet the others") as caught:
        Gloo(0, 2, free_address(), timeout_s=0.5)
    assert caught.value.ranks == (0,)


def test_a_rank_that_leaves_fails_the_others() -> None:
    def run(communicator: Communicator) -> object:
        communicator.barrier()
        if communicator.rank == 1:
            return None
        try:
            return communicator.all_reduce(torch.ones(3))
        except ExecutorDied as error:
            return error

    error, _ = on_ranks(2, run)
    assert isinstance(error, ExecutorDied) and "a collective failed" in str(error)
