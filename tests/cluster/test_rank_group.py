"""Ranks that take long to start."""

import threading
from pathlib import Path

import pytest
import ray

from cluster.measure import IdleRank
from cluster.placement import bundles
from cluster.ray_executor import RayExecutor
from engine.config import EngineConfig

pytestmark = pytest.mark.ray

GO = "go"


class LateRank(IdleRank):
    """Is not there before a file is."""

    def __init__(self, name, config, *args):
        while not (Path(config.model) / GO).exists():
            threading.Event().wait(0.05)
        super().__init__(name, config, *args)


def test_a_process_that_starts_late_is_no_missing_resource(ray_job, tmp_path):  # noqa: ARG001
    config = EngineConfig.from_args(model=str(tmp_path), device="cpu", max_model_len=64, resources_timeout_s=2)
    group = ray.util.placement_group(bundles(config))
    assert group.wait(200)
    told = []

    def note(missing):  # about once a second
        told.append(missing)
        if len(told) > 2 * config.resources_timeout_s:
            (tmp_path / GO).touch()

    executor = RayExecutor(config, None, name="manta:late", placement_group=group, on_wait=note, worker_class=LateRank)
    try:
        executor.start()
        assert len(executor.rank_facts) == 1
        assert set(told) == {""}
    finally:
        executor.shutdown()
        ray.util.remove_placement_group(group)
