"""RankGroup: the worker actors of one engine, from their start to their end, and which of them outlive a failure."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray

from cluster.actors import gather, summary
from cluster.adoption import take_over
from cluster.framing import Ticket
from cluster.placement import wait_for
from cluster.rank import Rank
from cluster.rank_launcher import RankLauncher
from cluster.rank_loop import Progress
from cluster.spares import Spares, spares_wanted
from cluster.worker_actor import RankFacts, purpose_of
from engine.errors import ExecutorDied
from engine.executor import CacheCapacity
from engine.worker.start_log import StartLog

logger = logging.getLogger(__name__)

MEET_TIMEOUT_S = 120.0
SURVIVE_TIMEOUT_S = 2.0
"""How long a rank whose peer died may take to leave its step; then it is replaced too."""
CUT_EVERY_S = 30.0
"""Ranks that lose each other again sooner are all replaced."""


class RankGroup:
    """One actor a rank, in its places. `bring_up` starts those that are missing.

    Actors that the `launcher` starts for a driver, in whose process this is, outlive it for a while: see `adopt`.
    `begun` are the actors of all ranks when somebody has called RankLauncher.start_ranks.
    """

    def __init__(
        self,
        launcher: RankLauncher,
        *,
        load_timeout_s: float = 3600.0,
        on_wait: Callable[[str], None] = lambda _: None,
        begun: Sequence[Any] = (),
        with_spares: bool = False,
    ) -> None:
        self.name, self._config, self._placement = launcher.name, launcher.config, launcher.placement
        self._launcher = launcher
        self._node_id = ray.get_runtime_context().get_node_id()
        self._load_timeout_s = load_timeout_s
        self._on_wait = on_wait
        size = self._config.tensor_parallel_size
        self._ranks: list[Rank | None] = [None] * size
        self._ranks[: len(begun)] = [Rank(actor, told=actor.facts.remote()) for actor in begun]
        self._places: list[RankFacts | None] = [None] * size
        """Where each rank was last."""
        self._cut_s = -CUT_EVERY_S
        """When all were kept last."""
        self._together = False
        """The ranks that are there are all, and their group is whole."""
        self._spares = Spares(self._start_spare)
        self._with_spares = with_spares

    @property
    def ranks(self) -> list[Rank]:
        """All ranks; not while some are missing."""
        ranks = [rank for rank in self._ranks if rank is not None]
        assert len(ranks) == len(self._ranks), "bring_up first"
        return ranks

    @property
    def actors(self) -> list[Any]:
        """All actors, in the order of the ranks; not while some are missing."""
        return [rank.actor for rank in self.ranks]

    @property
    def facts(self) -> list[RankFacts]:
        """Where the ranks that are up are now."""
        return [rank.facts for rank in self._ranks if rank is not None and rank.facts is not None]

    # Up

    def adopt(self) -> None:
        """Take over what a driver of this engine left that died, so that `bring_up` starts only what is missing."""
        legacy = take_over(
            self.name,
            len(self._ranks),
            purpose_of(self._config, self._launcher.model_config),
            self._launcher.driver,
            can_rejoin=self._config.device == "cpu",
        )
        for index, found in enumerate(legacy.ranks):
            if found is not None:
                self._ranks[index] = Rank(found.actor, facts=found.state.facts, capacity=found.state.capacity)
        for found in legacy.spares:
            self._spares.adopt(found.actor, found.state.facts.node_id)
        self._together = legacy.together

    def bring_up(self) -> CacheCapacity:
        """Start the missing ranks, let all meet, and load the new ones; what each of them can hold.

        Waits for resources, and calls `on_wait` about once a second with what is missing, at last with the empty
        string. Raises ResourcesMissing when they do not come, ExecutorDied when a rank fails, and what loading raises.
        """
        began_s, log = time.monotonic(), StartLog()
        self._wait_placed()  # a node may be gone
        log.part("placing")
        kept = [rank for rank in self._ranks if rank is not None and rank.facts is not None]
        self._start_missing()
        ranks = self.ranks
        self._find([rank for rank in ranks if rank.facts is None])
        log.part("processes")
        self._places = [rank.facts for rank in ranks]
        measured = [None] * len(ranks) if self._together else self._meet(ranks)
        self._together = False
        log.part("loading")
        capacity = CacheCapacity.least(held for rank, found in zip(ranks, measured) if (held := found or rank.capacity))
        changed = [rank for rank in ranks if rank.capacity != capacity]
        self._gather("allocating", [(rank, rank.actor.allocate.remote(capacity)) for rank in changed])
        for rank in changed:
            rank.capacity = capacity
        log.part("allocating")
        logger.info(
            "%s: %d ranks ready (%d kept) in %.1f s, %d blocks of %d tokens; %s",
            self.name,
            len(ranks),
            len(kept),
            time.monotonic() - began_s,
            capacity.num_blocks,
            capacity.block_size,
            log,
        )
        return capacity

    def _meet(self, ranks: list[Rank]) -> list[Any]:
        """Let all meet, and the new ones load: what these measured, None for the others."""
        meeting = self._meeting()
        for rank in ranks:
            rank.resting = False
        calls = [
            (rank, (rank.actor.load if rank.capacity is None else rank.actor.rejoin).remote(meeting, MEET_TIMEOUT_S))
            for rank in ranks
        ]
        return self._gather("loading", calls)

    def open_loops(self, tickets: list[Ticket | None]) -> None:
        """Start every rank's loop, and then the spares that are missing."""
        for index, (rank, ticket) in enumerate(zip(self.ranks, tickets)):
            rank.loop = rank.actor.run_loop.options(name=f"{self.name}:rank{index}").remote(ticket)
        if self._with_spares:
            self._spares.refill(spares_wanted(self._config, [facts.node_id for facts in self.facts]))

    def _find(self, new: list[Rank]) -> None:
        """Wait until the new ranks have processes, and note where.

        That a node is lost may show only now: then for resources again. Where there is room, all it takes is time, and
        on a busy machine that may be long: nothing is missing, and nobody is told so.
        """
        began_s = time.monotonic()
        refs = [rank.told for rank in new]
        while refs and len(ray.wait(refs, num_returns=len(refs), timeout=1.0)[0]) < len(refs):
            self._wait_placed()
            if time.monotonic() - began_s >= self._load_timeout_s:
                raise ExecutorDied(f"the ranks' processes did not start in {self._load_timeout_s:g} s")
        for rank, facts in zip(new, self._gather("starting", list(zip(new, refs)))):
            rank.facts = facts

    def _wait_placed(self) -> None:
        wait_for(self._placement.group, name=self.name, timeout_s=self._config.resources_timeout_s, tell=self._on_wait)

    def _start_missing(self) -> None:
        """Give every rank a process: a spare of its node where there is one, else a new one."""
        nodes: list[str] = []
        for index, rank in enumerate(self._ranks):
            if rank is not None:
                continue
            place, name = self._places[index], f"{self.name}:rank{index}"
            nodes = nodes or self._placement.rank_nodes(len(self._ranks))
            # On a GPU, a spare needs the one that its predecessor had.
            if place is not None and place.node_id == nodes[index]:
                spare = self._spares.take(place.node_id, index, name, place.gpu_ids)
                if spare is not None:
                    self._ranks[index] = Rank(spare[0], told=spare[1])
                    continue
            actor = self._launcher.start_rank(index)
            self._ranks[index] = Rank(actor, told=actor.facts.remote())

    def _start_spare(self, node_id: str) -> Any:
        place = [facts.node_id for facts in self.facts].index(node_id)
        return self._launcher.start_spare(place)

    def _meeting(self) -> str:
        """Where the ranks meet: served by rank 0, on loopback when all are on one node."""
        first, one_node = self.ranks[0], len({facts.node_id for facts in self.facts}) == 1
        assert first.facts is not None
        try:
            address: str = ray.get(
                first.actor.free_address.remote("127.0.0.1" if one_node else first.facts.node_ip), timeout=30
            )
        except Exception as error:
            raise ExecutorDied(f"rank 0 failed before the ranks met: {summary(error)}", ranks=(0,)) from error
        return address

    def _gather(self, what: str, calls: list[tuple[Rank, Any]]) -> list[Any]:
        """The results of one call a rank. Raises as actors.gather."""
        numbered = [(self._ranks.index(rank), ref) for rank, ref in calls]
        return gather(self.name, what, numbered, self._load_timeout_s)

    # While they run

    def ended(self) -> tuple[int, str] | None:
        """A rank whose loop is over, and why: it died, or a step failed."""
        loops = {rank.loop: index for index, rank in enumerate(self._ranks) if rank is not None and rank.loop}
        done, _ = ray.wait(list(loops), num_returns=len(loops), timeout=0) if loops else ([], [])
        for ref in done:
            try:
                return loops[ref], str(ray.get(ref))
            except Exception as error:
                return loops[ref], summary(error)
        return None

    def progress(self) -> list[Progress] | None:
        """What every rank says of itself, once all have answered the last call; asks again. Never blocks."""
        ranks, now_s = self.ranks, time.monotonic()
        answers = None
        asked = [rank.asked for rank in ranks if rank.asked is not None]
        if asked:
            if len(ray.wait(asked, num_returns=len(asked), timeout=0)[0]) < len(asked):
                return None
            with contextlib.suppress(Exception):  # it is dead, and `ended` tells
                answers = ray.get(asked)
        for rank in ranks:
            rank.ask(now_s)
        return answers

    def frozen(self) -> tuple[int, ...]:
        """Ranks whose process is stopped, or has not answered `progress` for a while. Never blocks."""
        return tuple(index for index, rank in enumerate(self.ranks) if rank.is_frozen(self._node_id))

    # Down

    def drop_failed(self, failed: tuple[int, ...], *, keep: bool, cut: bool = False) -> None:
        """After a failure: end the ranks at fault and those that cannot go on; `keep` the others, with their weights.

        The step channel is closed. A rank is kept when its loop comes to its end by itself: on a CPU, its collective
        fails when a peer is gone. A GPU that waits for a dead peer cannot be called back. Where no rank is found at
        fault, all are replaced; but if they were only `cut` off from each other they meet again, once in a while.
        """
        self._together = False
        for index in failed:
            self._end(index, 0.0)
        kept = [index for index, rank in enumerate(self._ranks) if rank is not None and rank.resting]
        if keep and self._config.device == "cpu":
            kept += self._survivors()
        if len(kept) == len(self._ranks):
            now_s = time.monotonic()
            if cut and now_s - self._cut_s > CUT_EVERY_S:
                self._cut_s = now_s
            else:
                kept = []
        for index, rank in enumerate(self._ranks):
            if rank is not None and index not in kept:
                self._end(index, 0.0)
            elif rank is not None:
                rank.rest()

    def _survivors(self) -> list[int]:
        loops = {rank.loop: index for index, rank in enumerate(self._ranks) if rank is not None and rank.loop}
        done, _ = ray.wait(list(loops), num_returns=len(loops), timeout=SURVIVE_TIMEOUT_S) if loops else ([], [])
        alive = []
        for ref in done:
            with contextlib.suppress(Exception):
                ray.get(ref)
                alive.append(loops[ref])
        return alive

    def end(self) -> None:
        """End all ranks; what does not leave by itself in a moment is killed."""
        loops = [rank.loop for rank in self._ranks if rank is not None and rank.loop]
        if loops:
            ray.wait(loops, num_returns=len(loops), timeout=SURVIVE_TIMEOUT_S)
        for index, rank in enumerate(self._ranks):
            if rank is not None:
                self._end(index, 1.0)
        self._spares.end()

    def _end(self, index: int, patience_s: float) -> None:
        rank, self._ranks[index] = self._ranks[index], None
        if rank is not None:
            rank.end(self._node_id, patience_s)
