"""RankLauncher: starts the worker processes of one engine in their places, ranks and spares."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cluster.actors import free_name
from cluster.placement import Bundle, Placement, rank_bundle
from cluster.worker_actor import MantaWorker, actor_class, environment, spare_class
from engine.config import EngineConfig
from engine.model_config import ModelConfig


@dataclass(frozen=True)
class RankLauncher:
    """What the processes of an engine called `name` have in common.

    With the name of a `driver` they outlive the process that started them: see cluster.adoption.
    """

    name: str
    config: EngineConfig
    model_config: ModelConfig
    placement: Placement
    driver: str = ""
    worker_class: type[MantaWorker] = MantaWorker

    @cached_property
    def _rank_class(self) -> Any:
        return actor_class(self.worker_class)

    @cached_property
    def _spare_class(self) -> Any:
        return spare_class(self.worker_class)

    def start_ranks(self) -> list[Any]:
        """Start an actor for every rank, for the RankGroup of a driver that is to come.

        Processes and their imports take seconds, the driver's too: so they take them at the same time.
        """
        return [self.start_rank(rank) for rank in range(self.config.tensor_parallel_size)]

    def start_rank(self, rank: int) -> Any:
        """A new actor for a rank, in its place, with its resources."""
        return self._start(self._rank_class, f"{self.name}:rank{rank}", rank, place=rank)

    def start_spare(self, place: int) -> Any:
        """A new spare in the place of a rank, from which it takes nothing."""
        return self._start(self._spare_class, f"{self.name}:spare", None, place=place)

    def _start(self, kind: Any, name: str, rank: int | None, *, place: int) -> Any:
        resources: Bundle = {"CPU": 0.0} if rank is None else rank_bundle(self.config)
        return kind.options(
            name=free_name(name),
            num_cpus=resources["CPU"],
            num_gpus=resources.get("GPU", 0),
            scheduling_strategy=self.placement.strategy(place),
            runtime_env={"env_vars": environment(self.config)},
            max_restarts=0,
            lifetime="detached" if self.driver else None,
        ).remote(name, self.config, self.model_config, rank, self.driver)
