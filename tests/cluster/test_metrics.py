import math

from cluster.metrics import COUNTERS, GAUGES, QUANTILES, TIMES, Buckets, RayMetrics, buckets, snapshot
from engine.grammar import Grammar
from engine.llm_engine import LLMEngine
from engine.request import Request
from engine.sampling_params import SamplingParams
from tests.fakes import HashExecutor, engine_config
from tests.hash_model import EOS, VOCAB_SIZE


def run_engine(count, vocab_size=VOCAB_SIZE, **changes):
    config = engine_config(**changes)
    engine = LLMEngine(config, HashExecutor(config), vocab_size=vocab_size, eos_token_ids=(EOS,))
    engine.start()
    for i in range(count):
        params = SamplingParams(max_tokens=6, ignore_eos=True, temperature=0)
        engine.add_request(Request.create(f"r{i}", [5, 6, 7], params))
    while engine.has_unfinished:
        engine.step()
    return engine


def test_a_snapshot_has_what_is_exported():
    stats = snapshot(run_engine(4))
    assert stats.keys() >= GAUGES.keys() | COUNTERS.keys()
    assert stats.keys() >= {f"{name}_p{share * 100:g}" for name in TIMES if name != "mask_s" for share in QUANTILES}
    assert "mask_s_mean" not in stats, "no request had a grammar"
    assert (stats["num_requests"], stats["generated_tokens"], stats["finished_length"]) == (4, 24, 4)
    assert all(isinstance(value, int | float) and math.isfinite(value) for value in stats.values())


def test_masks_are_measured_a_step():
    engine = run_engine(0, vocab_size=2048, model="configs/tiny")
    params = SamplingParams(max_tokens=9, temperature=0, grammar=Grammar("regex", "[0-9]{4}"))
    engine.add_request(Request.create("bound", [5, 6, 7], params))
    while engine.has_unfinished:
        engine.step()
    stats, masks = snapshot(engine), buckets(engine.metrics)["mask_s"]
    assert stats.keys() >= {f"mask_s_p{share * 100:g}" for share in QUANTILES}
    assert 1 <= masks.counts["+Inf"] <= stats["steps"]
    assert stats["mask_s_mean"] == masks.sum / masks.counts["+Inf"] > 0


def test_nothing_measured_is_nothing_said():
    stats = snapshot(run_engine(0))
    assert not [key for key in stats if key.startswith(tuple(TIMES))]
    assert stats["kv_utilization"] == 1.0


class Ear:
    def __init__(self):
        self.told = []

    def inc(self, value, tags):
        self.told.append((value, tags))


def test_counters_grow_by_what_is_new():
    metrics, ear = RayMetrics("a driver"), Ear()
    metrics._counters["generated_tokens"] = ear
    engine = run_engine(2)
    metrics.export(snapshot(engine), {})
    metrics.export(snapshot(engine), {})
    engine.add_request(Request.create("more", [5], SamplingParams(max_tokens=3, ignore_eos=True, temperature=0)))
    while engine.has_unfinished:
        engine.step()
    metrics.export(snapshot(engine), {})
    assert ear.told == [(12, {"driver": "a driver"}), (3, {"driver": "a driver"})]


def test_buckets_count_up_to_their_bound():
    engine = run_engine(0)
    for value in (0.0001, 0.0003, 0.004, 1e6):
        engine.metrics.step_s.observe(value)
    found = buckets(engine.metrics)
    assert found.keys() == TIMES.keys()
    counts, total = found["step_s"]
    assert [counts[edge] for edge in ("0.0001", "0.0002", "0.0005", "0.005", "500", "+Inf")] == [1, 1, 2, 3, 3, 4]
    assert total == 1e6 + 0.0044


def test_histograms_grow_bucket_by_bucket():
    metrics, ear, summed = RayMetrics("a driver"), Ear(), Ear()
    metrics._counters |= {"queue_s_bucket": ear, "queue_s_sum": summed}
    stats = snapshot(run_engine(0))
    metrics.export(stats, {"queue_s": Buckets({"1": 1, "2": 1, "+Inf": 2}, 3.5)})
    metrics.export(stats, {"queue_s": Buckets({"1": 1, "2": 2, "+Inf": 3}, 5.0)})
    assert [(value, tags["le"]) for value, tags in ear.told] == [(1, "1"), (1, "2"), (2, "+Inf"), (1, "2"), (1, "+Inf")]
    assert [value for value, _ in summed.told] == [3.5, 1.5]
