import math

from cluster.metrics import COUNTERS, GAUGES, QUANTILES, TIMES, RayMetrics, snapshot
from engine.llm_engine import LLMEngine
from engine.request import Request
from engine.sampling_params import SamplingParams
from tests.fakes import EOS, VOCAB_SIZE, HashExecutor, engine_config


def run_engine(count):
    config = engine_config()
    engine = LLMEngine(config, HashExecutor(config), vocab_size=VOCAB_SIZE, eos_token_ids=(EOS,))
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
    assert stats.keys() >= {f"{name}_p{share * 100:g}" for name in TIMES for share in QUANTILES}
    assert (stats["num_requests"], stats["generated_tokens"], stats["finished_length"]) == (4, 24, 4)
    assert all(isinstance(value, int | float) and math.isfinite(value) for value in stats.values())


def test_nothing_measured_is_nothing_said():
    stats = snapshot(run_engine(0))
    assert not [key for key in stats if key.startswith(tuple(TIMES))]
    assert stats["kv_utilization"] == 1.0


def test_counters_grow_by_what_is_new():
    told = []

    class Ear:
        def inc(self, value, tags):
            told.append((value, tags))

    metrics = RayMetrics("a driver")
    metrics._counters = {"generated_tokens": Ear()}
    engine = run_engine(2)
    metrics.export(snapshot(engine))
    metrics.export(snapshot(engine))
    engine.add_request(Request.create("more", [5], SamplingParams(max_tokens=3, ignore_eos=True, temperature=0)))
    while engine.has_unfinished:
        engine.step()
    metrics.export(snapshot(engine))
    assert told == [(12, {"driver": "a driver"}), (3, {"driver": "a driver"})]
