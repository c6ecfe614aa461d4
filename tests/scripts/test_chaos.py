"""The short form of `python -m scripts.chaos`: every fault once, under load."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from scripts.chaos import parse
from scripts.chaos_site import REPOSITORY

KINDS = [
    f"{how}, {what}" for how in ("HTTP", "HTTP whole", "handle") for what in ("greedy", "sampled", "sampled, n = 2")
]


def test_a_choice_of_faults(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(["--faults", "flood,rank killed"]).faults == ["flood", "rank killed"]
    assert parse(["--roll"]).faults == ["configuration rolled"]
    alone, several = parse([]).faults, parse(["--replicas", "2"]).faults
    assert set(several) - set(alone) == {"replica killed"} and len(alone) == 8
    with pytest.raises(SystemExit):
        parse(["--faults", "flood,earthquake"])
    assert "got earthquake, allowed: rank killed, " in capsys.readouterr().err


@pytest.mark.serve
@pytest.mark.timeout(900)
def test_nothing_is_lost() -> None:
    command = [sys.executable, "-m", "scripts.chaos", "--short", "--seed", "1"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=850, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-8000:]
    figures = dict(re.findall(r"^\| ([^|]+) \| (\d+)", done.stdout, re.MULTILINE))
    assert int(figures["faults injected"]) == 8
    assert int(figures["requests accepted"]) == int(figures["finished identical"]) > 10
    assert all(re.search(rf"[1-9]\d* × {kind}[,\s]", done.stdout) for kind in KINDS), done.stdout
    for name in ("failed with an error", "lost", "blocks leaked", "false alarms"):
        assert figures[name] == "0"
    assert re.search(r"flood's requests \| \d+ answered, [1-9]\d* × 429 with Retry-After, 0 else", done.stdout)
