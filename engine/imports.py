"""The first import of transformers, behind a check of what is installed."""

from __future__ import annotations

import importlib.metadata
import os
from typing import Any

from engine.errors import PackageConflict


def transformers() -> Any:
    """The transformers module. Raises PackageConflict when a distribution called `kernels` is installed beside ours.

    transformers looks for Hugging Face's package of that name. With its metadata present it imports our `kernels/`
    in its stead and fails far away, as `cannot import name 'CUDAProperties'`.
    """
    check_kernels_distribution()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or it warns at every fork after the first use
    import transformers as module

    return module


def check_kernels_distribution() -> None:
    """Raise PackageConflict when the metadata of a distribution called `kernels` can be found."""
    try:
        found = importlib.metadata.distribution("kernels")
    except importlib.metadata.PackageNotFoundError:
        return
    raise PackageConflict(
        f"the PyPI package 'kernels' {found.version} is installed ({found.locate_file('')}); Manta's own kernels/ "
        "folder has its name, and transformers would take one for the other: run `pip uninstall kernels`"
    )
