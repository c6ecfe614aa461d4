"""A look at one rank's GPU while it serves: which kernels take the time of some steps, and how busy it is.

MANTA_TRACE=FILE:DECODES:STEPS writes FILE.rankR once: a table of STEPS steps of at least DECODES decodes and nothing
else, taken after as many such steps in a row. It costs nothing while the variable is unset.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from engine.step import StepPlan


class Tracer:
    """Counts steps and records some of them with torch's profiler."""

    def __init__(self, rank: int, setting: str) -> None:
        path, decodes, steps = setting.rsplit(":", 2)
        self._path = Path(f"{path}.rank{rank}")
        self._decodes, self._steps = int(decodes), int(steps)
        self._in_a_row = 0
        self._profile: Any = None
        self._over = False

    def before(self, plan: StepPlan) -> None:
        """Note the step that is about to be queued."""
        if self._over:
            return
        alone = plan.num_decodes >= self._decodes and plan.num_decodes * 4 == len(plan.seq_ids)
        self._in_a_row = self._in_a_row + 1 if alone else 0
        if self._profile is not None and self._in_a_row in (0, 2 * self._steps + 1):
            self._write()
        elif self._in_a_row == self._steps + 1:
            self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self._profile.start()

    def _write(self) -> None:
        torch.cuda.synchronize()
        self._profile.stop()
        self._over = True
        share, totals_us = kernel_times(self._profile)
        lines = [f"{self._steps} steps of {self._decodes} decodes: GPU busy {share:.2%}, ms a step:"]
        lines += [f"{total / self._steps / 1e3:9.4f}  {name}" for name, total in totals_us.items()]
        self._path.write_text("\n".join(lines) + "\n")
        self._profile = None


def make_tracer(rank: int) -> Tracer | None:
    """What MANTA_TRACE asks of this rank; None when it is unset."""
    setting = os.environ.get("MANTA_TRACE")
    return Tracer(rank, setting) if setting else None


def kernel_times(profile: Any) -> tuple[float, dict[str, float]]:
    """Of a stopped torch profile: the share of its span in which the GPU is busy, and µs by kernel, most first."""
    kernels = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in profile.events()
        if str(event.device_type).endswith("CUDA")
    )
    if not kernels:
        return 0.0, {}
    busy, reached, totals = 0.0, kernels[0][0], dict[str, float]()
    for start, stop, name in kernels:
        busy += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
        totals[name] = totals.get(name, 0.0) + stop - start
    return busy / (reached - kernels[0][0]), dict(sorted(totals.items(), key=lambda item: -item[1]))
