"""How much memory a CPU rank may take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.worker import backend
from engine.worker.backend import CpuBackend, free_memory_bytes, make_backend

GIB = 2**30


def cgroup(folder: Path, limit: str, used: int) -> tuple[Path, Path]:
    """Files as a control group has them."""
    files = folder / "limit", folder / "used"
    files[0].write_text(f"{limit}\n")
    files[1].write_text(f"{used}\n")
    return files


def cpu_backend(cpu_kv_cache_gib: float, ranks: int = 1) -> CpuBackend:
    return CpuBackend(
        EngineConfig(model="m", dtype="float32", cpu_kv_cache_gib=cpu_kv_cache_gib, tensor_parallel_size=ranks)
    )


def test_the_machine_has_free_memory() -> None:
    assert 2**20 < free_memory_bytes() < 2**50


def test_a_control_groups_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_CGROUP_FILES", (cgroup(tmp_path, str(50 << 20), 20 << 20),))
    assert free_memory_bytes() == 30 << 20
    assert cpu_backend(1.0).kv_cache_bytes(lambda: None) == 15 << 20
    assert cpu_backend(1.0, ranks=3).kv_cache_bytes(lambda: None) == 5 << 20


@pytest.mark.parametrize("limit", ["max", "nonsense"])
def test_a_control_group_without_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setattr(backend, "_CGROUP_FILES", (cgroup(tmp_path, limit, 5), (tmp_path / "no", tmp_path / "no")))
    assert free_memory_bytes() > 50 << 20


def test_the_configured_size_is_the_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_CGROUP_FILES", (cgroup(tmp_path, str(100 * GIB), 0),))
    assert cpu_backend(0.01).kv_cache_bytes(lambda: None) == int(0.01 * GIB)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_a_gpu_is_named() -> None:
    config = EngineConfig(model="unused", device="cuda", dtype="bfloat16")
    with pytest.raises(ConfigError, match="device: 'cuda': torch finds no GPU here"):
        make_backend(config)
