"""Which GPU a rank takes, and its context made ahead."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from cluster.gpu import device_index, open_gpu

DRIVER = """
int opened = -1;
int cuInit(unsigned flags) { return flags; }
int cuDeviceGet(int* device, int index) { *device = 10 + index; return index > 3 ? 101 : 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) { *context = &opened; opened = device; return 0; }
int which(void) { return opened; }
"""


@pytest.mark.parametrize(
    ("assigned", "visible", "index"), [("3", None, 3), ("3", "0,1,2,3", 3), ("5", "4,5", 1), ("1", "4,5", 1)]
)
def test_a_rank_takes_its_own_device_among_those_it_sees(assigned: str, visible: str | None, index: int) -> None:
    assert device_index([assigned], visible) == index


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_a_context_is_made_on_the_assigned_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ctypes

    library = str(tmp_path / "driver.so")
    subprocess.run(["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", library], input=DRIVER.encode(), check=True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,7")
    assert open_gpu(["7"], library)
    assert ctypes.CDLL(library).which() == 11
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert not open_gpu(["4"], library), "the driver refuses that device"


def test_no_driver_is_no_error() -> None:
    assert not open_gpu(["0"], "libnothing-of-this-name.so.1")
    assert not open_gpu(["0"], "libc.so.6"), "a library without those functions"
