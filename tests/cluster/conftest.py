"""Drivers over ranks that hash."""

import pytest

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
