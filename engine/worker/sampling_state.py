"""SamplingState: each slot's sampling parameters, and the tensors of a batch of rows made from them.

Numbers are columns over the slots; what few sequences ask for (bias, banned tokens, masks) is read from their params
when a row of the batch asks for it. A steady batch is described once and used again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.sampling_params import SamplingParams
from engine.step import NewSequence, unpack
from engine.worker.batch import Batch, Float32Array, Int64Array
from engine.worker.transfers import Numbers, upload
from kernels.sampling import LogitBias, Penalties, SamplingTensors, pack_bitmask

RANDOM, FILTER, PENALTY, BIAS, ALLOWED, MIN_TOKENS, BAD_WORDS, LOGPROBS, PROMPT_LOGPROBS, TYPICAL, WATERMARK = (
    1 << bit for bit in range(11)
)
BEAM_PENALTY = 1 << 11
"""A beam's penalties: on its log-probabilities, which is all that is wanted of it."""


@dataclass
class Rows:
    """One batch of rows: what they ask for, and the tensors that say how."""

    slots: Int64Array
    flags: int
    """Union of what its rows ask for; 0: all greedy, nothing else."""
    tensors: SamplingTensors
    """Positions are set anew each step."""
    min_tokens: _Conditional | None
    bad_words: _BadWords | None
    typical_p: Tensor | None
    """[B] float32; None: off in every row."""
    watermarked: Tensor | None
    """[B] int64: where in the batch's flat tokens the row's sequence begins; -1: not watermarked. None: no row is."""
    logprob_rows: Int64Array
    logprob_counts: list[int]
    """Of each logprob row: how many likeliest tokens it wants."""
    beams: Int64Array
    """Those of the logprob rows that are beams with penalties, and these penalties."""
    beam_penalties: Penalties | None


@dataclass
class _Conditional:
    """Tokens banned of a row while its position is below a limit. [K] each, on the device."""

    rows: Tensor
    token_ids: Tensor
    until: Tensor

    def bias(self, positions: Tensor) -> LogitBias:
        rows = torch.where(positions[self.rows] < self.until, self.rows, -1)
        return LogitBias(rows, self.token_ids, torch.full(rows.shape, float("-inf"), device=rows.device))


@dataclass
class _BadWords:
    """Words as token sequences: the last token is banned where the output ends with the others. On the device."""

    rows: Tensor
    """[K]."""
    last: Tensor
    """[K]: a word's last token."""
    before: Tensor
    """[K, P]: the tokens before it, nearest first, padded with -1."""
    counts: Tensor
    """[K]: how many those are."""
    starts: Tensor
    """[K]: where in the batch's flat tokens the row's sequence begins."""
    prompts: Tensor
    """[K]: its prompt tokens, which do not count as said."""

    def bias(self, positions: Tensor, tokens: Tensor) -> LogitBias:
        at = positions[self.rows]
        back = torch.arange(1, self.before.shape[1] + 1, device=at.device)
        said = tokens[self.starts[:, None] + (at[:, None] - back).clamp(min=0)]
        matches = ((said == self.before) | (self.before < 0)).all(dim=1) & (at - self.prompts >= self.counts)
        rows = torch.where(matches, self.rows, -1)
        return LogitBias(rows, self.last, torch.full(rows.shape, float("-inf"), device=rows.device))


class SamplingState:
    """Sampling parameters of every slot. Slots are the batch's."""

    def __init__(self, batch: Batch, max_seqs: int, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._batch, self._vocab_size, self._eos_token_ids = batch, vocab_size, eos_token_ids
        self._device = batch.device
        self.flags = np.zeros(max_seqs, np.int64)
        self.seeds = np.zeros(max_seqs, np.int64)
        self.top_k = np.zeros(max_seqs, np.int32)
        self._floats = {name: np.zeros(max_seqs, np.float32) for name in _FLOATS}
        self.params: dict[int, SamplingParams] = {}
        self._rows: Rows | None = None
        self._output_counts: Tensor | None = None  # [max_seqs, vocab] int32, made when the first penalty comes
        self._prompt_mask: Tensor | None = None  # [max_seqs, ceil(vocab / 32)] int32

    def add(self, slot: int, new: NewSequence) -> None:
        """Take in the sequence of `slot`; its penalties count the tokens it was sent with."""
        params = new.params
        self._rows = None
        self.params[slot] = params
        self.flags[slot] = _flags(params)
        self.seeds[slot] = new.seed
        self.top_k[slot] = max(params.top_k, 0)
        for name, column in self._floats.items():
            column[slot] = getattr(params, name)
        if self.flags[slot] & (PENALTY | BEAM_PENALTY):
            self._count(slot, new)

    def drop(self, slots: list[int]) -> None:
        """Forget the sequences of `slots`."""
        self._rows = None
        for slot in slots:
            self.params.pop(slot, None)

    def rows(self, slots: Int64Array) -> Rows:
        """Describe a batch of rows. The same slots as last time, none added or dropped since: the same object."""
        if self._rows is None or not (self._rows.slots is slots or np.array_equal(self._rows.slots, slots)):
            self._rows = self._describe(slots)
        return self._rows

    def columns(self, slots: Int64Array) -> tuple[Float32Array, Float32Array, Float32Array]:
        """Temperature, top_p and min_p of each of `slots`."""
        return self._floats["temperature"][slots], self._floats["top_p"][slots], self._floats["min_p"][slots]

    def bias(self, rows: Rows, positions: Tensor) -> LogitBias | None:
        """All additive bias of a batch at these positions: logit_bias, tokens not yet allowed, bad words."""
        parts = [] if rows.tensors.bias is None else [rows.tensors.bias]
        if rows.min_tokens is not None:
            parts.append(rows.min_tokens.bias(positions))
        if rows.bad_words is not None:
            parts.append(rows.bad_words.bias(positions, self._batch.tokens.view(-1)))
        if len(parts) <= 1:
            return parts[0] if parts else None
        return LogitBias(
            torch.cat([part.rows for part in parts]),
            torch.cat([part.token_ids for part in parts]),
            torch.cat([part.values for part in parts]),
        )

    def _count(self, slot: int, new: NewSequence) -> None:
        if self._output_counts is None or self._prompt_mask is None:
            max_seqs, words = len(self.flags), -(-self._vocab_size // 32)
            self._output_counts = torch.zeros((max_seqs, self._vocab_size), dtype=torch.int32, device=self._device)
            self._prompt_mask = torch.zeros((max_seqs, words), dtype=torch.int32, device=self._device)
        tokens = unpack(new.token_ids)
        prompt, output = tokens[: new.num_prompt_tokens], tokens[new.num_prompt_tokens :]
        counts = np.bincount(output, minlength=self._vocab_size).astype(np.int32)
        self._output_counts[slot] = torch.from_numpy(counts).to(self._device)
        seen = np.zeros((1, self._vocab_size), bool)
        seen[0, prompt] = True
        self._prompt_mask[slot] = pack_bitmask(torch.from_numpy(seen))[0].to(self._device)

    def _describe(self, slots: Int64Array) -> Rows:
        flags = self.flags[slots]
        union = int(np.bitwise_or.reduce(flags)) if len(flags) else 0
        random = bool(union & RANDOM)
        filtered = random and bool(union & FILTER)
        top_k, top_p, min_p = self.top_k[slots], self._floats["top_p"][slots], self._floats["min_p"][slots]
        tensors = SamplingTensors(
            temperature=self._tensor(self._floats["temperature"][slots]),
            seeds=self._tensor(self.seeds[slots]),
            positions=torch.empty(0, dtype=torch.int64),
            top_k=self._tensor(top_k) if filtered and top_k.any() else None,
            top_p=self._tensor(top_p) if filtered and (top_p < 1).any() else None,
            min_p=self._tensor(min_p) if filtered and min_p.any() else None,
            allowed=self._allowed(slots, flags) if union & ALLOWED else None,
            bias=self._logit_bias(slots, flags) if union & BIAS else None,
            penalties=self._penalties(slots, np.where(flags & PENALTY, slots, -1)) if union & PENALTY else None,
            all_greedy=not random,
            any_filter=filtered,
        )
        logprob_rows = np.flatnonzero(flags & LOGPROBS)
        beams = np.flatnonzero(flags[logprob_rows] & BEAM_PENALTY)
        beam_slots = slots[logprob_rows][beams]
        return Rows(
            slots=slots,
            flags=union,
            tensors=tensors,
            min_tokens=self._min_tokens(slots, flags) if union & MIN_TOKENS else None,
            bad_words=self._bad_words(slots, flags) if union & BAD_WORDS else None,
            typical_p=self._tensor(self._floats["typical_p"][slots]) if union & TYPICAL else None,
            watermarked=self._watermarked(slots, flags) if union & WATERMARK else None,
            logprob_rows=logprob_rows,
            logprob_counts=[self.params[slot].num_logprobs for slot in slots[logprob_rows].tolist()],
            beams=beams,
            beam_penalties=self._penalties(beam_slots, beam_slots) if len(beams) else None,
        )

    def _asking(self, slots: Int64Array, flags: Int64Array, flag: int) -> list[tuple[int, int, SamplingParams]]:
        """(row, slot, params) of the rows with a flag."""
        rows = np.flatnonzero(flags & flag).tolist()
        return [(row, int(slots[row]), self.params[int(slots[row])]) for row in rows]

    def _allowed(self, slots: Int64Array, flags: Int64Array) -> Tensor:
        allowed = torch.ones((len(slots), self._vocab_size), dtype=torch.bool)
        for row, _, params in self._asking(slots, flags, ALLOWED):
            ids = [token for token in params.allowed_token_ids or () if token < self._vocab_size]
            allowed[row] = False
            allowed[row, ids] = True
        mask: Tensor = pack_bitmask(allowed).to(self._device)
        return mask

    def _logit_bias(self, slots: Int64Array, flags: Int64Array) -> LogitBias:
        entries = [
            (row, token, value)
            for row, _, params in self._asking(slots, flags, BIAS)
            for token, value in (params.logit_bias or {}).items()
            if token < self._vocab_size
        ]
        rows, tokens, values = zip(*entries, strict=True) if entries else ((), (), ())
        return LogitBias(
            self._tensor(np.array(rows, np.int64)),
            self._tensor(np.array(tokens, np.int64)),
            self._tensor(np.array(values, np.float32)),
        )

    def _penalties(self, slots: Int64Array, tables: Int64Array) -> Penalties:
        """Of a row for each of `slots`; -1 in `tables`: none."""
        assert self._output_counts is not None and self._prompt_mask is not None
        return Penalties(
            rows=self._tensor(tables),
            output_counts=self._output_counts,
            prompt_mask=self._prompt_mask,
            presence=self._tensor(self._floats["presence_penalty"][slots]),
            frequency=self._tensor(self._floats["frequency_penalty"][slots]),
            repetition=self._tensor(self._floats["repetition_penalty"][slots]),
        )

    def _min_tokens(self, slots: Int64Array, flags: Int64Array) -> _Conditional:
        entries = []
        for row, slot, params in self._asking(slots, flags, MIN_TOKENS):
            ends = () if params.ignore_eos else self._eos_token_ids
            until = int(self._batch.num_prompt[slot]) + params.min_tokens
            banned = {token for token in (*ends, *params.stop_token_ids) if token < self._vocab_size}
            entries += [(row, token, until) for token in sorted(banned)]
        table = np.array(entries, np.int64).reshape(-1, 3)
        return _Conditional(*(self._tensor(np.ascontiguousarray(table[:, column])) for column in range(3)))

    def _bad_words(self, slots: Int64Array, flags: Int64Array) -> _BadWords:
        words = [
            (row, slot, word)
            for row, slot, params in self._asking(slots, flags, BAD_WORDS)
            for word in params.bad_words_token_ids
            if word and word[-1] < self._vocab_size
        ]
        longest = max((len(word) - 1 for _, _, word in words), default=0)
        before = np.full((len(words), longest), -1, np.int64)
        for index, (_, _, word) in enumerate(words):
            before[index, : len(word) - 1] = word[-2::-1] if len(word) > 1 else ()
        slots_of = np.array([slot for _, slot, _ in words], np.int64)
        return _BadWords(
            rows=self._tensor(np.array([row for row, _, _ in words], np.int64)),
            last=self._tensor(np.array([word[-1] for _, _, word in words], np.int64)),
            before=self._tensor(before),
            counts=self._tensor(np.array([len(word) - 1 for _, _, word in words], np.int64)),
            starts=self._tensor(slots_of * self._batch.width),
            prompts=self._tensor(self._batch.num_prompt[slots_of]),
        )

    def previous(self, watermarked: Tensor, positions: Tensor) -> Tensor:
        """The token before each row's position; -1 where the row is not watermarked. [B] int64."""
        before = self._batch.tokens.view(-1)[(watermarked + positions - 1).clamp(min=0)]
        return torch.where(watermarked >= 0, before, -1)

    def _watermarked(self, slots: Int64Array, flags: Int64Array) -> Tensor:
        return self._tensor(np.where(flags & WATERMARK, slots * self._batch.width, -1))

    def _tensor(self, array: Numbers) -> Tensor:
        return upload(array, self._device)


_FLOATS = ("temperature", "top_p", "min_p", "typical_p", "presence_penalty", "frequency_penalty", "repetition_penalty")


def _flags(params: SamplingParams) -> int:
    """What these parameters ask for."""
    penalized = bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1)
    asked = {
        RANDOM: params.temperature > 0,
        FILTER: params.top_k > 0 or params.top_p < 1 or params.min_p > 0,
        PENALTY: penalized and not params.use_beam_search,
        BIAS: bool(params.logit_bias),
        ALLOWED: params.allowed_token_ids is not None,
        MIN_TOKENS: params.min_tokens > 0,
        BAD_WORDS: bool(params.bad_words_token_ids),
        LOGPROBS: params.needs_logprobs,
        PROMPT_LOGPROBS: params.prompt_logprobs is not None,
        TYPICAL: params.typical_p < 1 and params.temperature > 0,
        WATERMARK: params.watermark,
        BEAM_PENALTY: penalized and params.use_beam_search,
    }
    return sum(flag for flag, on in asked.items() if on)
