"""What a driver that died left behind: rank processes that outlive it, with their weights, and spares."""

from __future__ import annotations

import contextlib
import logging
import time
from typing import Any

import msgspec
import ray
from ray.util import list_named_actors

from cluster.worker_actor import RankState

logger = logging.getLogger(__name__)

ANSWER_S = 3.0
SETTLE_S = 1.0
"""How long the ranks may take to run what the driver had sent; those who are left in a collective are let go then."""
LEAVE_S = 2.0
POLL_S = 0.02


class Found(msgspec.Struct):
    """A worker process that another driver started."""

    actor: Any
    state: RankState


class Legacy(msgspec.Struct):
    """What can be used of what was left."""

    ranks: list[Found | None]
    spares: list[Found]
    together: bool
    """All ranks are there and have run the same plans to their end: their group is as good as new."""


def take_over(name: str, size: int, purpose: str, driver: str, *, can_rejoin: bool) -> Legacy:
    """Find the workers of an engine called `name` whose driver is gone, make them `driver`'s, and end the useless ones.

    `can_rejoin`: ranks can be used, beside new ones, that are not `together`. The driver before is dead: nobody else
    tells these processes what to do.
    """
    found = _ask(workers_of(name))
    useful = {key: one for key, one in found.items() if one is not None and one.state.purpose == purpose}
    if any(one.state.rank is not None for one in useful.values()):
        useful = _settled(useful, can_rejoin=can_rejoin)
    ranks: list[Found | None] = [None] * size
    spares, kept = [], set()
    for key, one in useful.items():
        rank, state = one.state.rank, one.state
        if rank is None:
            spares.append(one)
        elif state.idle and state.capacity is not None and ranks[rank] is None:
            ranks[rank] = one
        else:
            continue
        kept.add(key)
    places = {one.state.at if one is not None else None for one in ranks}
    together = len(places) == 1 and None not in places
    if not together and not can_rejoin:
        kept -= {key for key, one in useful.items() if one.state.rank is not None}
        ranks = [None] * size
    for key, actor in workers_of(name).items():
        if key not in kept:
            with contextlib.suppress(Exception):
                ray.kill(actor)
    for key in kept:
        useful[key].actor.serve.remote(driver)
    if kept:
        count = size - ranks.count(None)
        logger.info("%s: %d of %d ranks are left, %d spares", name, count, size, len(spares))
    return Legacy(ranks, spares, together)


def workers_of(name: str) -> dict[str, Any]:
    """Worker actors of an engine, by their names."""
    actors = {}
    for key in list_named_actors():
        if key.startswith((f"{name}:rank", f"{name}:spare")):
            with contextlib.suppress(ValueError):  # it is just ending
                actors[key] = ray.get_actor(key)
    return actors


def _ask(actors: dict[str, Any]) -> dict[str, Found | None]:
    """What each of them is; None for one that does not answer."""
    calls = {actor.state.remote(): (key, actor) for key, actor in actors.items()}
    found: dict[str, Found | None] = dict.fromkeys(actors)
    done, _ = ray.wait(list(calls), num_returns=len(calls), timeout=ANSWER_S) if calls else ([], [])
    for ref in done:
        key, actor = calls[ref]
        with contextlib.suppress(Exception):
            found[key] = Found(actor, ray.get(ref))
    return found


def _settled(useful: dict[str, Found], *, can_rejoin: bool) -> dict[str, Found]:
    """The same once all ranks' loops are over; those that stay in one, for nobody lets them go, are left out."""
    deadline_s = time.monotonic() + SETTLE_S
    let_go = False
    while any(_runs(one) for one in useful.values()):
        if time.monotonic() > deadline_s:
            if let_go or not can_rejoin:
                break
            for one in useful.values():
                if one.state.idle:
                    one.actor.leave.remote()
            let_go, deadline_s = True, deadline_s + LEAVE_S
        time.sleep(POLL_S)
        asked = _ask({key: one.actor for key, one in useful.items()})
        useful = {key: one for key, one in asked.items() if one is not None}
    return useful


def _runs(one: Found) -> bool:
    return one.state.rank is not None and not one.state.idle
