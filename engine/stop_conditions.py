"""StopConditions: which sequences end with the token they drew, and why. Stop strings are engine.stop_strings'."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from engine.draws import Draws
from engine.sequence import Sequence, SequenceTable

Ended = tuple[str, int | None]
"""Finish reason, and the token of stop_token_ids that it is due to."""


class StopConditions:
    """The model's own end of sequence, stop_token_ids, and the length that a sequence may reach."""

    def __init__(self, vocab_size: int, eos_token_ids: Iterable[int], table: SequenceTable) -> None:
        self._table = table
        self._is_eos = np.zeros(vocab_size, np.bool_)
        self._is_eos[[token for token in eos_token_ids if token < vocab_size]] = True

    def ends(self, draws: Draws) -> list[tuple[int, Ended]]:
        """Those that end with their draw, by their index in `draws`."""
        table, rows, known = self._table, draws.rows, draws.known
        stops = self._is_eos[draws.tokens] & table.heeds_eos[rows]
        choosy = table.has_stop_ids[rows]
        if choosy.any():
            drew_stop = [i for i in np.flatnonzero(choosy).tolist() if draws.token_ids[i] in draws.samples[i].stop_ids]
            stops[drew_stop] = True
        candidates = (stops & (known >= table.stop_from[rows])) | (known + 1 >= table.limit[rows])
        if not candidates.any():
            return []
        found = ((i, self.ended(draws.samples[i], draws.token_ids[i])) for i in np.flatnonzero(candidates).tolist())
        return [(index, ended) for index, ended in found if ended]

    def ended(self, sequence: Sequence, last: int) -> Ended | None:
        """Why a sequence ends with its `last` token; None when it goes on."""
        params = sequence.group.request.params
        if sequence.group.request.pooling is not None:
            return "stop", None
        if sequence.num_output_tokens > params.min_tokens:
            if self._is_eos[last] and not params.ignore_eos:
                return "stop", None
            if last in sequence.stop_ids:
                return "stop", last
        return ("length", None) if sequence.num_tokens >= self._table.limit[sequence.row] else None
