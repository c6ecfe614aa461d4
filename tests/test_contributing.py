"""CONTRIBUTING names files: they exist, and its map leaves out none of the packages people work in."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
MAP = TEXT.split("```text\n")[1].split("```")[0]
FILE = re.compile(r"[\w*/]+\.(?:py|cu|h|sh|yaml)\b")
PACKAGES = ("cluster", "deployments", "deployments/http", "engine", "engine/parallel", "engine/worker")


def test_every_file_it_names_exists() -> None:
    files = [path.relative_to(ROOT).as_posix() for top in ROOT.iterdir() for path in ([top] if top.is_file() else [])]
    for top in ("cluster", "configs", "deployments", "engine", "kernels", "scripts", "tests"):
        files += [path.relative_to(ROOT).as_posix() for path in (ROOT / top).rglob("*")]
    names = [name for name in FILE.findall(TEXT) if not re.search("NAME|OPERATION", name)]
    assert len(names) > 100
    assert [name for name in names if not any(fnmatch(f"/{file}", f"*/{name}") for file in files)] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_its_map_knows_every_module(package: str) -> None:
    patterns = {name.rpartition("/")[2] for name in FILE.findall(MAP)}
    modules = [path.name for path in (ROOT / package).glob("*.py") if path.name != "__init__.py"]
    assert [module for module in modules if not any(fnmatch(module, pattern) for pattern in patterns)] == []
