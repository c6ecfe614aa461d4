"""Counters and histograms of one engine. Plain numbers: who exports them is not their business."""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt

TIME_BOUNDS_S = tuple(float(f"{m}e{e}") for e in range(-4, 3) for m in (1, 2, 5))
"""0.1 ms to 500 s, three a decade."""


class Histogram:
    """Counts of values up to each bound, and their sum. The last count is of values above every bound."""

    def __init__(self, bounds: tuple[float, ...] = TIME_BOUNDS_S) -> None:
        self.bounds = bounds
        self.counts: npt.NDArray[np.int64] = np.zeros(len(bounds) + 1, np.int64)
        self.sum = 0.0
        self._bounds = np.array(bounds)

    def observe(self, value: float) -> None:
        self.counts[int(np.searchsorted(self._bounds, value))] += 1
        self.sum += value

    def observe_many(self, values: npt.NDArray[np.float64]) -> None:
        """Count an array of values at the price of one."""
        where = np.searchsorted(self._bounds, values)
        self.counts += np.bincount(where, minlength=len(self.counts))
        self.sum += float(values.sum())

    @property
    def count(self) -> int:
        return int(self.counts.sum())

    @property
    def mean(self) -> float:
        """NaN before the first value."""
        return self.sum / self.count if self.count else float("nan")

    def quantile(self, share: float) -> float:
        """The bound below which `share` of the values lie; infinity above the last, NaN before the first value."""
        total = self.count
        if not total:
            return float("nan")
        index = int(np.searchsorted(np.cumsum(self.counts), share * total))
        return self.bounds[index] if index < len(self.bounds) else float("inf")


class EngineStats(msgspec.Struct, frozen=True):
    """A look at one engine: what it does now, and counts since it started."""

    running: int
    waiting: int
    num_blocks: int
    free_blocks: int
    """Can be allocated; the cached ones among them."""
    used_blocks: int
    cached_blocks: int
    shared_blocks: int
    saved_blocks: int
    kv_utilization: float
    """Slots filled of those in the blocks of running sequences; 1 when nothing runs."""
    prefix_query_tokens: int
    prefix_hit_tokens: int
    preemptions: int
    steps: int
    generated_tokens: int
    recoveries: int


class EngineMetrics:
    """What an engine counts while it runs. Times in seconds."""

    def __init__(self) -> None:
        self.num_requests = 0
        self.num_aborted = 0
        """Requests of which at least one sample was aborted."""
        self.num_steps = 0
        self.num_recoveries = 0
        self.prompt_tokens = 0
        """Of accepted requests."""
        self.computed_tokens = 0
        """Scheduled, prompts and decodes; what was preempted counts again."""
        self.generated_tokens = 0
        """Read and handed out."""
        self.surplus_tokens = 0
        """Drawn past a stop or an abort, and thrown away."""
        self.finished: dict[str, int] = {"stop": 0, "length": 0, "error": 0}
        """Samples by how they ended."""
        self.queue_s = Histogram()
        """From acceptance to the first step with the request in it."""
        self.first_token_s = Histogram()
        """From acceptance to a sample's first token."""
        self.token_gap_s = Histogram()
        """Between two tokens of a sample."""
        self.step_s = Histogram()
        """What the ranks spent on a step."""
        self.mask_s = Histogram()
        """What computing the masks of a step took, of steps that have any."""
