import pytest

from cluster.recovery import Quarantine, RecoveryBudget, RecoveryPolicy


def test_the_budget_is_a_window(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("cluster.recovery.time.monotonic", lambda: now[0])
    budget = RecoveryBudget(RecoveryPolicy(max_failures=2, window_s=10))
    assert [budget.spend(), budget.spend(), budget.spend()] == [True, True, False]
    now[0] = 11.0
    assert budget.spend()
    assert budget.total == 4


class Ranks:
    """A batch in which some requests kill the ranks in every step they are part of."""

    def __init__(self, quarantine, requests, poison):
        self.quarantine, self.running, self.poison = quarantine, set(requests), set(poison)
        self.failed, self.served, self.failures = [], set(), 0

    def step(self):
        while (released := self.quarantine.release()) is not None:
            self.running.add(released)
        if self.running & self.poison:
            self.failures += 1
            culprit, parked = self.quarantine.blame(set(self.running))
            if culprit is not None:
                self.failed.append(culprit)
                self.running.discard(culprit)
            self.running -= set(parked)
        else:
            for request in self.running:
                self.quarantine.progressed(request)
            self.served |= self.running


@pytest.mark.parametrize("max_recoveries", [2, 3, 5])
@pytest.mark.parametrize("poison", [{"c"}, {"a"}, {"h"}, {"b", "g"}])
def test_the_poison_alone_is_failed(max_recoveries, poison):
    ranks = Ranks(Quarantine(max_recoveries), "abcdefgh", poison)
    for _ in range(100):
        ranks.step()
    assert set(ranks.failed) == poison
    assert ranks.served == set("abcdefgh") - poison
    assert ranks.running == ranks.served
    assert ranks.failures <= max_recoveries * len(poison) + 1


def test_failures_that_nobody_is_to_blame_for_fail_nobody():
    quarantine = Quarantine(3)
    for _ in range(20):
        assert quarantine.blame({"a", "b", "c"}) == (None, [])
        for request in "abc":
            quarantine.progressed(request)
    assert quarantine.release() is None
