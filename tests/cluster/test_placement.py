import pytest

from cluster.placement import DRIVER_CPUS, REPLICA_CPUS, bundles, rank_bundles
from cluster.worker_actor import ROOT, environment
from engine.config import EngineConfig
from engine.errors import ConfigError


def config_of(**changes):
    return EngineConfig(model="m", **{"device": "cpu", **changes})


def test_a_replica_is_one_bundle_for_itself_and_one_a_rank():
    layout = bundles(config_of(tensor_parallel_size=3))
    assert layout[0] == {"CPU": REPLICA_CPUS + DRIVER_CPUS}
    assert layout[1:] == rank_bundles(config_of(tensor_parallel_size=3))
    assert len(layout) == 4


def test_every_gpu_rank_has_one_gpu_and_the_head_none():
    layout = bundles(config_of(tensor_parallel_size=4, device="cuda"))
    assert [bundle.get("GPU", 0) for bundle in layout] == [0, 1, 1, 1, 1]


@pytest.mark.parametrize(("ranks", "replicas"), [(2, 2), (1, 4)])
def test_small_replicas_share_two_cores(ranks, replicas):
    layout = bundles(config_of(tensor_parallel_size=ranks))
    assert replicas * sum(bundle["CPU"] for bundle in layout) <= 2


def test_an_unresolved_device_is_refused():
    with pytest.raises(ConfigError, match="device"):
        bundles(config_of(device="auto"))


def test_gpu_ranks_see_all_devices_and_use_no_multicast(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    cuda, cpu = environment(config_of(device="cuda")), environment(config_of())
    assert cuda["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"] == "1"
    assert (cuda["NCCL_NVLS_ENABLE"], cuda["TORCH_SYMM_MEM_DISABLE_MULTICAST"]) == ("0", "1")
    assert "NCCL_NVLS_ENABLE" not in cpu
    assert cpu["PYTHONPATH"].split(":") == [ROOT, "/somewhere"]
    assert int(cpu["OMP_NUM_THREADS"]) >= 1
