"""A rehearsal compiles for a GPU that is not there, each variant once. In processes of their own: it changes Triton."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parent.parent.parent

PROGRAM = """
import torch
from kernels.launch import Chip, num_multiprocessors
from kernels.rehearsal import Rehearsal
from kernels.rms_norm import rms_norm

def x(rows, dtype=torch.bfloat16):
    return torch.empty(rows, 256, dtype=dtype, device="meta")

rehearsal = Rehearsal(Chip((9, 0), 132), WORKERS)
with rehearsal():
    for rows in (3, 5, 7):
        out = rms_norm(x(rows), x(1)[0], 1e-5)
        assert out.shape == (rows, 256) and out.is_meta
    rms_norm(x(3, torch.float16), x(1, torch.float16)[0], 1e-5)
    rms_norm(x(3)[:, 1:129], x(1)[0, 1:129], 1e-5)  # not aligned
    assert num_multiprocessors(torch.device("meta")) == 132
print(rehearsal.variants)
"""


def run(program: str, cache: Path) -> str:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT), "MANTA_PDL": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout.strip()


def test_each_variant_is_compiled_once(tmp_path: Path) -> None:
    met = run(PROGRAM.replace("WORKERS", "2"), tmp_path)
    assert met == "{'kernels.rms_norm._rms_norm_kernel': 3}"
    binaries = sorted(path.read_text() for path in tmp_path.glob("*/_rms_norm_kernel.ptx"))
    assert len(binaries) == 3
    assert all(".target sm_90" in text for text in binaries)
    assert all("griddepcontrol.wait" in text for text in binaries)  # as it will be launched on such a GPU


def test_without_workers_nothing_is_compiled(tmp_path: Path) -> None:
    assert run(PROGRAM.replace("WORKERS", "0"), tmp_path) == "{'kernels.rms_norm._rms_norm_kernel': 3}"
    assert not list(tmp_path.iterdir())
