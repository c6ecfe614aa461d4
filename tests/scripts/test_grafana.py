import json
import re
import subprocess
import sys

from cluster.metrics import RayMetrics
from scripts.grafana import COLUMNS, HEIGHT, WIDTH, dashboard


def exported_names():
    metrics = RayMetrics("a driver")
    counters = {f"ray_{counter.info['name']}_total" for counter in metrics._counters.values()}
    return counters | {f"ray_{gauge.info['name']}" for gauge in metrics._gauges.values()}


def test_every_panel_asks_for_metrics_that_are_exported():
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            names = set(re.findall(r"ray_manta_\w+", target["expr"]))
            assert names, panel["title"]
            assert names <= exported_names(), panel["title"]
            assert target["expr"].count("(") == target["expr"].count(")")


def test_panels_do_not_overlap():
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard()["panels"]]
    assert len(set(places)) == len(places)
    assert all(x % WIDTH == 0 and x < COLUMNS * WIDTH and y % HEIGHT == 0 for x, y in places)


def test_the_script_writes_what_grafana_imports(tmp_path):
    out = tmp_path / "manta.json"
    subprocess.run([sys.executable, "-m", "scripts.grafana", "--out", str(out)], check=True, timeout=250)
    assert json.loads(out.read_text()) == dashboard()
