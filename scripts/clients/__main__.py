"""`python -m scripts.clients CLIENT URL`, in the clients' own environment; its last line is JSON for check_clients."""

from __future__ import annotations

import importlib
import json
import sys
from importlib.metadata import version

name, url = sys.argv[1:]
client = importlib.import_module(f"scripts.clients.with_{name}")
result = client.check(url)
print(json.dumps({"version": version(client.DISTRIBUTION), "ran": client.RAN, "result": result}))
