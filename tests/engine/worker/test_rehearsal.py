"""A rehearsal goes through everything a start launches; its process does so for a task, and leaves a stamp."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.model_config import ModelConfig
from engine.worker.preparation import Preparation
from engine.worker.rehearsal_task import Task
from scripts.model_shapes import model_folder

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parent.parent.parent.parent


def configs(tmp_path: Path, **args: object) -> tuple[EngineConfig, ModelConfig]:
    """The small shape, as `resolve` would leave it on a GPU."""
    config = EngineConfig.from_args(
        **{
            "model": model_folder("micro", tmp_path),
            "device": "cuda",
            "dtype": "bfloat16",
            "max_model_len": 256,
            "max_num_seqs": 16,
            "max_num_batched_tokens": 128,
            **args,
        }
    )
    return config, ModelConfig.load(config)


def met(task: Task, tmp_path: Path) -> str:
    """Run the process with nothing compiled; what its stamp says."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "engine.worker.rehearsal"],
        input=pickle.dumps(task),
        cwd=ROOT,
        env=env | {"TRITON_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return task.stamp.read_text()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_start_is_rehearsed(tmp_path: Path, ranks: int) -> None:
    config, model_config = configs(tmp_path, tensor_parallel_size=ranks)
    task = Task(config, model_config, tmp_path / "stamps/stamp", time.time(), ((9, 0), 132), 0)
    said = met(task, tmp_path)
    for kernel in ("_prefill_kernel", "_decode_kernel", "_rotary_and_write_kernel", "race_kernel", "weigh_kernel"):
        assert kernel in said
    assert "_gather_kernel" in said  # of the decode graphs
    assert ("_gemv_kernel" in said) and "failed" not in said
    eager = Task(config.replace(enforce_eager=True), model_config, tmp_path / "eager", time.time(), ((9, 0), 132), 0)
    said = met(eager, tmp_path)
    assert "_gather_kernel" not in said
    # Of a single row: its logits, and behind the last layer's attention o_proj, gate and up, and down.
    assert "_gemv_kernel 4" in said


def test_a_cpu_needs_no_preparation(tmp_path: Path) -> None:
    config, model_config = configs(tmp_path)
    preparation = Preparation(config.replace(device="cpu"), model_config)
    preparation.begin()
    assert preparation.done and preparation.wait() == 0.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="a preparation succeeds here")
def test_a_preparation_that_fails_holds_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    preparation = Preparation(*configs(tmp_path))
    preparation.begin()  # its process will find no GPU
    Preparation(*configs(tmp_path)).begin()  # one is under way, or over
    assert preparation.wait(250) < 250
    assert not preparation.done


def test_what_decides_is_in_the_stamp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    config, model_config = configs(tmp_path)
    stamps = [
        Preparation(*pair)._stamp
        for pair in (
            (config, model_config),
            (config.replace(max_num_seqs=32), model_config),
            (config.replace(enforce_eager=True), model_config),
            (config, replace(model_config, raw={**model_config.raw, "hidden_size": 64})),
        )
    ]
    assert len(set(stamps)) == 4
    assert Preparation(config.replace(seed=3), model_config)._stamp == stamps[0]
    assert not Preparation(config, model_config).done
    stamps[0].parent.mkdir(parents=True)
    stamps[0].write_text("done")
    assert Preparation(config, model_config).done
