"""README says what the code does: every key, and commands that exist. Its examples run in test_serve.py."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from deployments.config import REPOSITORY, AppConfig, AutoscalingSection
from deployments.http.asgi import ROUTES

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """README's code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_every_key_has_a_row() -> None:
    rows = " ".join(line.split("|")[1] + line.split("|")[3] for line in README.splitlines() if line.startswith("| `"))
    told = set(re.findall(r"`(\w+)`", rows))
    assert {*AppConfig.model_fields, *AutoscalingSection.model_fields} <= told


def test_every_route_has_a_row() -> None:
    for route in ROUTES:
        if route.path != "/web/{name}":  # what the pages are made of
            path = route.path.replace("{name:path}", "NAME").replace("{id}", "ID")
            assert f" {path}`" in README, route.path


def test_the_error_is_as_printed() -> None:
    command, expected = blocks("text")[0].strip().split("\n", 1)
    arguments = command.removeprefix("$ scripts/run.sh ").split()
    done = subprocess.run(
        [sys.executable, "-m", "scripts.run", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.strip() == expected.strip()


def test_the_offline_example() -> None:
    (program,) = [block for block in blocks("python") if "import LLM" in block]
    (beams,) = [block for block in blocks("python") if "BeamSearchParams" in block]
    done = subprocess.run(
        [sys.executable, "-c", program + beams], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    answer, *found = done.stdout.splitlines()
    assert answer == "17 + 25 = 42"
    assert len(found) == 4 and all("17 + 25 =" in line for line in found)


@pytest.mark.parametrize("name", ["run.sh", "test.sh"])
def test_commands_exist(name: str) -> None:
    assert f"scripts/{name}" in README
    assert (REPOSITORY / "scripts" / name).stat().st_mode & 0o111
