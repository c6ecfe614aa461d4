"""Where a replica's processes go: placement group bundles, as a pure function of the configuration, then created."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.recovery import RETRY_AFTER_S
from engine.config import EngineConfig
from engine.errors import ConfigError, ResourcesMissing

logger = logging.getLogger(__name__)

Bundle = dict[str, float]

STRATEGY = "PACK"
"""On one node when it has room for all ranks, else over as few as it takes."""
REPLICA_CPUS = 0.1
"""A Serve replica and its driver share bundle 0. Shares are small so that many fit on a small machine: what they
promise is a place, not a core."""
DRIVER_CPUS = 0.1
CPU_RANK_CPUS = 0.2
GPU_RANK_CPUS = 0.5


def rank_bundle(config: EngineConfig) -> Bundle:
    """What one rank needs. `config.device` is resolved."""
    if config.device == "auto":
        raise ConfigError("device", "auto", "cpu or cuda: resolve the configuration before placing it")
    return {"CPU": GPU_RANK_CPUS, "GPU": 1.0} if config.device == "cuda" else {"CPU": CPU_RANK_CPUS}


def rank_bundles(config: EngineConfig) -> list[Bundle]:
    """One bundle a rank."""
    return [rank_bundle(config) for _ in range(config.tensor_parallel_size)]


def bundles(config: EngineConfig) -> list[Bundle]:
    """A whole replica: bundle 0 for the replica and its driver, bundle i + 1 for rank i."""
    return [{"CPU": REPLICA_CPUS + DRIVER_CPUS}, *rank_bundles(config)]


@dataclass(frozen=True)
class Placement:
    """A placement group and where in it the ranks begin."""

    group: PlacementGroup
    first_rank_bundle: int
    owned: bool
    """Made by us: `release` gives it back."""

    def strategy(self, rank: int) -> PlacementGroupSchedulingStrategy:
        """What puts an actor into a rank's bundle."""
        return PlacementGroupSchedulingStrategy(self.group, self.first_rank_bundle + rank)

    def rank_nodes(self, size: int) -> list[str]:
        """The node of each of `size` ranks, by its id."""
        nodes = ray.util.placement_group_table(self.group)["bundles_to_node_id"]
        return [nodes[self.first_rank_bundle + rank] for rank in range(size)]

    def release(self) -> None:
        """Give the group back, if it was made here; whatever runs in it ends."""
        if self.owned:
            remove_placement_group(self.group)


def place(
    config: EngineConfig, group: PlacementGroup | None = None, *, name: str = "manta", timeout_s: float = 600.0
) -> Placement:
    """Find places for the ranks: in `group` (laid out as `bundles` says), or in a new group of their own.

    Waits for resources, telling the log what it waits for. Raises ResourcesMissing after timeout_s, and ConfigError
    for a group with too few bundles.
    """
    needed = rank_bundles(config)
    if group is not None:
        if len(group.bundle_specs) < len(needed) + 1:
            raise ConfigError(
                "tensor_parallel_size", len(needed), f"at most {len(group.bundle_specs) - 1}, the group's rank bundles"
            )
        wait_for(group, name=name, timeout_s=timeout_s)
        return Placement(group, 1, owned=False)
    made = placement_group(needed, strategy=STRATEGY, name=name)
    try:
        wait_for(made, name=name, timeout_s=timeout_s)
    except BaseException:
        remove_placement_group(made)
        raise
    return Placement(made, 0, owned=True)


def wait_for(
    group: PlacementGroup, *, name: str, timeout_s: float, tell: Callable[[str], None] = lambda _: None
) -> None:
    """Block until every bundle of `group` has its place; the log says what is missing, once.

    `tell` is given the same about once a second, and at last the empty string. What it raises ends the wait. Raises
    ResourcesMissing after timeout_s.
    """
    began_s = time.monotonic()
    logged = False
    while not group.wait(1.0):  # shorter waits are cut to none
        waited_s = time.monotonic() - began_s
        missing = f"waiting for resources: {shortage(group)}"
        if waited_s >= timeout_s:
            raise ResourcesMissing(f"{name}: {missing} ({waited_s:.0f} s)", retry_after_s=RETRY_AFTER_S)
        tell(missing)
        if not logged:
            logged = True
            logger.warning("%s: %s; %.0f s at most", name, missing, timeout_s - waited_s)
    tell("")


def shortage(group: PlacementGroup) -> str:
    """ "needs …, cluster has …, free …" """
    needed: Counter[str] = Counter()
    for bundle in group.bundle_specs:
        needed.update({key: float(amount) for key, amount in bundle.items()})
    has, free = ray.cluster_resources(), ray.available_resources()
    return (
        f"needs {_amounts(needed, needed)} in {len(group.bundle_specs)} bundles, "
        f"cluster has {_amounts(has, needed)}, free {_amounts(free, needed)}"
    )


def _amounts(resources: Any, kinds: Any) -> str:
    return ", ".join(f"{resources.get(kind, 0):g} {kind}" for kind in sorted(kinds))
