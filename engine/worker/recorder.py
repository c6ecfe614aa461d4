"""Recorder: functions over static tensors, recorded once as CUDA graphs and replayed."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Recording(NamedTuple):
    """A graph that may be recorded before a step needs it."""

    what: str
    record: Callable[[], None]
    """Records it, unless it is recorded."""


class Recorder:
    """Its graphs share one pool of memory: a replay may overwrite what another's left, but for what they returned.

    On a CPU nothing is recorded: a replay runs the function again, and what it returns goes where the first result is.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if self._is_cuda else None
        self._stream = torch.cuda.Stream(device) if self._is_cuda else None

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Run it once, so that every kernel is compiled, then record it. Returns (replay, what run returned).

        Both come after what is queued, and what is queued later comes after them, also when an error is raised.
        """
        if self._stream is None:
            return _repeat(run)
        self._stream.wait_stream(torch.cuda.current_stream())
        collecting = gc.isenabled()
        try:
            with torch.cuda.stream(self._stream):
                run()
                graph = torch.cuda.CUDAGraph()
                gc.disable()  # freeing a tensor of an older graph would end the recording
                try:
                    graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                    try:
                        result = run()
                    finally:
                        graph.capture_end()
                finally:
                    if collecting:
                        gc.enable()
        finally:
            torch.cuda.current_stream().wait_stream(self._stream)
        return graph.replay, result


def _repeat(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    first = run()

    def replay() -> None:
        first.copy_(run())

    return replay, first
