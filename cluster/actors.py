"""Names of Ray actors, and what their calls raised."""

from __future__ import annotations

import time
from typing import Any

import ray

from engine.errors import ExecutorDied, MantaError


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


def raise_failure(ref: Any, index: int, what: str) -> None:
    """Raise what a call of rank `index` raised, if it did: our own errors as they are, others as ExecutorDied."""
    try:
        ray.get(ref)
    except Exception as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, MantaError):
            raise cause from error
        raise ExecutorDied(f"rank {index} failed while {what}: {summary(error)}", ranks=(index,)) from error
