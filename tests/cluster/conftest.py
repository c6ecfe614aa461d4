"""Drivers over ranks that hash; and one Ray for all tests that need no other."""

import pytest
import ray

from cluster.driver import Driver
from cluster.recovery import RecoveryPolicy
from tests.fakes import HashExecutor, engine_config
from tests.hash_model import EOS, VOCAB_SIZE

QUICK = RecoveryPolicy(max_attempts=3, backoff_s=0.01)


@pytest.fixture
def make_driver():
    drivers = []

    def make(executor=None, *, config=None, max_client_bytes=64 << 20, policy=QUICK, **changes):
        config = config or engine_config(**changes)
        driver = Driver(
            "test",
            config,
            executor or HashExecutor(config),
            vocab_size=VOCAB_SIZE,
            eos_token_ids=(EOS,),
            policy=policy,
            max_client_bytes=max_client_bytes,
        )
        driver.start()
        drivers.append(driver)
        return driver

    yield make
    for driver in drivers:
        driver.stop()


@pytest.fixture(scope="session")
def head():
    """The address of a Ray of four cores: starting one takes longer than most tests."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
    yield cluster.address
    cluster.shutdown()


@pytest.fixture(scope="module")
def ray_job(head, request):
    """Makes a module's tests one job of that Ray, with names of its own; whatever they start ends with it."""
    ray.init(address=head, namespace=request.module.__name__, log_to_driver=False)
    yield
    ray.shutdown()
