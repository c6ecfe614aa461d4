"""Admission: bounds on what waits, kept fair between tenants."""

from __future__ import annotations

import pytest

from deployments.admission import Admission
from engine.errors import EngineOverloaded


def fill(admission: Admission, tenant: str, tokens: int = 10) -> int:
    """Add requests of a tenant until one is refused; how many."""
    for count in range(10_000):
        try:
            admission.check(tenant, tokens)
        except EngineOverloaded:
            return count
        admission.add(f"{tenant}{count}", tenant, tokens)
    raise AssertionError("never full")


def test_both_bounds_hold() -> None:
    assert fill(Admission(20, 10**6), "a") == 20
    admission = Admission(1000, 95)
    assert fill(admission, "a") == 9
    assert (len(admission), admission.num_tokens) == (9, 90)
    with pytest.raises(EngineOverloaded, match="9 requests with 90 prompt tokens wait already; at most 95 tokens may"):
        admission.check("a", 10)
    admission.check("a", 5)


def test_one_request_of_any_size_may_wait_alone() -> None:
    Admission(1, 5).check("a", 1000)


def test_what_began_or_went_makes_room() -> None:
    admission = Admission(3, 10**6)
    assert fill(admission, "a") == 3
    admission.started("a0")
    admission.started("a0")
    admission.discard("a1")
    admission.discard("unknown")
    assert len(admission) == 1 and admission.num_tokens == 10
    assert fill(admission, "b") == 2


def test_a_full_queue_still_takes_a_tenant_with_less_than_its_share() -> None:
    admission = Admission(100, 10**6)
    assert fill(admission, "flood") == 100
    assert fill(admission, "small") == 50
    assert fill(admission, "third") == 33
    others = sum(fill(admission, f"tenant{number}") for number in range(100))
    assert len(admission) == 183 + others == 200, "never more than twice the bound"


def test_when_to_come_back_follows_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("deployments.admission.time.monotonic", lambda: now)
    admission = Admission(10_000, 10**6)
    for number in range(1000):
        admission.add(str(number), "a", 1)
    assert admission.retry_after_s() == 1
    for number in range(50):
        now += 0.1
        admission.started(str(number))
    assert admission.retry_after_s() == pytest.approx(950 / 2 / 10, rel=0.05)
    now += 3600
    assert admission.retry_after_s() == 60
