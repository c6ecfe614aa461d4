"""The walls of the house: who may import whom, and what must not exist."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("kernels", "engine", "cluster", "deployments")
"""From the ground up: each imports itself and those before it."""
FORBIDDEN = {
    "kernels": {"ray", "transformers", "starlette", "pydantic"},
    "engine": {"ray", "starlette", "uvicorn"},
    "cluster": {"starlette", "uvicorn"},
}


def files(floor: str) -> list[Path]:
    return sorted((ROOT / floor).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """(module, line) of every import in a file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield node.module or "", node.lineno


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_go_downward(floor: str) -> None:
    above = set(FLOORS[FLOORS.index(floor) + 1 :]) | {"scripts", "tests"}
    refused = above | FORBIDDEN.get(floor, set())
    assert files(floor), f"{floor} has no files"
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in files(floor)
        for module, line in imports(path)
        if module.partition(".")[0] in refused
    ]
    assert wrong == []


def loaded_after(statement: str) -> set[str]:
    """Top-level modules in a fresh interpreter after `statement`."""
    program = f"{statement}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_engine_needs_no_ray() -> None:
    loaded = loaded_after("import engine; from engine import LLM, SamplingParams")
    assert "engine" in loaded
    assert not loaded & {"ray", "cluster", "deployments", "starlette"}


def test_checking_a_configuration_is_light() -> None:
    """`scripts/run.sh` refuses a bad file in a moment: neither Ray nor torch is loaded for it."""
    assert not loaded_after("import deployments.config") & {"ray", "torch", "transformers"}


def test_kernels_package_is_empty() -> None:
    """Hugging Face has a package of this name: anything in here would be taken for it by transformers."""
    assert (ROOT / "kernels/__init__.py").read_bytes() == b""


def test_transformers_does_not_take_our_kernels_for_theirs() -> None:
    program = "from transformers.utils.import_utils import is_kernels_available as k; print(k())"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_tests_are_no_packages() -> None:
    """tests/kernels/__init__.py would shadow kernels."""
    assert [str(path) for path in (ROOT / "tests").rglob("__init__.py")] == []


def test_top_level() -> None:
    """Code lives in these folders and nowhere else."""
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode != 0:
        pytest.skip("not a git checkout")
    assert {name.partition("/")[0] for name in tracked.stdout.split()} <= {*FLOORS, "scripts", "tests"}
