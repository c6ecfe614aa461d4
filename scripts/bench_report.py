"""Benchmark results: one row a figure, printed as a table and kept as JSON."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One figure. `anchor` is what something else reaches, `limit` the bound that this must keep."""

    case: str
    model: str
    tp: int
    value: float
    unit: str
    anchor: float | None = None
    limit: float | None = None
    lower_is_better: bool = field(default=True, kw_only=True)
    note: str = field(default="", kw_only=True)

    @property
    def verdict(self) -> str:
        """ "ok" or "MISSED" when there is a limit."""
        if self.limit is None:
            return ""
        kept = self.value <= self.limit if self.lower_is_better else self.value >= self.limit
        return "ok" if kept else "MISSED"


_HEADERS = ("case", "model", "tp", "value", "unit", "anchor", "limit", "", "note")
_RIGHT = {"tp", "value", "anchor", "limit"}


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text, one line each under a line of headers."""
    cells = [_HEADERS, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(_HEADERS))]
    lines = []
    for line in cells:
        shown = [
            text.rjust(width) if header in _RIGHT else text.ljust(width)
            for text, width, header in zip(line, widths, _HEADERS)
        ]
        lines.append("  ".join(shown).rstrip())
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    bound = "" if row.limit is None else f"{'<=' if row.lower_is_better else '>='} {row.limit:,g}"
    anchor = "" if row.anchor is None else _number(row.anchor)
    return row.case, row.model, str(row.tp), _number(row.value), row.unit, anchor, bound, row.verdict, row.note


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.4g}"


def save(rows: Sequence[Row], folder: Path = RESULTS) -> Path:
    """Write the rows to <host kind>-<date>.json in `folder`; those of cases measured again that day are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    return merge(rows, folder / f"{host_kind()}-{date.today().isoformat()}.json")


def merge(rows: Sequence[Row], path: Path) -> Path:
    """Write the rows to `path`, a list of them; rows of the same case, model and tp that it holds are replaced."""
    kept = json.loads(path.read_text()) if path.exists() else []
    new = [asdict(row) for row in rows]
    measured = {_key(row) for row in new}
    rows_kept = [row for row in kept if _key(row) not in measured]
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows_kept + new) + "\n]\n")
    return path


def _key(row: dict[str, object]) -> tuple[object, ...]:
    return row["case"], row["model"], row["tp"]


def host_kind() -> str:
    """What kind of machine this is, as a file name: its GPUs, or else its number of cores."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()}x-{torch.cuda.get_device_name(0)}".lower().replace(" ", "-")
    return f"cpu-{len(os.sched_getaffinity(0))}-cores"


def versions() -> dict[str, str]:
    """What the figures were taken with."""
    import torch

    found = {"python": platform.python_version(), "torch": torch.__version__, "date": date.today().isoformat()}
    if torch.cuda.is_available():
        found["gpu"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
        found["cuda"] = str(torch.version.cuda)
    for module in ("triton", "cupy", "ray"):
        if module in sys.modules:
            found[module] = str(sys.modules[module].__version__)
    return found
