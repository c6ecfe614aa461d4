"""schemathesis over /openapi.json: made-up requests to every route; none may be answered with 5xx."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

DISTRIBUTION = "schemathesis"
EXAMPLES = 25
RAN = f"/openapi.json, coverage and fuzzing, up to {EXAMPLES} examples a route, seed 1"


def check(url: str) -> str:
    """Raises when a route answers with 5xx."""
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{url}/openapi.json", "--url", url]
    command += ["--checks", "not_a_server_error", "--phases", "coverage,fuzzing", "--max-examples", str(EXAMPLES)]
    # One worker: on Python 3.11 threads that parse code at once fail, and hypothesis parses code.
    command += ["--seed", "1", "--request-timeout", "30", "--continue-on-failure", "--no-color"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout)
    if done.returncode:
        raise AssertionError(done.stderr[-2000:] or "see above")
    operations = re.search(r"Tested:\s*(\d+)|Operations:\s*(\d+)", done.stdout)
    cases = re.search(r"(\d+) generated", done.stdout)
    assert cases is not None, "schemathesis says no number of cases"
    routes = next(g for g in operations.groups() if g) if operations else "all"
    return f"{cases.group(1)} requests to {routes} routes, no 5xx"
