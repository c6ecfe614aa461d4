"""Rank: one worker actor of an engine, as its driver sees it: where it is, what was asked of it, whether it lives."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import msgspec
import ray

from cluster.processes import end_process, process_state
from cluster.worker_actor import RankFacts
from engine.executor import CacheCapacity

ANSWER_TIMEOUT_S = 5.0
"""Long enough for a process that holds its interpreter, or waits for a core; a stopped one is recognised at once."""
ANSWER_LOOKS = 10
STOPPED_LOOKS = 2
"""A debugger stops a process for a moment."""


class Rank(msgspec.Struct):
    """One worker actor."""

    actor: Any
    told: Any = None
    """Its call of `facts`, until it is read."""
    facts: RankFacts | None = None
    capacity: CacheCapacity | None = None
    """What its cache holds, once it is allocated."""
    loop: Any = None
    """Its run_loop task."""
    resting: bool = False
    """It outlived a failure, and nothing was asked of it since."""
    asked: Any = None
    """A call of `progress` that is not read yet."""
    asked_s: float = 0.0
    looks: int = 0
    """How often its answer was looked for since."""
    stops: int = 0
    """At how many looks in a row its process was stopped."""

    def ask(self, now_s: float) -> None:
        """Ask how far it is; `asked` will hold the answer."""
        self.asked, self.asked_s, self.looks = self.actor.progress.remote(), now_s, 0

    def is_frozen(self, node_id: str) -> bool:
        """Whether its process is stopped (seen from its own node), or has not answered for a while. Never blocks."""
        self.stops = self.stops + 1 if self._is_stopped(node_id) else 0
        if self.stops >= STOPPED_LOOKS:
            return True
        self.looks += 1
        late = self.asked is not None and time.monotonic() - self.asked_s > ANSWER_TIMEOUT_S
        # Several looks: this process may have been held up itself.
        return late and self.looks >= ANSWER_LOOKS and not ray.wait([self.asked], timeout=0)[0]

    def _is_stopped(self, node_id: str) -> bool:
        facts = self.facts
        return facts is not None and facts.node_id == node_id and process_state(facts.pid) in ("T", "t")

    def rest(self) -> None:
        """Note that its loop is over and that it goes on with another."""
        self.loop = self.asked = None
        self.resting = True

    def end(self, node_id: str, patience_s: float) -> None:
        """Kill the actor. On its own node, wait until the process is gone, with SIGKILL after `patience_s`."""
        with contextlib.suppress(Exception):
            ray.kill(self.actor)
        if self.facts is not None and self.facts.node_id == node_id:
            end_process(self.facts.pid, patience_s)
