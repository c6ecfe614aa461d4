"""Recordings: a rank's CUDA graphs that are not recorded yet. Some are before its start is over, others while it idles.

A step that needs one of the others first records it itself, which takes 50 ms in the middle of traffic.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import zip_longest
from time import perf_counter
from typing import TypeVar

import torch

from engine.worker.cuda_graphs import DecodeGraphs
from engine.worker.mixed_graphs import MixedGraphs
from engine.worker.recorder import Recording

logger = logging.getLogger(__name__)

Received = TypeVar("Received")

IDLE_S = 0.05
"""A rank is idle once no plan came for so long after its last step. A recording takes about as long: a plan that comes
in the middle of one waits for no longer than it was waited for."""


class Recordings:
    """What is left to record, in order. One thread at a time, the one that runs plans."""

    def __init__(self, left: Iterable[Recording] = ()) -> None:
        self._left = deque(left)
        self._spent_s = 0.0

    def __len__(self) -> int:
        """How many graphs are left; some may have been recorded by a step."""
        return len(self._left)

    @torch.inference_mode()
    def record_next(self) -> bool:
        """Record one graph; whether any is left. Raises what recording it raises, and it is left then."""
        if self._left:
            self._left[0].record()
            self._left.popleft()
        return bool(self._left)

    def record_for(self, limit_s: float) -> None:
        """Record graphs; begin none after limit_s."""
        began_s = perf_counter()
        while self._left and perf_counter() - began_s < limit_s:
            self.record_next()

    def record_while_waiting(
        self,
        receive: Callable[[float | None], Received],
        is_idle: Callable[[], bool],
        has_room: Callable[[], bool],
    ) -> Received:
        """What `receive` gives; graphs are recorded, one at a time, while that lets wait and the device is idle.

        `receive` gets the seconds after which it raises TimeoutError, None once nothing is left to record. What fails
        to be recorded, or would leave the largest step too little memory, is logged, and no other is recorded ahead:
        the step that needs it will try again.
        """
        wait_s = IDLE_S
        while self._left:
            idle = is_idle()
            try:
                return receive(wait_s)
            except TimeoutError:
                pass
            if idle:
                self._record_ahead(has_room)
                wait_s = 0.0
        return receive(None)

    def _record_ahead(self, has_room: Callable[[], bool]) -> None:
        """Record one graph; leave all to the steps that need them if it fails."""
        began_s, what = perf_counter(), self._left[0].what
        try:
            if not has_room():
                raise MemoryError("no more is free than the largest step may take")
            left = self.record_next()
        except Exception as error:
            text = "the CUDA graph of %s cannot be recorded ahead, %d are left to the steps that need them: %s: %s"
            logger.warning(text, what, len(self._left), type(error).__name__, error, exc_info=True)
            self._left.clear()
            return
        self._spent_s += perf_counter() - began_s
        if not left:
            logger.info("every CUDA graph is recorded, the last of them in %.2f s between steps", self._spent_s)


def all_recordings(mixed: MixedGraphs, decodes: DecodeGraphs) -> Iterator[Recording]:
    """Every graph of both, the largest and the smallest first."""
    for mixed_size, size in zip_longest(_ends_first(mixed.sizes), _ends_first(decodes.sizes)):
        if mixed_size is not None:
            yield Recording(f"{mixed_size} tokens", partial(mixed.record, mixed_size))
        if size is not None:
            yield from decodes.recordings(size)


def _ends_first(sizes: list[int]) -> list[int]:
    """Ascending sizes as the last, the first, then the others from the large ones down."""
    return list(dict.fromkeys([sizes[-1], sizes[0], *reversed(sizes)]))
