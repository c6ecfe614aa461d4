"""A checkpoint, and a rank over it, for tests of what a rank does."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import make_checkpoint
from tests.ranks import Ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a tiny random Llama 3."""
    path = tmp_path_factory.mktemp("llama3")
    make_checkpoint(path, "llama3")
    return path


@pytest.fixture
def ranks(folder: Path) -> Iterator[Ranks]:
    with Ranks(folder, block_size=8) as made:
        yield made
