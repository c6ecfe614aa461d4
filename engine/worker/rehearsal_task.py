"""Task: what a rehearsal is given, as it crosses to its process. Imports no torch: whoever starts one has no time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.config import EngineConfig
from engine.model_config import ModelConfig


@dataclass(frozen=True)
class Task:
    """A rehearsal of one engine."""

    config: EngineConfig
    """Resolved."""
    model_config: ModelConfig
    stamp: Path
    """Written at the end; it says what was compiled."""
    begun_s: float
    """By the clock on the wall."""
    chip: tuple[tuple[int, int], int] | None = None
    """Compute capability and multiprocessors; None: this machine's first GPU's."""
    workers: int | None = None
    """Processes at a time; None: by the number of cores."""
