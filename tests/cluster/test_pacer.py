"""When steps are planned, on a clock of numbers."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cluster import pacer as rules
from cluster.pacer import (
    AGAIN_S,
    GATHER_LIMIT_S,
    GATHER_S,
    GATHER_TIMES,
    IN_TIME_S,
    LATE_S,
    LEAD_S,
    LEAST_LEAD_S,
    LIVELY_S,
    MOST_LEAD_S,
    RECENT_S,
    Pacer,
    StepTimes,
)
from engine.draft import ScheduledStep
from engine.step import StepPlan, StepResult, pack
from tests.fakes import engine_config

MAX_TOKENS, MAX_SEQS = 1000, 16


def step(decodes=4, prompt=0):
    """A step of so many decodes and one piece of a prompt."""
    plan = StepPlan(0, 0, seq_ids=pack(range(decodes + bool(prompt))), num_decodes=decodes)
    return ScheduledStep(plan, [], [], [], decodes + prompt)


def result(device_s, late=False):
    return StepResult(0, 0, device_s=device_s, late=late)


def make_pacer(**changes):
    return Pacer(**{"max_tokens": MAX_TOKENS, "max_seqs": MAX_SEQS, **changes})


def idle_wait_s(pacer, now_s, waiting, running=0):
    return pacer.wait_s(now_s, step=None, in_flight=0, running=running, waiting=waiting)


def wait_s(pacer, now_s, running_step=None, *, in_flight=1, running=4, waiting=0):
    return pacer.wait_s(now_s, step=running_step or step(), in_flight=in_flight, running=running, waiting=waiting)


def running_pacer(took_s=0.01, ended_s=100.0, **changes):
    """Knows what a step of four decodes takes; another such step began at `ended_s`, a request came just before."""
    pacer = make_pacer(**changes)
    pacer.arrived(ended_s - 0.5, num_tokens=5, num_sequences=1)
    pacer.began(ended_s - took_s, in_flight=1)
    pacer.began(ended_s - took_s, in_flight=2)
    pacer.ended(step(), result(took_s), ended_s, ended_s)
    return pacer


def arrive(pacer, now_s, num_tokens=5, num_sequences=1):
    pacer.arrived(now_s, num_tokens=num_tokens, num_sequences=num_sequences)


# An idle engine.


def test_a_request_that_comes_alone_loses_half_a_millisecond():
    pacer = make_pacer()
    arrive(pacer, 7.0)
    assert idle_wait_s(pacer, 7.0, 1) == pytest.approx(GATHER_S)
    assert idle_wait_s(pacer, 7.0003, 1) == pytest.approx(GATHER_S - 0.0003)
    assert idle_wait_s(pacer, 7.0 + GATHER_S, 1) == 0.0


def serve(pacer, now_s, num_requests):
    """Requests come to an idle engine, which computes one step for them."""
    for _ in range(num_requests):
        arrive(pacer, now_s)
    wait = idle_wait_s(pacer, now_s, num_requests)
    pacer.began(now_s, in_flight=1)
    pacer.ended(step(num_requests), result(0.01), now_s + 0.01, now_s + 0.01)
    return wait


def test_a_client_that_asks_again_and_again_alone_loses_nothing():
    pacer = make_pacer()
    assert serve(pacer, 1.0, 1) == pytest.approx(GATHER_S)
    assert [serve(pacer, now_s, 1) for now_s in (1.015, 1.03, 1.045)] == [0, 0, 0]
    assert serve(pacer, 1.045 + 0.01 + AGAIN_S, 1) == pytest.approx(GATHER_S), "after a pause anybody may come"


def test_whoever_comes_after_several_waits_for_others():
    pacer = make_pacer()
    serve(pacer, 1.0, 2)
    assert serve(pacer, 1.015, 1) == pytest.approx(GATHER_S)
    arrive(pacer, 1.03)
    arrive(pacer, 1.03)
    pacer.wait_s(1.03, step=None, in_flight=0, running=0, waiting=2)
    pacer.began(1.03, in_flight=1)
    arrive(pacer, 1.035)  # while the others are computed
    pacer.began(1.04, in_flight=1)
    pacer.ended(step(), result(0.01), 1.05, 1.05)
    assert serve(pacer, 1.055, 1) == pytest.approx(GATHER_S), "three were served at a time"


def test_of_a_burst_everyone_is_waited_for():
    pacer = make_pacer()
    for number in range(10):
        arrive(pacer, number * GATHER_S)
        assert idle_wait_s(pacer, number * GATHER_S, number + 1) == pytest.approx(
            GATHER_S * min(number + 1, GATHER_TIMES)
        )
    assert idle_wait_s(pacer, (9 + GATHER_TIMES) * GATHER_S + 1e-9, 10) == 0.0


def test_a_burst_without_end_is_waited_for_to_a_limit():
    pacer = make_pacer(max_tokens=10**6, max_seqs=10**6)
    for number in range(200):
        now_s = 1 + number * GATHER_S
        arrive(pacer, now_s)
        over = number * GATHER_S >= GATHER_LIMIT_S
        assert (idle_wait_s(pacer, now_s, number + 1) == 0.0) is over


@pytest.mark.parametrize("request_size", [{"num_tokens": MAX_TOKENS // 4}, {"num_sequences": MAX_SEQS // 4}])
def test_a_burst_that_fills_a_step_waits_no_more(request_size):
    pacer = make_pacer()
    waits = []
    for number in range(4):
        arrive(pacer, 1.0, **request_size)
        waits.append(idle_wait_s(pacer, 1.0, number + 1) > 0)
    assert waits == [True, True, True, False]


def test_seats_are_filled_by_those_who_wait():
    pacer = make_pacer(max_seqs=2)
    arrive(pacer, 1.0)
    assert idle_wait_s(pacer, 1.0, 1) > 0
    arrive(pacer, 1.0)
    assert idle_wait_s(pacer, 1.0, 2) == 0.0


def test_nobody_is_gathered_while_somebody_runs():
    pacer = make_pacer()
    arrive(pacer, 1.0)
    assert idle_wait_s(pacer, 1.0, 1, running=1) == 0.0


def test_those_who_waited_before_do_not_wait_for_others():
    pacer = make_pacer()
    arrive(pacer, 1.0)
    assert idle_wait_s(pacer, 1.0, 2) == 0.0  # one of them was preempted
    pacer.forget()
    assert idle_wait_s(pacer, 1.0, 1) == 0.0  # the ranks were restarted


def test_a_burst_that_was_aborted_is_forgotten():
    pacer = make_pacer()
    arrive(pacer, 1.0, num_tokens=MAX_TOKENS)
    assert idle_wait_s(pacer, 1.0, 0) == 0.0
    arrive(pacer, 1.1)
    assert idle_wait_s(pacer, 1.1, 1) == pytest.approx(GATHER_S)


def test_a_planned_burst_is_forgotten():
    pacer = make_pacer()
    arrive(pacer, 1.0, num_tokens=MAX_TOKENS)
    pacer.began(1.0, in_flight=1)
    arrive(pacer, 1.1)
    assert idle_wait_s(pacer, 1.1, 1) == pytest.approx(GATHER_S)


# While a step runs.


def test_the_next_step_is_planned_shortly_before_the_end_of_the_one_that_runs():
    pacer = running_pacer(0.01, 100.0)
    assert wait_s(pacer, 100.0) == pytest.approx(0.01 - LEAD_S)
    assert wait_s(pacer, 100.005) == pytest.approx(0.005 - LEAD_S)
    assert wait_s(pacer, 100.01 - LEAD_S + 1e-9) == 0.0
    assert wait_s(pacer, 101.0) == 0.0


def test_who_comes_meanwhile_does_not_end_the_wait():
    pacer = running_pacer(0.01, 100.0)
    arrive(pacer, 100.001)
    assert wait_s(pacer, 100.002, waiting=1) == pytest.approx(0.008 - LEAD_S)


def test_nothing_is_put_off_for_less_than_a_millisecond():
    for took_s in (0.0005, LEAD_S, LEAD_S + 0.0009):
        assert wait_s(running_pacer(took_s), 100.0) == 0.0
    assert wait_s(running_pacer(LEAD_S + 0.0011), 100.0) == pytest.approx(0.0011)


def test_a_step_submitted_to_an_idle_rank_begins_then():
    pacer = running_pacer(0.01, 100.0)
    pacer.began(100.5, in_flight=1)
    assert wait_s(pacer, 100.5) == pytest.approx(0.01 - LEAD_S)


def run_step(pacer, now_s, *, late, asked=True):
    """With a step running since `now_s`, plan the next one when the pacer says so; that one's result. When it ends."""
    arrive(pacer, now_s)
    if asked:
        assert wait_s(pacer, now_s) > 0
    pacer.began(now_s + 0.07, in_flight=2)
    pacer.ended(step(), result(0.1), now_s + 0.1, now_s + 0.1)
    pacer.ended(step(), result(0.1, late), now_s + 0.2, now_s + 0.2)
    pacer.began(now_s + 0.2, in_flight=1)
    return now_s + 0.2


def lead_s(pacer, now_s):
    return 0.1 - wait_s(pacer, now_s)


def test_plans_that_come_late_are_made_earlier_and_others_a_little_later():
    pacer = running_pacer(0.1, 100.0)
    now_s = run_step(pacer, 100.0, late=True)
    assert lead_s(pacer, now_s) == pytest.approx(LEAD_S + LATE_S)
    now_s = run_step(pacer, now_s, late=False)
    assert lead_s(pacer, now_s) == pytest.approx(LEAD_S + LATE_S - IN_TIME_S)
    for _ in range(50):
        now_s = run_step(pacer, now_s, late=True)
    assert lead_s(pacer, now_s) == pytest.approx(MOST_LEAD_S)
    for _ in range(int((MOST_LEAD_S - LEAST_LEAD_S) / IN_TIME_S) + 5):
        now_s = run_step(pacer, now_s, late=False)
    assert lead_s(pacer, now_s) == pytest.approx(LEAST_LEAD_S)


def test_a_late_step_that_was_not_put_off_teaches_nothing():
    pacer = running_pacer(0.1, 100.0)
    now_s = run_step(pacer, 100.0, late=True, asked=False)
    assert lead_s(pacer, now_s) == pytest.approx(LEAD_S)


def test_a_step_whose_masks_come_late_anyway_teaches_nothing():
    pacer = running_pacer(0.1, 100.0)
    assert wait_s(pacer, 100.0) > 0
    pacer.began(100.07, in_flight=2)
    pacer.ended(step(), result(0.1), 100.1, 100.1)
    masked = step()
    masked.plan.masked = pack([0])
    pacer.ended(masked, result(0.1, late=True), 100.2, 100.2)
    arrive(pacer, 100.2)
    pacer.began(100.2, in_flight=1)
    assert lead_s(pacer, 100.2) == pytest.approx(LEAD_S)


def test_a_step_after_a_pause_was_not_put_off():
    """The engine had nothing to do: of course the device had ended everything before."""
    pacer = running_pacer(0.01, 100.0)
    assert wait_s(pacer, 100.0) > 0
    pacer.ended(step(), result(0.01), 100.01, 100.01)
    assert idle_wait_s(pacer, 100.02, 0) == 0.0
    arrive(pacer, 101.0)
    pacer.began(101.0, in_flight=1)
    pacer.ended(step(), result(0.01, late=True), 101.01, 101.01)
    pacer.began(101.01, in_flight=1)
    assert wait_s(pacer, 101.01) == pytest.approx(0.01 - LEAD_S)


def test_a_step_of_which_nobody_knows_when_it_began_is_not_waited_for():
    pacer = running_pacer(0.01, 100.0)
    pacer.ended(step(), result(0.01), None, 100.01)
    assert wait_s(pacer, 100.01) == 0.0
    pacer.ended(step(), result(0.01), 100.02, 100.02)
    assert wait_s(pacer, 100.02) > 0


def test_a_step_that_computes_nothing_teaches_nothing():
    pacer = make_pacer()
    arrive(pacer, 100.0)
    pacer.began(100.0, in_flight=1)
    pacer.ended(None, result(0.0), 100.0, 100.0)
    pacer.ended(step(), result(0.0), 100.0, 100.0)
    assert wait_s(pacer, 100.0) == 0.0
    assert pacer.wait_s(100.0, step=None, in_flight=1, running=1, waiting=0) == 0.0


@pytest.mark.parametrize("situation", [
    {"in_flight": 2},
    {"running": MAX_SEQS},
    {"running": MAX_SEQS - 1, "waiting": 1},
    {"waiting": 1},
    {"running_step": step(2)},
    {"running_step": step(4, 60)},
])  # fmt: skip
def test_where_waiting_brings_nothing_or_nothing_is_known_the_plan_is_made_at_once(situation):
    pacer = running_pacer(0.01, 100.0)
    assert wait_s(pacer, 100.0) > 0
    assert wait_s(pacer, 100.0, **situation) == 0.0


def test_a_full_step_is_planned_at_once():
    pacer = running_pacer(0.01, 100.0)
    arrive(pacer, 100.0, num_tokens=MAX_TOKENS - 5)
    assert wait_s(pacer, 100.0, waiting=1) > 0
    arrive(pacer, 100.0, num_tokens=1)
    assert wait_s(pacer, 100.0, waiting=2) == 0.0


def test_without_requests_for_some_time_none_is_expected():
    pacer = make_pacer()
    arrive(pacer, 100.0)
    for now_s in (100.1, 100.0 + LIVELY_S, 100.1 + LIVELY_S):
        pacer.began(now_s - 0.01, in_flight=1)
        pacer.ended(step(), result(0.01), now_s, now_s)
        assert (wait_s(pacer, now_s) > 0) is (now_s <= 100.0 + LIVELY_S)


def test_each_wait_can_be_turned_off(monkeypatch):
    assert wait_s(running_pacer(foresees=False), 100.0) == 0.0
    pacer = make_pacer(gathers=False)
    arrive(pacer, 1.0)
    assert idle_wait_s(pacer, 1.0, 1) == 0.0

    def waits(device):
        pacer = Pacer.of(engine_config(device=device, max_num_batched_tokens=MAX_TOKENS))
        arrive(pacer, 100.0)
        gathers = idle_wait_s(pacer, 100.0, 1) > 0
        pacer.began(100.0, in_flight=1)
        pacer.ended(step(), result(0.01), 100.0, 100.0)
        return gathers, wait_s(pacer, 100.0) > 0

    monkeypatch.delenv("MANTA_PACING", raising=False)
    assert (waits("cuda"), waits("cpu")) == ((True, True), (True, False))
    monkeypatch.setenv("MANTA_PACING", "0")
    assert (waits("cuda"), waits("cpu")) == ((False, False), (False, False))


# What steps take.


def test_the_least_of_the_last_few_counts():
    times = StepTimes()
    for number, took_s in enumerate([0.001, *[0.02] * (rules.NUM_TIMES - 1)]):
        times.observe(step(), took_s, number / 100)
    assert times.least_s(step(), 1.0) == 0.001
    times.observe(step(), 0.03, 1.0)
    assert times.least_s(step(), 1.0) == 0.02


def test_a_step_speaks_for_larger_ones_of_its_kind():
    times = StepTimes()
    times.observe(step(8), 0.008, 0.0)
    times.observe(step(32), 0.032, 0.0)
    times.observe(step(0, 500), 0.5, 0.0)
    assert times.least_s(step(7), 0.0) is None
    assert times.least_s(step(31), 0.0) == 0.008
    assert times.least_s(step(33), 0.0) == 0.032  # of about the same size
    assert times.least_s(step(200), 0.0) == 0.032
    assert times.least_s(step(8, 60), 0.0) is None
    assert times.least_s(step(8, 600), 0.0) == 0.5


def test_old_times_are_not_believed():
    times = StepTimes()
    times.observe(step(8), 0.01, 0.0)
    times.observe(step(16), 0.02, 1.0)
    assert times.least_s(step(16), 1.0 + RECENT_S) == 0.02
    assert times.least_s(step(16), 1.1 + RECENT_S) is None
    times.observe(step(8), 0.01, 3.0)
    assert times.least_s(step(16), 1.1 + RECENT_S) == 0.01


# Whatever happens.

events = st.lists(
    st.tuples(
        st.sampled_from(["arrive", "arrive", "end", "begin", "forget"]),
        st.floats(0, 0.02),
        st.integers(1, 400),
        st.integers(1, 4),
        st.booleans(),
        st.tuples(st.integers(0, 2), st.sampled_from([0, 0, 4, MAX_SEQS - 2]), st.integers(0, 3)),
    ),
    max_size=40,
)


NOBODY, ONE_RUNS = (0, 0, 0), (1, 0, 0)
PLANNED_IN_TIME = [
    ("end", 0.015625, 1, 1, True, NOBODY),
    ("arrive", 0.0, 1, 1, False, ONE_RUNS),  # the next plan is put off
    ("begin", 0.0, 1, 1, False, NOBODY),
    ("end", 0.0, 1, 1, True, NOBODY),  # it was in time: the one behind it may come later
    ("arrive", 0.0, 1, 1, False, ONE_RUNS),
]


@settings(max_examples=300, deadline=None)
@given(events)
@example(PLANNED_IN_TIME)
def test_no_wait_is_too_long_or_in_vain(story):
    pacer, now_s, came, longest_s, lead_s = make_pacer(), 50.0, [], 0.0, LEAD_S
    for what, later_s, tokens, count, known, situation in story:
        now_s += later_s / 4
        if what == "arrive":
            arrive(pacer, now_s, tokens, count)
            came.append((now_s, tokens, count))
        elif what == "forget":
            pacer.forget()
            came = []
        elif what == "begin":
            pacer.began(now_s, in_flight=count)
            came = []
        else:
            longest_s = max(longest_s, later_s)
            lead_s = max(lead_s - IN_TIME_S, LEAST_LEAD_S)  # at the least: where that step's plan had been put off
            pacer.ended(step(count), result(later_s), now_s if known else None, now_s)
        check_wait(pacer, now_s, came, longest_s - lead_s, *situation)
        if not situation[0] and not situation[2]:
            came = []


def check_wait(pacer, now_s, came, longest_wait_s, in_flight, running, waiting):
    running_step = step(4) if in_flight else None
    waited_s = pacer.wait_s(now_s, step=running_step, in_flight=in_flight, running=running, waiting=waiting)
    assert waited_s >= 0.0
    if waited_s == 0.0:
        return
    assert in_flight < 2
    assert waiting <= len(came)
    assert running + max(waiting, sum(count for _, _, count in came)) < MAX_SEQS
    assert running + sum(tokens for _, tokens, _ in came) < MAX_TOKENS
    if in_flight:
        assert waited_s <= longest_wait_s + 1e-9
    else:
        assert waiting
        assert not running
        assert now_s + waited_s <= came[0][0] + GATHER_LIMIT_S + 1e-9
        assert now_s + waited_s <= came[-1][0] + GATHER_TIMES * GATHER_S + 1e-9
