"""Pooler: the hidden states of prompts that are embedded, pooled as their chunks are computed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from engine.step import NewSequence, Pooled, StepPlan
from engine.worker.batch import Batch, Entries, Int64Array
from engine.worker.transfers import Download, upload

LAST, MEAN = 1, 2
FLOAT_BYTES = 64 << 20
"""Hidden states are made float32 and summed as many at a time as fit in this."""


class Pooler:
    """One vector a prompt: its last hidden state, or the mean of all of them, kept as a sum until the last chunk."""

    def __init__(self, batch: Batch, hidden_size: int) -> None:
        self._batch, self._hidden_size = batch, hidden_size
        self._kinds = np.zeros(len(batch.num_tokens), np.int8)
        self._sums: Tensor | None = None  # [max_seqs, hidden_size] float32, made when the first mean is asked for

    def add(self, slot: int, new: NewSequence) -> None:
        """Take in the sequence of `slot`; of a mean nothing may have been computed before."""
        self._kinds[slot] = {None: 0, "last": LAST, "mean": MEAN}[new.pooling]
        if new.pooling == "mean":
            assert new.num_computed == 0, "a mean needs every token's hidden state"
            if self._sums is None:
                shape = (len(self._kinds), self._hidden_size)
                self._sums = torch.zeros(shape, dtype=torch.float32, device=self._batch.device)
            self._sums[slot] = 0

    def only(self, slots: Int64Array) -> bool:
        """Whether none of `slots` draws a token."""
        return bool(self._kinds[slots].all())

    def needs_all(self, entries: Entries) -> bool:
        """Whether a mean is among these, which takes in every token's hidden state."""
        return bool((self._kinds[entries.slots] == MEAN).any())

    def pool(self, plan: StepPlan, entries: Entries, hidden: Tensor, last: Tensor) -> Callable[[], list[Pooled]]:
        """Take in a step's hidden states: the vectors of the prompts that it ends.

        hidden [T, hidden_size] is read if `needs_all`; last [R, hidden_size] are those that tokens are drawn from. The
        result is a function to be called once the device has come this far.
        """
        kinds = self._kinds[entries.slots]
        if not kinds.any():
            return list
        if self.needs_all(entries):
            self._add_up(entries, np.flatnonzero(kinds == MEAN), hidden)
        slots = self._batch.sampled_slots(plan)
        samples = np.flatnonzero(self._kinds[slots])
        if not samples.size:
            return list
        vectors = last[upload(samples, last.device)].float()
        means = np.flatnonzero(self._kinds[slots[samples]] == MEAN)
        if means.size:
            assert self._sums is not None
            of = slots[samples[means]]
            counts = upload(self._batch.num_prompt[of].astype(np.float32), last.device)
            vectors[upload(means, last.device)] = self._sums[upload(of, last.device)] / counts[:, None]
        pooled = Download(vectors)

        def finish() -> list[Pooled]:
            return [Pooled(sample, row.tobytes()) for sample, row in zip(samples.tolist(), pooled.numpy())]

        return finish

    def _add_up(self, entries: Entries, means: Int64Array, hidden: Tensor) -> None:
        """Add the hidden states of entries `means` to their sums."""
        assert self._sums is not None
        counts = entries.counts[means]
        ends = np.cumsum(counts)
        total = int(ends[-1])
        slots = upload(entries.slots[means], hidden.device)
        rows = None
        if total != entries.num_tokens:
            first = np.repeat(entries.offsets[means] - (ends - counts), counts)
            rows = upload(first + np.arange(total), hidden.device)
        at_once = max(1, FLOAT_BYTES // (4 * self._hidden_size))
        for start in range(0, total, at_once):
            end = min(start + at_once, total)
            piece = hidden[start:end] if rows is None else hidden[rows[start:end]]
            lengths = np.clip(ends, start, end) - np.clip(ends - counts, start, end)
            lengths_there = upload(lengths, hidden.device)
            self._sums[slots] += torch.segment_reduce(piece.float(), "sum", lengths=lengths_there, axis=0, unsafe=True)
