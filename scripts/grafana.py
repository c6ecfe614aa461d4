"""A Grafana dashboard of Manta's metrics in Ray's Prometheus.

    python -m scripts.grafana > manta.json                     # import it in Grafana; or, in the folders Ray makes:
    python -m scripts.grafana --out /tmp/ray/session_latest/metrics/grafana/dashboards/Manta.json

Names come from cluster.metrics, so that a panel cannot ask for a metric that is no more.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from cluster.metrics import COUNTERS, GAUGES, TIMES

DRIVERS = '{driver=~"$driver"}'
WIDTH, HEIGHT, COLUMNS = 8, 8, 3
Query = tuple[str, str]
"""PromQL, and the legend of its lines."""


def gauge(name: str, legend: str) -> Query:
    """The sum of a gauge over the drivers."""
    assert name in GAUGES, name
    return f"sum(ray_manta_{name}{DRIVERS})", legend


def rate(name: str, legend: str) -> Query:
    """What a counter grows a second, over all drivers."""
    assert name in COUNTERS, name
    return f"sum(rate(ray_manta_{name}_total{DRIVERS}[$__rate_interval]))", legend


def share(part: str, whole: str, legend: str) -> Query:
    """One counter's growth in another's."""
    return f"{rate(part, '')[0]} / {rate(whole, '')[0]}", legend


def quantiles(name: str) -> list[Query]:
    """Median, 90th and 99th percentile of a histogram, all drivers together."""
    buckets = f"sum by (le) (rate(ray_manta_{TIMES[name][0]}_bucket_total{DRIVERS}[$__rate_interval]))"
    return [(f"histogram_quantile({q}, {buckets})", f"p{q * 100:g}") for q in (0.5, 0.9, 0.99)]


PANELS: list[tuple[str, str, list[Query]]] = [
    ("Tokens a second", "short", [rate("generated_tokens", "generated"), rate("prompt_tokens", "of prompts accepted")]),
    ("Time to first token", "s", quantiles("first_token_s")),
    ("Time between tokens", "s", quantiles("token_gap_s")),
    ("Sequences", "short", [gauge("running", "running"), gauge("waiting", "waiting")]),
    ("Time in the queue", "s", quantiles("queue_s")),
    ("Step time of the ranks", "s", quantiles("step_s")),
    (
        "KV blocks",
        "short",
        [gauge("used_blocks", "used"), gauge("cached_blocks", "cached"), gauge("num_blocks", "in all")],
    ),
    (
        "Prefix cache: share of prompt tokens found",
        "percentunit",
        [share("prefix_hit_tokens", "prefix_query_tokens", "")],
    ),
    ("Preemptions a second", "short", [rate("preemptions", "preemptions")]),
    (
        "Requests a second",
        "short",
        [
            rate("num_requests", "accepted"),
            rate("num_aborted", "aborted"),
            rate("finished_error", "samples failed"),
        ],
    ),
    ("Recoveries", "short", [(f"sum(ray_manta_recoveries_total{DRIVERS}) or vector(0)", "since the drivers began")]),
    ("Computing a step's grammar masks", "s", quantiles("mask_s")),
    ("Slots filled in used blocks", "percentunit", [(f"avg(ray_manta_kv_utilization{DRIVERS})", "")]),
]


def dashboard() -> dict[str, Any]:
    """The dashboard's model, as Grafana imports it (schema 39)."""
    source = {"type": "prometheus", "uid": "${source}"}
    panels = [
        {
            "id": i + 1,
            "type": "timeseries",
            "title": title,
            "datasource": source,
            "gridPos": {"x": i % COLUMNS * WIDTH, "y": i // COLUMNS * HEIGHT, "w": WIDTH, "h": HEIGHT},
            "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
            "options": {"tooltip": {"mode": "multi"}},
            "targets": [
                {"refId": chr(ord("A") + n), "datasource": source, "expr": expression, "legendFormat": legend or title}
                for n, (expression, legend) in enumerate(queries)
            ],
        }
        for i, (title, unit, queries) in enumerate(PANELS)
    ]
    variables = [
        {"name": "source", "type": "datasource", "query": "prometheus", "label": "Prometheus"},
        {
            "name": "driver",
            "label": "Driver",
            "type": "query",
            "datasource": source,
            "query": {"query": "label_values(ray_manta_num_blocks, driver)", "refId": "drivers"},
            "refresh": 2,
            "includeAll": True,
            "multi": True,
            "allValue": ".*",
            "current": {"text": "All", "value": "$__all"},
        },
    ]
    return {
        "uid": "manta",
        "title": "Manta",
        "tags": ["ray", "llm"],
        "schemaVersion": 39,
        "refresh": "5s",
        "time": {"from": "now-15m", "to": "now"},
        "templating": {"list": variables},
        "panels": panels,
    }


def main() -> None:
    """Print the dashboard, or write it to --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a file to write (default: standard output)")
    out: Path | None = parser.parse_args().out
    text = json.dumps(dashboard(), indent=2) + "\n"
    if out is None:
        sys.stdout.write(text)
    else:
        out.write_text(text)


if __name__ == "__main__":
    main()
