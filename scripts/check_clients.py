"""Every client people have, from PyPI, against a running server that has the embedded model:

    scripts/run.sh &
    python -m scripts.check_clients [--url http://127.0.0.1:8000] [--only NAME ...] [--venv build/clients-venv]

Makes the clients' environment when there is none, runs scripts/clients/with_NAME.py one after another, and prints a
Markdown table. Exits with 1 when one of them failed; what it printed is then shown.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CLIENTS = sorted(path.stem.removeprefix("with_") for path in (ROOT / "scripts" / "clients").glob("with_*.py"))
PACKAGES = [
    "openai==2.54.0",
    "huggingface_hub==1.33.0",
    "anthropic==2.12.0",
    "langchain-openai==1.7.3",
    "llama-index-llms-openai-like==0.8.1",
    "litellm==1.106.2",
    "lm-eval[api]==0.4.13",
    "transformers==5.23.0",
    "torch==2.13.0",
    "locust==2.47.0",
    "schemathesis==4.32.5",
]
"""Exact, so that pip need not search: litellm asks for an openai below 3."""
ALONE = ["text-generation==0.7.0"]
"""Asks for a huggingface-hub older than transformers does; it runs with the newer one."""
TIMEOUT_S = 300


def main() -> int:
    """Run the chosen clients; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server's address")
    parser.add_argument("--only", nargs="+", choices=CLIENTS, default=CLIENTS, metavar="NAME", help=", ".join(CLIENTS))
    parser.add_argument("--venv", type=Path, default=ROOT / "build" / "clients-venv", help="the clients' environment")
    arguments = parser.parse_args()
    url = arguments.url.rstrip("/")
    try:
        urllib.request.urlopen(f"{url}/health", timeout=10).close()
    except (urllib.error.URLError, OSError) as error:
        print(f"error: no server at {url}: {error}; start one with scripts/run.sh", file=sys.stderr)
        return 1
    python = environment(arguments.venv.absolute())
    print("| client | version | what was run | result |\n|---|---|---|---|", flush=True)
    failures = {}
    for name in arguments.only:
        row, output = run(python, name, url)
        print(row, flush=True)
        if output is not None:
            failures[name] = output
    for name, output in failures.items():
        print(f"\n{name}:\n{output[-6000:]}", file=sys.stderr)
    return 1 if failures else 0


def environment(folder: Path) -> Path:
    """The Python of the clients' environment, which is made when it is not whole."""
    python, whole = folder / "bin" / "python", folder / "manta-clients-installed"
    wanted = "\n".join([*PACKAGES, *ALONE])
    if whole.exists() and whole.read_text() == wanted:
        return python
    if not python.exists():
        print(f"making {folder} (several hundred MB)", file=sys.stderr)
        venv.create(folder, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *PACKAGES], check=True, stdout=sys.stderr)
    subprocess.run([*pip, "--no-deps", *ALONE], check=True, stdout=sys.stderr)
    whole.write_text(wanted)
    return python


def run(python: Path, name: str, url: str) -> tuple[str, str | None]:
    """The table's row of client `name`; and, if it failed, what it printed."""
    quiet = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "NO_PROXY": "127.0.0.1,localhost"}
    begun_s = time.monotonic()
    try:
        done = subprocess.run(
            [str(python), "-m", "scripts.clients", name, url], cwd=ROOT, env={**os.environ, **quiet},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
        return f"| {name} | | | **not done after {TIMEOUT_S} s** |", output
    took = f"{time.monotonic() - begun_s:.0f} s"
    if done.returncode:
        return f"| {name} | | | **failed** after {took} |", done.stdout
    told = json.loads(done.stdout.rstrip().splitlines()[-1])
    return f"| {name} | {told['version']} | {told['ran']} | {told['result']} ({took}) |", None


if __name__ == "__main__":
    sys.exit(main())
