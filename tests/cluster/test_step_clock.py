import pytest

from cluster.step_clock import PlanSizes, StepClock, StepSize
from engine.sampling_params import SamplingParams
from engine.step import NewSequence, StepPlan, pack


def cost_s(size, *, base=4e-3, token=2e-5, pair=3e-9, row=1e-5):
    """What a step would take on some device."""
    return base + token * size.tokens + pair * size.pairs + row * size.rows


def decode(sequences, context):
    return StepSize(sequences, sequences * context, sequences)


def prefill(tokens, before=0):
    return StepSize(tokens, sum(range(before + 1, before + tokens + 1)), 1)


def test_nothing_is_expected_of_the_first_step_but_its_limit():
    clock = StepClock(first_s=300)
    assert clock.expected_s(prefill(8192)) is None
    assert clock.stuck_s(prefill(8192)) == 300


def test_a_seen_size_is_bounded_by_a_few_times_what_it_took():
    clock = StepClock(floor_s=5, factor=5)
    for context in range(500, 600):
        clock.observe(decode(64, context), 0.010)
    assert clock.stuck_s(decode(64, 600)) < 5.2
    clock.observe(prefill(8192), 1.0)
    assert 5 + 5 * 1.0 <= clock.stuck_s(prefill(8192)) <= 5 + 5 * 2.1
    assert clock.stuck_s(decode(64, 600)) < 5.2


@pytest.mark.parametrize("device", [{}, {"pair": 1e-7}, {"base": 0.5, "token": 1e-6}, {"token": 1e-2}, {"row": 1e-2}])
def test_a_long_prefill_after_short_steps_only_gets_its_time(device):
    clock = StepClock()
    for context in range(1, 200):
        clock.observe(decode(4, context), cost_s(decode(4, context), **device))
    clock.observe(prefill(12), cost_s(prefill(12), **device))
    for size in [
        prefill(8192),
        prefill(8192, 100_000),
        prefill(500, 30_000),
        decode(256, 8000),
        StepSize(64, 64, 9000),
    ]:
        assert clock.expected_s(size) >= cost_s(size, **device)


def test_a_bound_tightens_as_more_is_measured():
    clock = StepClock()
    clock.observe(decode(1, 10), 0.01)
    loose = clock.stuck_s(prefill(4096))
    clock.observe(prefill(1024), 0.2)
    assert clock.stuck_s(prefill(4096)) < loose / 20
    clock.observe(prefill(4096), 0.9)
    assert clock.stuck_s(prefill(4096)) < 15


def test_one_slow_step_fades():
    clock = StepClock()
    clock.observe(decode(1, 10), 30.0)
    for _ in range(90):
        clock.observe(decode(1, 10), 0.01)
    assert clock.expected_s(decode(1, 10)) < 0.05


def new(seq_id, num_tokens, num_computed=0, **params):
    return NewSequence(
        seq_id, f"r{seq_id}", pack(range(num_tokens)), num_tokens, num_computed, b"", SamplingParams(**params), 0
    )


def plan(step, entries, **fields):
    ids, counts = zip(*entries) if entries else ((), ())
    return StepPlan(0, step, seq_ids=pack(ids), num_tokens=pack(counts), **fields)


def test_sizes_follow_the_plans():
    sizes = PlanSizes()
    first = plan(0, [(1, 10), (2, 4)], new=[new(1, 10), new(2, 20, 16, prompt_logprobs=0)], sample_seqs=pack([1, 2]))
    assert sizes.size(first) == StepSize(14, 10 * 10 + 4 * 20, 2 + 4)
    assert sizes.size(plan(1, [(1, 1), (2, 1)], sample_seqs=pack([1, 2]))) == StepSize(2, 11 + 21, 2 + 1)
    assert sizes.size(plan(2, [(1, 1), (2, 1)], sample_seqs=pack([1, 2]))) == StepSize(2, 12 + 22, 2 + 1)
    assert sizes.size(plan(3, [(2, 1)], sample_seqs=pack([2]))) == StepSize(1, 23, 2)
    assert sizes.size(plan(4, [(1, 1)], dropped=pack([2]), sample_seqs=pack([1]))) == StepSize(1, 13, 1)
    assert sizes.size(plan(5, [])) == StepSize(0, 0, 0)
    again = plan(6, [(2, 3), (1, 1)], new=[new(2, 3)], sample_seqs=pack([2, 1]))
    assert sizes.size(again) == StepSize(4, 3 * 3 + 14, 2)
