"""All-reduces between the GPUs of one host, checked and timed in CUDA graphs, by method and message size.

    python -m scripts.bench_collectives --size 2

One process a GPU. The table is what engine.parallel.peer_memory chooses by. Exit code 1 when a sum is wrong.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import socket
import sys
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, get_args

WIDTH = 8192
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
CALLS = 40  # in one graph


def time_us(run: Callable[[], object]) -> float:
    """Median time of one call, from replays of a graph of CALLS of them."""
    import torch

    for _ in range(3):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            run()
    times = []
    for _ in range(12):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / CALLS)
    return sorted(times)[len(times) // 2]


def measure(rank: int, size: int, address: str) -> list[dict[str, Any]]:
    """Every method at every size; the rows of the table."""
    import torch
    import torch.nn.functional as F

    from engine.parallel.group import connect
    from engine.parallel.peer_memory import Method, PeerMemory, choose

    torch.cuda.set_device(rank)
    group = connect(rank, size, address, "cuda")
    assert isinstance(group, PeerMemory), f"no peer memory here: {type(group).__name__}"
    table = []
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for rows in ROWS if dtype == torch.bfloat16 else (1, 64):
            parts = [
                torch.randn(rows, WIDTH, generator=torch.Generator("cuda").manual_seed(rows * 10 + r), device="cuda")
                for r in range(size)
            ]
            mine = parts[rank].to(dtype)
            wanted = sum(part.to(dtype).float() for part in parts)
            entry: dict[str, Any] = {"rows": rows, "dtype": str(dtype).removeprefix("torch."), "error": 0.0}
            entry["chosen"] = choose(mine.numel() * mine.element_size(), size)
            residual = torch.randn(rows, WIDTH, generator=torch.Generator("cuda").manual_seed(1), device="cuda").to(
                dtype
            )
            weight = torch.rand(WIDTH, generator=torch.Generator("cuda").manual_seed(2), device="cuda").to(dtype)
            for method in get_args(Method):
                group._method = method
                if group.method(mine.numel() * mine.element_size()) != method:
                    continue
                for _ in range(5):  # both halves of the buffers, in a row
                    got = group.all_reduce(mine.clone())
                error = ((got.float() - wanted).norm() / wanted.norm()).item()
                fused = group.all_reduce_add_norm(mine, residual, weight, 1e-5)
                if fused is not None:
                    total = got.float() + residual.float()
                    normed = F.rms_norm(total.to(dtype).float(), (WIDTH,), weight.float(), 1e-5)
                    for out, reference in zip(fused, (normed, total), strict=True):
                        error = max(error, ((out.float() - reference).norm() / reference.norm()).item())
                entry["error"] = max(entry["error"], error)
                buffer = mine.clone()
                group.barrier()
                entry[method] = round(time_us(lambda buffer=buffer: group.all_reduce(buffer.fill_(0.5))), 2)
                if fused is not None:
                    group.barrier()
                    call = partial(group.all_reduce_add_norm, mine, residual, weight, 1e-5)
                    entry[f"{method} + norm"] = round(time_us(call), 2)
            entry["fill"] = round(time_us(lambda buffer=buffer: buffer.fill_(0.5)), 2)
            table.append(entry)
    group.barrier()
    group.close()
    return table


def process(rank: int, size: int, address: str, pipe: Connection) -> None:
    try:
        pipe.send(measure(rank, size, address))
    except Exception:
        pipe.send(traceback.format_exc())


def main(argv: list[str]) -> int:
    """Measure; returns the exit code."""
    parser = argparse.ArgumentParser(prog="scripts.bench_collectives", description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for rank in range(args.size):
        here, there = context.Pipe()
        child = context.Process(target=process, args=(rank, args.size, address, there), daemon=True)
        child.start()
        pipes.append(here)
        processes.append(child)
    results = [pipe.recv() if pipe.poll(120) else "no answer in 120 s" for pipe in pipes]
    for child in processes:
        child.join(5)
        if child.is_alive():
            child.kill()
    for rank, result in enumerate(results):
        if isinstance(result, str):
            print(f"rank {rank}: {result}", flush=True)
    if any(isinstance(result, str) for result in results):
        return 1
    wrong = 0
    for entry in results[0]:
        limit = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}[entry["dtype"]]
        bad = not entry["error"] <= limit
        wrong += bad
        times = "  ".join(f"{name} {value}" for name, value in entry.items() if isinstance(value, float | str))
        print(f"[{entry['rows']:5}, {WIDTH}] {times}{'  WRONG' if bad else ''}", flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps(results[0], indent=1) + "\n")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
