"""locust, headless: users that chat, stream and complete without a pause."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

DISTRIBUTION = "locust"
USERS, SECONDS = 20, 20
RAN = f"{USERS} users without a pause: chats, streamed chats, completions, TGI's generate"


def check(url: str) -> str:
    """Raises when a request fails."""
    file = Path(__file__).with_name("locust_users.py")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "locust", "-f", str(file), "--headless", "--host", url, "--only-summary"]
        command += ["-u", str(USERS), "-r", str(USERS), "-t", f"{SECONDS}s", "--stop-timeout", "20"]
        command += ["--json-file", f"{folder}/stats"]
        subprocess.run(command, check=True)
        rows = json.loads(Path(f"{folder}/stats.json").read_text())
    requests = sum(row["num_requests"] for row in rows)
    failures = sum(row["num_failures"] for row in rows)
    assert requests > USERS
    assert failures == 0
    times_ms = sorted(float(ms) for row in rows for ms, count in row["response_times"].items() for _ in range(count))
    p50, p95 = (times_ms[int(len(times_ms) * share)] for share in (0.5, 0.95))
    lasted_s = max(row["last_request_timestamp"] for row in rows) - min(row["start_time"] for row in rows)
    return f"{requests} requests in {lasted_s:.0f} s, 0 failures; median {p50:.0f} ms, 95th percentile {p95:.0f} ms"
