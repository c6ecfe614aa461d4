"""Spares: processes that have imported everything and wait to become the rank that dies next."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import ray

from cluster.processes import end_process
from cluster.worker_actor import RankFacts
from engine.config import EngineConfig

logger = logging.getLogger(__name__)

ANSWER_S = 0.3
BECOME_TIMEOUT_S = 2.0


class Spare(msgspec.Struct):
    """One process; it holds no memory of a device."""

    actor: Any
    told: Any
    """Its call of `facts`."""


class Spares:
    """Some processes on every node that has ranks. `start(node_id)` starts one there."""

    def __init__(self, start: Callable[[str], Any]) -> None:
        self._start = start
        self._by_node: dict[str, list[Spare]] = {}

    def adopt(self, actor: Any, node_id: str) -> None:
        """Take one that is there."""
        self._by_node.setdefault(node_id, []).append(Spare(actor, actor.facts.remote()))

    def refill(self, counts: Mapping[str, int]) -> None:
        """Start what is missing of so many a node, and end what is elsewhere. Waits for nothing."""
        for node_id in set(self._by_node) - set(counts):
            for spare in self._by_node.pop(node_id):
                ray.kill(spare.actor)
        for node_id, count in counts.items():
            spares = self._by_node.setdefault(node_id, [])
            spares[:] = [spare for spare in spares if not _is_dead(spare)]
            while len(spares) < count:
                actor = self._start(node_id)
                spares.append(Spare(actor, actor.facts.remote()))

    def take(self, node_id: str, rank: int, name: str, gpu_ids: tuple[str, ...]) -> tuple[Any, Any] | None:
        """Let a spare of that node be a rank: its actor, and its call that gives its facts. None when there is none.

        One that is still starting will be: it has a lead on a process that would be started now.
        """
        spares = self._by_node.get(node_id, [])
        spares.sort(key=lambda spare: not ray.wait([spare.told], timeout=0)[0])
        while spares:
            spare = spares.pop(0)
            starts = not ray.wait([spare.told], timeout=ANSWER_S)[0]
            told = spare.actor.become.remote(rank, name, gpu_ids)
            if starts:
                return spare.actor, told
            try:
                ray.get(told, timeout=BECOME_TIMEOUT_S)
                return spare.actor, told
            except Exception as error:
                logger.warning("a spare of %s does not answer: %s", name, type(error).__name__)
                _end(spare)
        return None

    def end(self) -> None:
        """End all of them."""
        for spares in self._by_node.values():
            for spare in spares:
                _end(spare)
        self._by_node.clear()


def spares_wanted(config: EngineConfig, nodes: Sequence[str]) -> dict[str, int]:
    """How many spares each node gets, given the nodes of the ranks."""
    wanted = config.warm_spares
    replaced = Counter(nodes if config.device == "cuda" else set(nodes))
    return {node_id: count if wanted is None else wanted for node_id, count in replaced.items()}


def _is_dead(spare: Spare) -> bool:
    """Whether it has died, as its last answer tells; asks again, for the next time."""
    if ray.wait([spare.told], timeout=0)[0]:
        try:
            ray.get(spare.told)
        except Exception as error:
            logger.info("a spare died: %s", type(error).__name__)
            return True
        spare.told = spare.actor.facts.remote()
    return False


def _end(spare: Spare) -> None:
    with contextlib.suppress(Exception):
        ray.kill(spare.actor)
    with contextlib.suppress(Exception):
        facts: RankFacts = ray.get(spare.told, timeout=0)
        if facts.node_id == ray.get_runtime_context().get_node_id():
            end_process(facts.pid, 0.0)
