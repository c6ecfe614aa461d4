"""StartLog: how long each part of a rank's start took."""

from __future__ import annotations

import os
import time
from pathlib import Path


class StartLog:
    """Parts one after another, from the start of the process on, or from now where the process is old."""

    def __init__(self, fresh_s: float = 60.0) -> None:
        """A process of less than fresh_s seconds was started for this: its start and its imports are the first part."""
        self._since_s = time.monotonic()
        self._parts: dict[str, float] = {}
        age_s = process_age_s()
        if age_s < fresh_s:
            self._parts["process and imports"] = age_s

    def part(self, name: str) -> None:
        """What was done since the last part, or since the start, is called `name`."""
        now_s = time.monotonic()
        self._parts[name] = now_s - self._since_s
        self._since_s = now_s

    def __str__(self) -> str:
        return ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self._parts.items())


def process_age_s() -> float:
    """Seconds since this process was started; infinite where the system does not tell."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return float("inf")
