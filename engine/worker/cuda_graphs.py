"""DecodeGraphs: steps of decodes alone, from static buffers, replayed as CUDA graphs over padded batch sizes.

A step is two graphs: `forward` reads the inputs from the mirror on the device and ends with logits; `draw` chooses the
tokens, appends them to the mirror and steps each row on. So a batch that stays the same needs nothing from the host.
On a CPU the same functions run as they are: that is how they are tested.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from engine.layers.attention import Runs, StepInput
from engine.models.base import Model
from engine.worker.batch import Batch, Int64Array
from engine.worker.recorder import Recorder, Recording
from engine.worker.sampling_state import FILTER, RANDOM, Rows, SamplingState
from engine.worker.transfers import pinned
from kernels.decode_inputs import DecodeInputs, append_tokens, gather_inputs
from kernels.sampling import SamplingTensors, sample

Draw = Literal["greedy", "random", "filtered"]
# Rows of the table that the host sends when the batch changes; all int32, a float's or half a long's bits.
_ROWS, _POSITIONS, _TEMPERATURE, _TOP_P, _MIN_P, _TOP_K, _SEEDS = range(7)
_TABLE_ROWS = _SEEDS + 2


def graph_sizes(max_seqs: int) -> list[int]:
    """Batch sizes that are padded to: powers of two up to 64, then multiples of 64, the rows of a product's tile.

    Up to 64 rows a step is a read of the weights, and then tiles take as long whatever is in them.
    """
    sizes = [1]
    while sizes[-1] < max_seqs:
        sizes.append(sizes[-1] + min(sizes[-1], 64))
    return [size for size in sizes if size < max_seqs] + [max_seqs]


class DecodeGraphs:
    """Static buffers for up to the batch's number of slots, and a graph a padded size and way of drawing."""

    def __init__(
        self,
        model: Model,
        batch: Batch,
        state: SamplingState,
        caches: list[tuple[Tensor, Tensor]],
        cos_sin: Tensor,
        recorder: Recorder,
    ) -> None:
        self._model, self._batch, self._state = model, batch, state
        self._caches, self._cos_sin = caches, cos_sin
        self._device = batch.device
        max_seqs = len(batch.num_tokens)
        self.sizes = graph_sizes(max_seqs)
        self._size = 0
        self._count = 0
        # What the device's rows and positions are now, as far as the host knows; sent again when a step differs.
        self._slots: Int64Array = np.zeros(0, np.int64)
        self._positions: Int64Array = np.zeros(0, np.int64)
        self._sent: Rows | None = None

        def column(dtype: torch.dtype) -> Tensor:
            return torch.zeros(max_seqs, dtype=dtype, device=self._device)

        self._table = torch.zeros((_TABLE_ROWS, max_seqs), dtype=torch.int32, device=self._device)
        self._table[_ROWS] = -1
        long = torch.int64
        self._inputs = DecodeInputs(
            column(long), column(long), column(long), column(long), column(torch.int32), batch.block_tables.clone()
        )
        self._drawn = column(torch.int32)
        self._logits: dict[int, Tensor] = {}
        self._forwards: dict[int, Callable[[], None]] = {}
        self._draws: dict[tuple[int, Draw], Callable[[], None]] = {}
        self._recorder = recorder

    def recordings(self, size: int) -> list[Recording]:
        """The graphs of one of `sizes`, in the order in which they must be recorded."""
        draws = [Recording(f"{size} {kind} draws", partial(self._draw_of, size, kind)) for kind in get_args(Draw)]
        return [Recording(f"{size} decodes", partial(self._forward_of, size)), *draws]

    def forward(self, slots: Int64Array, positions: Int64Array) -> Tensor:
        """Compute one token each of `slots`, at `positions`; logits [len(slots), vocab], overwritten by the next
        call.
        """
        self._count = len(slots)
        size = next(size for size in self.sizes if size >= self._count)
        rows = self._state.rows(slots)
        self._size = size
        self._forward_of(size)
        if (
            self._sent is not rows
            or not (self._slots is slots or np.array_equal(self._slots, slots))
            or not np.array_equal(self._positions, positions)
        ):
            self._send(rows, slots, positions)
        self._forwards[size]()
        return self._logits[size][: self._count]

    def can_draw(self, rows: Rows) -> bool:
        """Whether `draw` serves these rows: nothing but temperature, top-k, top-p and min-p is asked for."""
        return rows.flags & ~(RANDOM | FILTER) == 0

    def draw(self, rows: Rows) -> Tensor:
        """Draw and append a token for each row of the last forward, whose rows these are; [len(slots)] int32.

        The tokens stay on the device and are overwritten by the next step's.
        """
        kind: Draw = "greedy"
        if rows.flags & RANDOM:
            kind = "filtered" if rows.tensors.any_filter else "random"
        if (self._size, kind) not in self._draws:
            self._draw_of(self._size, kind)
            self._send(rows, self._slots, self._positions)
        self._draws[self._size, kind]()
        return self._stepped()

    def append(self, token_ids: Tensor) -> Tensor:
        """Append tokens [len(slots)] int64 drawn elsewhere, for the rows of the last forward; the same as int32."""
        count = self._count
        append_tokens(
            self._table[_ROWS, :count],
            self._table[_POSITIONS, :count],
            token_ids,
            self._batch.tokens,
            self._drawn[:count],
        )
        return self._stepped()

    def _stepped(self) -> Tensor:
        self._positions = self._positions + 1
        return self._drawn[: self._count]

    def _send(self, rows: Rows, slots: Int64Array, positions: Int64Array) -> None:
        """Make the device's rows these."""
        table = np.zeros((_TABLE_ROWS, self._table.shape[1]), np.int32)
        table[_ROWS] = -1
        count = len(slots)
        table[_ROWS, :count] = slots
        table[_POSITIONS, :count] = positions
        for row, column in zip((_TEMPERATURE, _TOP_P, _MIN_P), self._state.columns(slots), strict=True):
            table[row, :count] = column.view(np.int32)
        table[_TOP_K, :count] = self._state.top_k[slots]
        table[_SEEDS:].reshape(-1).view(np.int64)[:count] = self._state.seeds[slots]
        host = torch.from_numpy(table)
        self._table.copy_(pinned(host) if self._table.is_cuda else host, non_blocking=True)
        self._slots, self._positions, self._sent = slots, positions.copy(), rows

    def _forward_of(self, size: int) -> None:
        """Record how a batch of `size` rows is computed, unless it is recorded."""
        if size in self._forwards:
            return
        inputs = self._inputs
        views = DecodeInputs(
            inputs.token_ids[:size],
            inputs.positions[:size],
            inputs.next_positions[:size],
            inputs.cache_slots[:size],
            inputs.context_lens[:size],
            inputs.block_tables[:size],
        )

        def forward() -> Tensor:
            batch = self._batch
            gather_inputs(
                self._table[_ROWS, :size],
                self._table[_POSITIONS, :size],
                batch.tokens,
                batch.block_tables,
                batch.block_size,
                views,
            )
            step = StepInput(
                token_ids=views.token_ids,
                positions=views.positions,
                slots=views.cache_slots,
                num_decodes=size,
                decodes=Runs(views.block_tables, views.context_lens),
                prefills=None,
                caches=self._caches,
                cos_sin=self._cos_sin,
            )
            return self._model.logits(self._model.forward(step))

        self._record_padding()
        self._forwards[size], self._logits[size] = self._recorder.record(forward)

    def _draw_of(self, size: int, kind: Draw) -> None:
        """Record how tokens of a batch of `size` rows are drawn, unless it is recorded."""
        if (size, kind) in self._draws:
            return
        table = self._table
        floats = table.view(torch.float32)
        filtered = kind == "filtered"
        params = SamplingTensors(
            temperature=floats[_TEMPERATURE, :size],
            seeds=table[_SEEDS:].view(-1).view(torch.int64)[:size],
            positions=self._inputs.next_positions[:size],
            top_k=table[_TOP_K, :size] if filtered else None,
            top_p=floats[_TOP_P, :size] if filtered else None,
            min_p=floats[_MIN_P, :size] if filtered else None,
            all_greedy=kind == "greedy",
            any_filter=filtered,
        )

        def draw() -> Tensor:
            token_ids = sample(self._logits[size], params)
            append_tokens(
                table[_ROWS, :size], table[_POSITIONS, :size], token_ids, self._batch.tokens, self._drawn[:size]
            )
            return self._drawn[:size]

        self._record_padding()
        self._draws[size, kind] = self._recorder.record(draw)[0]

    def _record_padding(self) -> None:
        """Before recording, which runs the step once: all rows are padding, so that nothing is written."""
        self._table[_ROWS] = -1
        self._sent = None
