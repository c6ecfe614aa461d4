"""`python -m scripts.pauses` measures pauses, and finds every token where it was."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from scripts.chaos_site import REPOSITORY


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_pauses_are_measured() -> None:
    few = ["--settle-s", "0", "--max-tokens", "200", "--faults", "rank killed,driver killed"]
    command = [sys.executable, "-m", "scripts.pauses", *few]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-8000:]
    rows = re.findall(r"^\| (\w+ \w+) \| ([\d.]+) s \| (\d) of 2 \| (\d+) of 16 \|$", done.stdout, re.MULTILINE)
    assert [(fault, kept, same) for fault, _, kept, same in rows] == [
        ("rank killed", "1", "16"),
        ("driver killed", "2", "16"),
    ]
    assert all(float(pause) > 0 for _, pause, _, _ in rows)
