"""Serve a model's shape with dummy weights through configs/llama3.yaml and load it with an OpenAI client program.

    python -m scripts.bench_served --client PATH/client.py

The client program takes --url --model --vocab --requests --concurrency --rate --processes and prints one JSON line.
What its clients saw stands beside vLLM 0.24's own server on the same kind of GPU, and is merged into the JSON file as
it comes. The loads begin with the same prompts, so that prefixes are not cached, unless an override says so.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from scripts.bench_report import RESULTS, Row, host_kind, merge, versions
from scripts.model_shapes import SHAPES, model_folder

# load -> (client's arguments, vLLM 0.24: TTFT p50, p90, p99, TPOT p50, p99 in ms, output tokens/s), 2026-11-21.
LOADS: dict[str, tuple[dict[str, float], tuple[float | None, ...]]] = {
    "1 client": ({"concurrency": 1, "requests": 6, "processes": 1}, (12.4, None, None, 4.79, None, 196)),
    "18 clients": ({"concurrency": 18, "requests": 72}, (19.4, 91, 92, 5.54, 5.83, 1830)),
    "66 clients": ({"concurrency": 66, "requests": 264}, (33.7, 361, 362, 7.27, 8.51, 5158)),
    "258 clients": ({"concurrency": 258, "requests": 1032}, (92.8, 1058, 1444, 19.2, 36.7, 10858)),
    "30 requests/s": ({"rate": 30, "requests": 600}, (23.5, 35.9, 47.2, 6.48, 7.67, 4449)),
}
COLUMNS = ("TTFT p50", "TTFT p90", "TTFT p99", "TPOT p50", "TPOT p99", "tokens/s")


def make_tokenizer(folder: Path, vocab_size: int) -> None:
    """A byte-level BPE tokenizer of this many tokens, whose texts mean nothing."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in letters for b in letters]
    triples = ((a + b, c) for a, b in pairs for c in letters)
    merges = pairs[: vocab_size - len(letters) - 2]
    while len(letters) + len(merges) + 2 < vocab_size:
        merges.append(next(triples))
    names = ["<s>", "</s>", *letters, *(a + b for a, b in merges)]
    backend = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


class Server:
    """`python -m scripts.run` in a process group of its own."""

    def __init__(self, arguments: list[str]) -> None:
        self.began_s = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "scripts.run", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.url = ""
        self._ready = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            print(f"    {line.rstrip()[:200]}", flush=True)
            if " is served at " in line:
                self.url = line.split(" is served at ")[1].split(";")[0].strip()
                self._ready.set()
        self._ready.set()

    def wait(self, timeout_s: float) -> float:
        """Seconds from the start until it answers."""
        if not self._ready.wait(timeout_s) or not self.url:
            raise RuntimeError(f"not serving after {timeout_s:g} s")
        return time.perf_counter() - self.began_s

    def stop(self) -> None:
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(40)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)


def load(client: Path, url: str, model: str, vocab_size: int, arguments: dict[str, float]) -> dict[str, Any]:
    """Run the client program once; its JSON line."""
    flags = [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, str(client), "--url", url, "--model", model, "--vocab", str(vocab_size), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def rows_of(load: str, model: str, values: Sequence[float], anchors: Sequence[float | None]) -> list[Row]:
    """One load's figures, in the order of COLUMNS."""
    return [
        Row(f"served {load}, {name}", model, 1, value, unit, anchor, lower_is_better=unit == "ms")
        for name, value, anchor in zip(COLUMNS, values, anchors, strict=True)
        for unit in ["tokens/s" if name == "tokens/s" else "ms"]
    ]


def main(argv: list[str]) -> int:
    """Serve, load, print; returns the exit code."""
    parser = argparse.ArgumentParser(prog="scripts.bench_served", description=__doc__.split("\n")[0])
    parser.add_argument("--client", type=Path, required=True)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama3-8b")
    parser.add_argument("--config", default="configs/llama3.yaml")
    parser.add_argument("--loads", default=",".join(LOADS))
    parser.add_argument("--limit-s", type=float, default=1e9, help="begin no load after so many seconds")
    parser.add_argument("--out", type=Path, help="JSON; default scripts/results/<host>-<date>.json")
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE of the configuration")
    args = parser.parse_args(argv)
    args.out = args.out or RESULTS / f"{host_kind()}-{date.today().isoformat()}.json"
    began_s = time.perf_counter()
    folder = model_folder(args.shape, Path(tempfile.gettempdir()) / "manta-shapes")
    vocab_size = SHAPES[args.shape]["vocab_size"]
    make_tokenizer(Path(folder), vocab_size)
    overrides = ["load_format=dummy", "served_model_name=shape", "enable_prefix_caching=false", *args.overrides]
    server = Server([args.config, f"model={folder}", *overrides])
    args.out.parent.mkdir(exist_ok=True)
    errors = 0
    try:
        ready_s = server.wait(300)
        print(f"ready after {ready_s:.1f} s (vLLM's server 142)", flush=True)
        merge([Row("served start", args.shape, 1, round(ready_s, 1), "s", 142)], args.out)
        load(
            args.client,
            server.url,
            "shape",
            vocab_size,
            {"concurrency": 258, "requests": 300, "max-len": 80, "seed": 5},
        )
        print(f"{'':14}" + "".join(f"{name:>18}" for name in COLUMNS), flush=True)
        for name in args.loads.split(","):
            if time.perf_counter() - began_s > args.limit_s:
                print(f"{name}: left out, the time is up", flush=True)
                continue
            arguments, anchors = LOADS[name]
            seen = load(args.client, server.url, "shape", vocab_size, arguments)
            errors += seen["errors"]
            values = (*seen["ttft_ms"], seen["tpot_ms"][0], seen["tpot_ms"][2], seen["out_tok_s"])
            cells = (
                f"{value:,.1f}" + (f" ({anchor:,.1f})" if anchor else "")
                for value, anchor in zip(values, anchors, strict=True)
            )
            more = f"  errors {seen['errors']} {seen['error']}" if seen["errors"] else ""
            print(f"{name:14}" + "".join(f"{cell:>18}" for cell in cells) + more, flush=True)
            merge(rows_of(name, args.shape, values, anchors), args.out)
    finally:
        server.stop()
    print(", ".join(f"{name} {value}" for name, value in versions().items()), flush=True)
    return int(errors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
