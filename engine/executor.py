"""Executor: the seam between the engine, which decides, and the ranks, which compute."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future
from typing import Protocol

import msgspec

from engine.step import StepMasks, StepPlan, StepResult


class CacheCapacity(msgspec.Struct, frozen=True):
    """What the ranks can hold: the least of any rank."""

    num_blocks: int
    """KV blocks on the device."""
    block_size: int
    """Tokens a block."""
    num_host_blocks: int = 0

    @classmethod
    def least(cls, ranks: Iterable[CacheCapacity]) -> CacheCapacity:
        """What every rank can hold, given what each of them can; at least one."""
        block_sizes, blocks, host_blocks = zip(*((r.block_size, r.num_blocks, r.num_host_blocks) for r in ranks))
        assert len(set(block_sizes)) == 1, f"ranks disagree on the block size: {block_sizes}"
        return cls(num_blocks=min(blocks), block_size=block_sizes[0], num_host_blocks=min(host_blocks))


class Executor(Protocol):
    """Runs step plans on some set of ranks."""

    def start(self) -> CacheCapacity:
        """Load the model on every rank and allocate the cache. Raises ConfigError or ModelLoadError."""
        ...

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        """Queue a plan behind those submitted before. The future raises ExecutorDied if a rank fails."""
        ...

    def send_masks(self, masks: StepMasks) -> None:
        """Give the last submitted plan the masks it awaits. Must come before the next submit."""
        ...

    def check(self) -> None:
        """Raise ExecutorDied if a rank is known to be dead or stuck."""
        ...

    def restart(self) -> CacheCapacity:
        """Replace what died and begin a new epoch: every rank has forgotten every sequence and every block."""
        ...

    def shutdown(self) -> None:
        """End the ranks. Idempotent; pending futures fail with ExecutorDied."""
        ...
