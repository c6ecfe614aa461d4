"""Ranks driven by hand-made plans: what tests of the worker stand on, without the scheduler."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from engine.config import EngineConfig
from engine.model_config import ModelConfig, resolve
from engine.parallel.group import connect
from engine.sampling_params import SamplingParams
from engine.step import NewSequence, Pooling, StepPlan, StepResult, decode_plan, encode, pack, unpack
from engine.worker.worker import Worker

GREEDY = SamplingParams(temperature=0.0)


def free_address() -> str:
    """A local address nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def resolved(folder: Path, **settings: Any) -> tuple[EngineConfig, ModelConfig]:
    """A resolved configuration of a small engine on the CPU, in float32 unless `settings` say otherwise."""
    settings = {"dtype": "float32", "device": "cpu", "num_blocks": 64, "max_num_seqs": 16, **settings}
    config = EngineConfig(model=str(folder), **settings)
    model_config = ModelConfig.load(config)
    return resolve(config, model_config), model_config


class Ranks:
    """The ranks of one engine, each on a thread of its own, meeting over gloo when there are more than one."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        torch.set_num_threads(1)
        self.config, self.model_config = resolved(folder, **settings)
        self.size = self.config.tensor_parallel_size
        self._threads = ThreadPoolExecutor(self.size)
        address = free_address()
        self.workers = self._each(lambda rank: self._start(rank, address))
        self.block_size = self.config.block_size
        self._epoch = self._step = 0
        self._lengths: dict[int, int] = {}
        self._computed: dict[int, int] = {}
        self.tables: dict[int, list[int]] = {}
        self._next_block = 0
        self._new: list[NewSequence] = []
        self._dropped: list[int] = []

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self._each(lambda rank: self.workers[rank].close())
        self._threads.shutdown()

    def add(
        self,
        seq_id: int,
        tokens: Sequence[int],
        params: SamplingParams = GREEDY,
        *,
        num_prompt: int | None = None,
        num_computed: int = 0,
        table: Sequence[int] = (),
        seed: int = 0,
        pooling: Pooling | None = None,
    ) -> None:
        """Send a sequence whole with the next plan."""
        num_prompt = len(tokens) if num_prompt is None else num_prompt
        self._new.append(
            NewSequence(
                seq_id, f"r{seq_id}", pack(tokens), num_prompt, num_computed, pack(table), params, seed, pooling
            )
        )
        self._lengths[seq_id], self._computed[seq_id] = len(tokens), num_computed
        self.tables[seq_id] = list(table)

    def drop(self, seq_id: int) -> None:
        """Forget a sequence with the next plan."""
        self._dropped.append(seq_id)
        del self._lengths[seq_id], self._computed[seq_id], self.tables[seq_id]

    def step(
        self,
        work: Sequence[tuple[int, int]],
        *,
        samples: dict[int, int] | None = None,
        copies: Sequence[tuple[int, int]] = (),
        replaced: Sequence[tuple[int, int, int]] = (),
    ) -> StepResult:
        """Compute (sequence, tokens) of each, decodes before chunks, and draw of every one that has caught up.

        `samples` instead says who draws, and from whose logits. New blocks are always fresh ones.
        """
        work = sorted(work, key=lambda item: not self._is_decode(*item))
        counts, blocks = [], []
        for seq_id, count in work:
            self._computed[seq_id] += count
            assert self._computed[seq_id] <= self._lengths[seq_id]
            table = self.tables[seq_id]
            fresh = range(
                self._next_block, self._next_block + -(-self._computed[seq_id] // self.block_size) - len(table)
            )
            self._next_block += len(fresh)
            table.extend(fresh)
            counts.append(len(fresh))
            blocks.extend(fresh)
        entries = [seq_id for seq_id, _ in work]
        if samples is None:
            samples = {seq_id: seq_id for seq_id in entries if self._computed[seq_id] == self._lengths[seq_id]}
        for seq_id in samples:
            self._lengths[seq_id] += 1
        plan = StepPlan(
            self._epoch,
            self._step,
            dropped=pack(self._dropped),
            new=self._new,
            copies=pack([block for pair in copies for block in pair]),
            replaced=pack([number for triple in replaced for number in triple]),
            seq_ids=pack(entries),
            num_tokens=pack([count for _, count in work]),
            num_decodes=sum(self._is_decode(seq_id, count, computed=0) for seq_id, count in work),
            block_counts=pack(counts),
            block_ids=pack(blocks),
            sample_seqs=pack(samples),
            sample_entries=pack([entries.index(source) for source in samples.values()]),
        )
        self._step += 1
        self._new, self._dropped = [], []
        return self.run(plan)

    def run(self, plan: StepPlan) -> StepResult:
        """A plan as it is, encoded and decoded on the way."""
        plan = decode_plan(encode(plan))
        results = self._each(lambda rank: self.workers[rank].submit(plan).wait())
        assert all(result is None for result in results[1:])
        return results[0]

    def restart(self) -> None:
        """A new epoch."""
        self._epoch, self._step = self._epoch + 1, 0
        self._each(lambda rank: self.workers[rank].reset(self._epoch))
        self._lengths, self._computed, self.tables, self._next_block = {}, {}, {}, 0

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] = GREEDY,
        *,
        num_tokens: int = 12,
        chunk: int = 10_000,
        seeds: Sequence[int] | None = None,
        results: list[StepResult] | None = None,
    ) -> list[list[int]]:
        """num_tokens of each prompt, together, prompts computed in chunks; every step's result goes to `results`."""
        all_params = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        first = max(self._lengths, default=-1) + 1
        outputs: dict[int, list[int]] = {first + index: [] for index in range(len(prompts))}
        for index, prompt in enumerate(prompts):
            self.add(first + index, prompt, all_params[index], seed=seeds[index] if seeds else index)
        while running := [seq_id for seq_id, output in outputs.items() if len(output) < num_tokens]:
            work = [(seq_id, min(chunk, self._lengths[seq_id] - self._computed[seq_id])) for seq_id in running]
            caught_up = [s for s, n in sorted(work, key=lambda i: not self._is_decode(*i)) if self._catches_up(s, n)]
            result = self.step(work)
            for seq_id, token in zip(caught_up, unpack(result.token_ids).tolist(), strict=True):
                outputs[seq_id].append(token)
            if results is not None:
                results.append(result)
        for seq_id in outputs:
            self.drop(seq_id)
        return list(outputs.values())

    def _catches_up(self, seq_id: int, count: int) -> bool:
        return self._computed[seq_id] + count == self._lengths[seq_id]

    def _is_decode(self, seq_id: int, count: int, computed: int | None = None) -> bool:
        """Whether an entry computes one token, the last known, of a sequence with a past."""
        before = self._computed[seq_id] - (count if computed is not None else 0)
        return count == 1 and before > 0

    def _start(self, rank: int, address: str) -> Worker:
        communicator = connect(rank, self.size, address, "cpu", timeout_s=200)
        worker = Worker(self.config, self.model_config, rank, communicator)
        worker.load()
        worker.allocate(worker.measure())
        return worker

    def _each(self, run: Any) -> list[Any]:
        """run(rank) on every rank's thread; the results, or the first error."""
        return list(self._threads.map(run, range(self.size)))
