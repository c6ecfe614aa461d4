"""The benchmarks: their table, their file, and that the parts measure what they say."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from engine.worker.backend import CpuBackend
from engine.worker.recordings import Recordings
from scripts import bench, workload
from scripts.bench_gpu import await_recordings, make_config, parse
from scripts.bench_gpu_cases import make_requests
from scripts.bench_gpu_engines import offline
from scripts.bench_report import Row, host_kind, save, table
from scripts.bench_scheduler import measure_cache, measure_steps, step_times_ms

ROWS = [
    Row("step", "none", 1, 0.25, "ms", limit=0.5),
    Row("rate", "tiny", 2, 12_345.6, "tokens/s", 4_000, 20_000, lower_is_better=False, note="64 requests"),
]


def test_the_table_lines_up_and_judges() -> None:
    header, step, rate = table(ROWS).splitlines()
    assert header.split() == ["case", "model", "tp", "value", "unit", "anchor", "limit", "note"]
    assert step.split() == ["step", "none", "1", "0.25", "ms", "<=", "0.5", "ok"]
    assert rate.split()[:5] == ["rate", "tiny", "2", "12,346", "tokens/s"]
    assert "4,000" in rate and ">= 20,000  MISSED" in rate and rate.endswith("64 requests")
    assert header.index("unit") == step.index("ms") == rate.index("tokens/s")


def test_results_of_a_day_are_kept_once(tmp_path: Path) -> None:
    save(ROWS, tmp_path)
    path = save([Row("step", "none", 1, 0.75, "ms", limit=0.5)], tmp_path)
    assert path.name.startswith(host_kind())
    saved = json.loads(path.read_text())
    assert [(row["case"], row["value"]) for row in saved] == [("rate", 12_345.6), ("step", 0.75)]
    assert {"case", "model", "tp", "value", "unit", "anchor", "limit"} <= set(saved[0])


def test_unknown_parts_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["schedular"])
    assert "schedular" in capsys.readouterr().err


def test_a_missed_limit_fails_the_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for value, code in ((0.25, 0), (0.75, 1)):
        row = Row("step", "none", 1, value, "ms", limit=0.5)
        monkeypatch.setitem(bench.PARTS, "scheduler", lambda _, row=row: [row])
        assert bench.main(["scheduler", "--no-save"]) == code
        assert "step" in capsys.readouterr().out


def test_scheduler_steps_decode_every_sequence() -> None:
    times = step_times_ms(32, 50)
    assert len(times) == 50 and all(time > 0 for time in times)
    (row,) = measure_steps(sizes=(256,), steps=50)
    assert row.case == "scheduler-step-256" and row.limit == 0.5


def test_only_last_blocks_waste_memory() -> None:
    """The issue's bound, on a short trace: it depends on lengths, not on the machine."""
    utilization, occupancy = measure_cache(num_requests=150, num_blocks=512)
    assert utilization.verdict == "ok", utilization
    assert 80 < occupancy.value <= utilization.value


def test_the_chat_trace_has_the_lengths_of_chats() -> None:
    trace = workload.chat(2000, 2048)
    assert trace == workload.chat(2000, 2048) != workload.chat(2000, 2048, seed=1)
    mean_in = sum(len(prompt) for prompt, _ in trace) / len(trace)
    mean_out = sum(length for _, length in trace) / len(trace)
    assert 190 < mean_in < 250 and 160 < mean_out < 220
    assert all(4 <= len(prompt) <= 1024 and 4 <= length <= 1024 for prompt, length in trace)
    assert all(10 <= token < 2038 for prompt, _ in trace for token in prompt)


def test_throughput_of_both_engines_counts_forced_lengths() -> None:
    from scripts.bench_throughput import measure_throughput

    model = str(Path(__file__).parents[2] / "configs" / "tiny")
    rate, speedup = measure_throughput(model, num_requests=2, batch_size=2, dtype="float32")
    assert rate.value > 0 and rate.anchor is not None and rate.anchor > 0
    assert speedup.value == pytest.approx(rate.value / rate.anchor)
    lengths = [length for _, length in workload.chat(2, 2048)]
    assert f"{sum(lengths):,} tokens" in rate.note


def test_the_gpu_benchmark_begins_once_every_graph_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = ["--max-num-seqs", "8", "--max-num-batched-tokens", "256"]
    config, model_config = make_config(
        parse(["--model", "micro", "--device", "cpu", "--out", str(tmp_path / "out.json"), *size])
    )
    go, record_next = threading.Event(), Recordings.record_next

    def held(recordings: Recordings) -> bool:
        assert go.wait(250)
        return record_next(recordings)

    monkeypatch.setattr(Recordings, "record_next", held)
    for graphs in (True, False):
        monkeypatch.setattr(CpuBackend, "graphs", graphs)
        with offline(config, model_config, lambda *_: None) as run:
            assert (run.unrecorded() > 0) == graphs
            go.set()
            timeline = run(list(make_requests("few", [([5, 7, 9], 4), ([11, 12], 6)], {})))
            assert timeline.num_tokens == 10
            recorded, _, total = await_recordings(run).split()[:3]
            assert recorded == total and run.unrecorded() == 0
