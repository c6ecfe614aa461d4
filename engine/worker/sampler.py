"""Sampler: logits of the rows that draw, to tokens and the log-probabilities asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from engine.step import PromptLogprobs, SampledLogprobs, pack
from engine.worker.batch import Batch, Int64Array
from engine.worker.sampling_state import Rows, SamplingState
from engine.worker.transfers import Download, upload
from engine.worker.typical import keep_typical
from kernels.sampling import Penalties, adjust_logits, apply_penalties, count_tokens, gather_logprobs, sample
from kernels.watermark import add_watermark


class Sampler:
    """Draws one token a row, by the parameters of the row's sequence."""

    def __init__(self, batch: Batch, state: SamplingState) -> None:
        self._batch, self._state = batch, state

    def sample(self, logits: Tensor, slots: Int64Array, allowed: Tensor | None = None) -> tuple[Tensor, Rows]:
        """Token ids [R] int64 drawn from logits [R, vocab], a row for each of `slots`, and the rows' description.

        Each draw depends on its row's logits, parameters, seed, position and mask alone. Penalties count the drawn
        tokens. `allowed` [R, ceil(vocab / 32)] int32 are this step's masks.
        """
        rows = self._state.rows(slots)
        if rows.flags == 0 and allowed is None:
            largest: Tensor = sample(logits, dataclasses.replace(rows.tensors, positions=rows.tensors.seeds))
            return largest, rows
        positions = upload(self._batch.num_tokens[slots], logits.device)
        tensors = dataclasses.replace(rows.tensors, positions=positions, bias=self._state.bias(rows, positions))
        if allowed is not None:
            tensors.allowed = allowed if tensors.allowed is None else allowed & tensors.allowed
        if rows.watermarked is not None:
            logits = add_watermark(logits, self._state.previous(rows.watermarked, positions))
        if rows.typical_p is not None:
            # Over the logits as adjusted; what is adjusted here is not adjusted again.
            logits = keep_typical(adjust_logits(logits, tensors).float(), tensors.temperature, rows.typical_p)
            plain = dataclasses.replace(tensors, bias=None, penalties=None, allowed=None)
            token_ids: Tensor = sample(logits, plain)
        else:
            token_ids = sample(logits, tensors)
        if tensors.penalties is not None:
            count_tokens(token_ids, tensors.penalties.rows, tensors.penalties.output_counts)
        return token_ids, rows


def sampled_logprobs(logits: Tensor, token_ids: Tensor, rows: Rows) -> Callable[[], list[SampledLogprobs]]:
    """Log-probabilities of the drawn tokens, for the rows that want them, from the raw logits [R, vocab].

    Those of beams have their penalties in them, and do not sum to 1 then: as in Transformers' beam search. The result
    is a function to be called once the device has come this far.
    """
    if not len(rows.logprob_rows):
        return list
    index = upload(rows.logprob_rows, logits.device)
    wanted, more = logits[index], None
    if rows.beam_penalties is not None:
        wanted, more = _penalized(wanted, upload(rows.beams, logits.device), rows.beam_penalties)
    gathered = _gather(wanted, token_ids[index], max(rows.logprob_counts), more)

    def finish() -> list[SampledLogprobs]:
        chosen, ranks, top_ids, top = (part.numpy() for part in gathered)
        return [
            SampledLogprobs(row, float(chosen[i]), int(ranks[i]), pack(top_ids[i, :count]), top[i, :count].tobytes())
            for i, (row, count) in enumerate(zip(rows.logprob_rows.tolist(), rows.logprob_counts, strict=True))
        ]

    return finish


def prompt_logprobs(
    logits: Tensor, token_ids: Tensor, seq_id: int, start: int, count: int
) -> Callable[[], PromptLogprobs]:
    """Log-probabilities of the prompt tokens from `start` on, token_ids [n], each from its row of logits [n, vocab].

    The result is a function to be called once the device has come this far.
    """
    gathered = _gather(logits, token_ids, count, None)

    def finish() -> PromptLogprobs:
        chosen, ranks, top_ids, top = (part.numpy() for part in gathered)
        return PromptLogprobs(
            seq_id, start, chosen.tobytes(), pack(ranks), pack(np.ascontiguousarray(top_ids)), top.tobytes()
        )

    return finish


def _penalized(logits: Tensor, beams: Tensor, penalties: Penalties) -> tuple[Tensor, Tensor]:
    """logits [B, vocab] with the log-probabilities of the rows `beams` as their penalties leave them, float32; and
    what gather_logprobs will have taken from each row's too much, [B, 1]."""
    logits = logits.float()
    own = logits[beams].log_softmax(dim=-1)
    apply_penalties.definition(own, penalties)
    more = torch.zeros(len(logits), 1, device=logits.device)
    more[beams] = own.logsumexp(dim=-1, keepdim=True)
    return logits.index_copy(0, beams, own), more


def _gather(
    logits: Tensor, token_ids: Tensor, count: int, more: Tensor | None
) -> tuple[Download, Download, Download, Download]:
    """gather_logprobs, and `more` [B, 1] of them, on its way to the host: float32, int32, int32 and float32."""
    chosen, ranks, top_ids, top = gather_logprobs(logits, token_ids, count)
    if more is not None:
        chosen, top = chosen + more[:, 0], top + more
    return Download(chosen), Download(ranks.to(torch.int32)), Download(top_ids.to(torch.int32)), Download(top)
