from itertools import pairwise

from cluster.rank_loop import Progress
from cluster.stall_watch import ASK_EVERY_S, LOOK_AFTER_S, QUIET_S, StallWatch

EVERY_S = 0.25


class Watched:
    """A watch that looks at one step every quarter of a second."""

    def __init__(self, *, on_cpu=True):
        self.watch, self.now_s = StallWatch(on_cpu=on_cpu), 100.0

    def look(self, ranks, *, limit_s=1e9, first_s=1e9, seconds, every_s=EVERY_S):
        """Look for some seconds at ranks(second); the stall and when it was found."""
        began_s = self.now_s
        while self.now_s - began_s < seconds:
            if self.watch.begin("step", self.now_s):
                answers = ranks(self.now_s - began_s)
                stall = self.watch.judge(answers, limit_s, first_s, self.now_s)
                if stall is not None:
                    return stall, self.now_s - began_s
            self.now_s += every_s
        return None, seconds


def sleeping(collectives=7, *, meeting=True, **fields):
    return Progress(submitted=3, done=2, busy_s=1.0, collectives=collectives, meeting=meeting, **fields)


def test_ranks_that_all_sleep_are_found_in_seconds():
    stall, after_s = Watched().look(lambda _: [sleeping(), sleeping()], seconds=60)
    assert stall.ranks == (0, 1)
    assert LOOK_AFTER_S + QUIET_S <= after_s <= LOOK_AFTER_S + QUIET_S + 3 * EVERY_S
    assert "collective 7" in stall.reason


def test_the_one_who_does_not_come_is_to_blame():
    stall, _ = Watched().look(lambda _: [sleeping(7), sleeping(6, meeting=False), sleeping(7)], seconds=60)
    assert stall.ranks == (1,)


def test_ranks_are_asked_five_times_a_second_however_often_one_looks():
    asked = []
    stall, after_s = Watched().look(lambda s: asked.append(s) or [sleeping(), sleeping()], seconds=60, every_s=0.01)
    assert stall.ranks == (0, 1) and after_s <= LOOK_AFTER_S + QUIET_S + 2 * ASK_EVERY_S
    assert all(later - sooner >= ASK_EVERY_S - 1e-6 for sooner, later in pairwise(asked))


def test_what_other_threads_do_now_and_then_is_no_work():
    """Ray's threads, the answers; a core that the host took away for a while counts as used."""
    stall, after_s = Watched().look(
        lambda s: [sleeping(7, process_s=0.12 * (s // 1.5)), sleeping(6, meeting=False)], seconds=60
    )
    assert stall.ranks == (1,)
    assert after_s <= 2 * (LOOK_AFTER_S + QUIET_S)


def test_who_computes_however_long_is_not_stuck():
    for works in (
        lambda s: sleeping(6, meeting=False, thread_s=s, process_s=s),
        lambda _: sleeping(6, meeting=False, runs=True),  # waits for a core
        lambda s: sleeping(6, meeting=False, process_s=0.2 * s),  # its other threads, on a busy machine
    ):
        assert Watched().look(lambda s: [sleeping(), works(s)], seconds=600)[0] is None  # noqa: B023


def test_who_comes_to_collectives_is_not_stuck_though_it_sleeps_whenever_seen():
    watched = Watched()
    assert watched.look(lambda s: [sleeping(int(s)), sleeping(int(s))], limit_s=5, seconds=600)[0] is None


def test_who_waits_for_the_driver_is_not_stuck():
    waits = sleeping(meeting=False, awaits_driver=True)
    assert Watched().look(lambda _: [waits, waits], limit_s=5, seconds=600)[0] is None


def test_a_spinning_rank_is_found_when_its_time_is_over():
    stall, after_s = Watched().look(
        lambda s: [sleeping(7), sleeping(6, meeting=False, thread_s=s)], limit_s=12, seconds=60
    )
    assert stall.ranks == (1,)
    assert 12 <= after_s <= 14


def test_a_gpu_rank_is_judged_by_time_only():
    stall, after_s = Watched(on_cpu=False).look(lambda _: [sleeping(0, meeting=False)] * 2, limit_s=6, seconds=60)
    assert stall.ranks == (0, 1)
    assert 6 <= after_s <= 7


def test_kernels_that_are_compiled_have_the_time_of_a_first_step():
    preparing = sleeping(0, meeting=False, preparing=True)
    watched = Watched(on_cpu=False)
    assert watched.look(lambda _: [preparing] * 2, limit_s=6, first_s=300, seconds=290)[0] is None
    assert watched.look(lambda _: [preparing] * 2, limit_s=6, first_s=300, seconds=60)[0] is not None


def test_time_in_which_nobody_looked_does_not_count():
    """The machine stood still for an hour, and so did the driver."""
    watched = Watched(on_cpu=False)
    assert watched.look(lambda _: [sleeping()] * 2, limit_s=6, seconds=3)[0] is None
    watched.now_s += 3600
    assert watched.look(lambda _: [sleeping()] * 2, limit_s=6, seconds=2)[0] is None
    assert watched.look(lambda _: [sleeping()] * 2, limit_s=6, seconds=3)[0] is not None


def test_answers_that_have_not_come_prove_nothing():
    assert Watched().look(lambda _: None, limit_s=50, seconds=40)[0] is None
