"""Names of Ray actors, and what their calls gave or raised."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import ray

from engine.errors import ExecutorDied, MantaError

logger = logging.getLogger(__name__)

SAY_EVERY_S = 5.0


def free_name(name: str) -> str:
    """`name`, or with a number behind it while an actor that is ending still holds it."""
    for number in range(1, 1000):
        candidate = name if number == 1 else f"{name}.{number}"
        try:
            ray.get_actor(candidate)
        except ValueError:
            return candidate
    return f"{name}.{time.monotonic_ns()}"


def summary(error: BaseException) -> str:
    """One line of an error that came through Ray."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        return f"{type(cause).__name__}: {cause}"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def gather(name: str, what: str, calls: Sequence[tuple[int, Any]], timeout_s: float) -> list[Any]:
    """The results of calls, each given with the rank that it was made of; tells the log what is slow.

    Raises what a rank raised, or ExecutorDied: also when they take longer than timeout_s.
    """
    began_s, ranks = time.monotonic(), {ref: rank for rank, ref in calls}
    waiting = list(ranks)
    while waiting:
        done, waiting = ray.wait(waiting, num_returns=1, timeout=SAY_EVERY_S)
        for ref in done:
            raise_failure(ref, ranks[ref], what)
        waited_s = time.monotonic() - began_s
        if waiting and waited_s >= timeout_s:
            slow = tuple(ranks[ref] for ref in waiting)
            raise ExecutorDied(f"ranks {slow} did not finish {what} in {timeout_s:g} s", ranks=slow)
        if waiting and not done:
            logger.info("%s: %s: %d of %d ranks left (%.0f s)", name, what, len(waiting), len(calls), waited_s)
    return [ray.get(ref) for _, ref in calls]


def raise_failure(ref: Any, index: int, what: str) -> None:
    """Raise what a call of rank `index` raised, if it did: our own errors as they are, others as ExecutorDied."""
    try:
        ray.get(ref)
    except Exception as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, MantaError):
            raise cause from error
        raise ExecutorDied(f"rank {index} failed while {what}: {summary(error)}", ranks=(index,)) from error
