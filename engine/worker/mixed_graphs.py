"""MixedGraphs: steps with prompt chunks in them, replayed as CUDA graphs over padded numbers of tokens.

How many of a step's rows are decodes and how many are chunks is known on the device only, so that a graph is needed a
number of tokens and not a pair of numbers: rows from 0 are decodes, rows from cu_seqlens[0] are chunks. All of a step's
inputs go to the device in one copy. A graph of more tokens than there can be sequences gives the last hidden states of
as many rows as there can be sequences: those that tokens are drawn from.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.layers.attention import Runs, StepInput
from engine.models.base import Model
from engine.worker.batch import Batch, Entries, Int64Array
from engine.worker.recorder import Recorder
from engine.worker.transfers import pinned, upload
from kernels.launch import dependent_launches

MAX_TOKENS = 2048
"""Steps of more tokens keep the GPU busy for longer than their kernels take to launch."""
MAX_CHUNKS = 16
DEPENDENT_LAUNCH_TOKENS = 1024
"""Steps of more tokens start each kernel after the one before; there is little between large kernels to hide."""


def token_sizes(max_tokens: int) -> list[int]:
    """Numbers of tokens that are padded to: like decodes', and multiples of 128 from 384 on.

    Large products are cut into tiles of 128 rows: a step of 576 tokens took longer on an H200 than one of 640.
    """
    sizes = [16]
    while sizes[-1] < min(max_tokens, MAX_TOKENS):
        sizes.append(sizes[-1] + (min(sizes[-1], 64) if sizes[-1] < 384 else 128))
    return [size for size in sizes if size < max_tokens] + ([max_tokens] if max_tokens <= MAX_TOKENS else [])


class MixedGraphs:
    """Static buffers for the largest padded step, and a graph a padded number of tokens."""

    def __init__(
        self,
        model: Model,
        batch: Batch,
        max_batched_tokens: int,
        caches: list[tuple[Tensor, Tensor]],
        cos_sin: Tensor,
        recorder: Recorder,
    ) -> None:
        self._model, self._batch, self._caches, self._cos_sin = model, batch, caches, cos_sin
        self._recorder = recorder
        self._max_seqs = len(batch.num_tokens)
        self.sizes = token_sizes(max_batched_tokens)
        self._buffer = torch.zeros(self._layout(self.sizes[-1])[-1], dtype=torch.int32, device=batch.device)
        self._replays: dict[int, tuple[Callable[[], None], Tensor]] = {}

    def record(self, size: int) -> None:
        """Record the graph of one of `sizes`, unless it is recorded."""
        self._replay_of(size)

    def serves(self, entries: Entries, rows: Int64Array) -> bool:
        """Whether `forward` can compute these."""
        if entries.num_tokens > self.sizes[-1] or len(entries.slots) - entries.num_decodes > MAX_CHUNKS:
            return False
        return len(rows) <= self._max_seqs or not self._num_wanted(self._size_of(entries))

    def forward(self, entries: Entries, rows: Int64Array) -> Tensor:
        """The last hidden states of the step's tokens `rows` [R], [R, hidden_size]; overwritten by the next call."""
        size = self._size_of(entries)
        replay, hidden = self._replay_of(size)
        self._send(self._pack(size, entries, rows))
        replay()
        if self._num_wanted(size) or entries.are_all(rows):
            return hidden[: len(rows)]
        return hidden[upload(rows, hidden.device)]

    def _size_of(self, entries: Entries) -> int:
        return next(size for size in self.sizes if size >= entries.num_tokens)

    def _num_decodes(self, size: int) -> int:
        return min(size, self._max_seqs)

    def _num_wanted(self, size: int) -> int:
        """Rows that the last layer of the graph of `size` tokens goes on with; 0: all of them."""
        return self._max_seqs if size > self._max_seqs else 0

    def _layout(self, size: int) -> Int64Array:
        """Where the parts of a step of `size` tokens begin in the buffer, and where the last ends.

        Tokens' places, positions and cache slots; decodes' slots and context lengths; chunks' slots and context
        lengths; cu_seqlens; wanted rows.
        """
        decodes = self._num_decodes(size)
        parts = [size, size, size, decodes, decodes, MAX_CHUNKS, MAX_CHUNKS, MAX_CHUNKS + 1, self._num_wanted(size)]
        return np.concatenate([[0], np.cumsum(parts)]).astype(np.int64)

    def _pack(self, size: int, entries: Entries, rows: Int64Array) -> npt.NDArray[np.int32]:
        starts = self._layout(size).tolist()
        packed = np.zeros(starts[-1], np.int32)
        parts = [packed[a:b] for a, b in pairwise(starts)]
        count, decodes, chunks = entries.num_tokens, entries.num_decodes, len(entries.slots) - entries.num_decodes
        parts[2][:] = -1
        for part, values in zip(parts, self._batch.places(entries), strict=False):
            part[:count] = values
        lens = entries.starts + entries.counts
        parts[3][:decodes], parts[4][:decodes] = entries.slots[:decodes], lens[:decodes]
        parts[5][:chunks], parts[6][:chunks] = entries.slots[decodes:], lens[decodes:]
        parts[7][:] = count
        parts[7][: chunks + 1] = entries.offsets[decodes:]
        if self._num_wanted(size):
            parts[8][: len(rows)] = rows
        return packed

    def _send(self, packed: npt.NDArray[np.int32]) -> None:
        host = torch.from_numpy(packed)
        on_device = self._buffer[: len(packed)]
        on_device.copy_(pinned(host) if on_device.is_cuda else host, non_blocking=True)

    def _replay_of(self, size: int) -> tuple[Callable[[], None], Tensor]:
        if size not in self._replays:
            nothing = np.zeros(0, np.int64)
            self._send(self._pack(size, Entries(nothing, nothing, nothing, np.zeros(1, np.int64), 0), nothing))
            self._replays[size] = self._recorder.record(lambda: self._forward(size))
        return self._replays[size]

    def _forward(self, size: int) -> Tensor:
        """Compute what the buffer says."""
        batch = self._batch
        starts = self._layout(size).tolist()
        parts = [self._buffer[a:b] for a, b in pairwise(starts)]
        where, positions, slots, decode_slots, decode_lens, chunk_slots, chunk_lens, cu_seqlens, wanted = parts
        step = StepInput(
            token_ids=batch.tokens.view(-1)[where.to(torch.int64)],
            positions=positions.to(torch.int64),
            slots=slots.to(torch.int64),
            num_decodes=self._num_decodes(size),
            decodes=Runs(batch.block_tables[decode_slots.to(torch.int64)], decode_lens),
            prefills=Runs(batch.block_tables[chunk_slots.to(torch.int64)], chunk_lens, cu_seqlens, size),
            caches=self._caches,
            cos_sin=self._cos_sin,
            wanted=wanted.to(torch.int64) if self._num_wanted(size) else None,
            overlaid=True,
        )
        with dependent_launches(size <= DEPENDENT_LAUNCH_TOKENS):
            return self._model.forward(step)
