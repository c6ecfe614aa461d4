"""Draws: the tokens of a step's result, each beside the sequence that takes it."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import numpy as np

from engine.draft import Mask, RowArray, ScheduledStep
from engine.request import SequenceOutput, TokenLogprobs
from engine.sequence import Sequence, SequenceTable
from engine.step import Int32Array, SampledLogprobs, StepResult, unpack


class Draws:
    """What was drawn for those that still run: one entry for each of `samples`.

    `rows` are theirs in the table, `known` what they knew before, `tokens` and `token_ids` what they drew. `num_lost`
    tokens were drawn for nobody; `num_vectors` gave way to vectors in `take`.
    """

    __slots__ = (
        "_kept",
        "_result",
        "_scheduled",
        "known",
        "num_lost",
        "num_vectors",
        "rows",
        "samples",
        "token_ids",
        "tokens",
    )

    def __init__(self, scheduled: ScheduledStep, result: StepResult, alive: Mask, table: SequenceTable) -> None:
        """`alive` [R]: which of the step's samples take their token."""
        self._scheduled, self._result = scheduled, result
        self.samples: list[Sequence] = scheduled.samples
        self.rows: RowArray = scheduled.rows
        self.tokens: Int32Array = unpack(result.token_ids)
        self._kept: list[int] | None = None
        """Their indices among the step's samples; None: all of them."""
        if not alive.all():
            keep = np.flatnonzero(alive)
            self.rows, self.tokens = self.rows[keep], self.tokens[keep]
            self._kept = keep.tolist()
            self.samples = [scheduled.samples[index] for index in self._kept]
        self.num_vectors = 0
        self.num_lost = len(scheduled.rows) - len(self.rows)
        self.known: Int32Array = table.known[self.rows]
        self.token_ids: list[int] = self.tokens.tolist()

    def take(self, table: SequenceTable, logprobs: Iterable[SampledLogprobs]) -> list[SequenceOutput]:
        """Append the tokens to their sequences; what to tell of each, with its log-probabilities or its vector.

        `logprobs` are of the step's samples.
        """
        table.known[self.rows] = self.known + 1
        for sequence, token in zip(self.samples, self.token_ids):
            sequence.tokens.append(token)
        outputs = [SequenceOutput(s.request_id, s.index, [token]) for s, token in zip(self.samples, self.token_ids)]
        if entries := {entry.sample: entry for entry in logprobs}:
            for sample, output in zip(self._kept or range(len(outputs)), outputs):
                if (entry := entries.get(sample)) is not None:
                    output.logprobs = [_token_logprobs(entry)]
        if self._result.pooled:
            self._give_vectors(outputs)
        return outputs

    def _give_vectors(self, outputs: list[SequenceOutput]) -> None:
        """Give embedded prompts their vectors in place of their tokens."""
        samples = self._scheduled.samples
        vectors = {samples[part.sample].seq_id: part.vector for part in self._result.pooled}
        for sequence, output in zip(self.samples, outputs):
            if (vector := vectors.get(sequence.seq_id)) is not None:
                output.embedding, output.token_ids = vector, []
                self.num_vectors += 1


def _token_logprobs(entry: SampledLogprobs) -> TokenLogprobs:
    top_ids, top_logprobs = array("i", entry.top_ids).tolist(), array("f", entry.top_logprobs).tolist()
    return TokenLogprobs(entry.logprob, entry.rank, top_ids, top_logprobs)
