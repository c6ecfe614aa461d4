"""ModelRunner: one step of one rank, from a plan to drawn tokens."""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.layers.attention import Runs, StepInput
from engine.layers.rotary import cos_sin_table
from engine.model_config import ModelConfig
from engine.models.base import Model
from engine.step import PromptLogprobs, StepPlan, StepResult, pack, unpack
from engine.worker.batch import Batch, Entries
from engine.worker.kv_cache import KvCache
from engine.worker.sampler import Sampler, prompt_logprobs, sampled_logprobs
from engine.worker.sampling_state import PROMPT_LOGPROBS, SamplingState

PROMPT_LOGITS_BYTES = 256 << 20
"""Logits of prompt tokens are made for as many rows at a time as fit in this."""


class ModelRunner:
    """Applies plans to the mirror, computes their tokens and draws. Plans come in order."""

    def __init__(
        self, config: EngineConfig, model_config: ModelConfig, model: Model, cache: KvCache, device: torch.device
    ) -> None:
        self._model, self._cache, self._device = model, cache, device
        self._vocab_size = model_config.vocab_size
        self._cos_sin = cos_sin_table(model_config.rope, model_config.head_dim, config.model_len + 1, device)
        self.batch = Batch(config.max_num_seqs, config.model_len, config.block_size, device)
        self._state = SamplingState(
            self.batch, config.max_num_seqs, model_config.vocab_size, model_config.eos_token_ids
        )
        self._sampler = Sampler(self.batch, self._state)

    def clear(self) -> None:
        """Forget every sequence."""
        self.batch.clear()

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Carry out a plan; the tokens drawn are in the mirror when it returns."""
        started_s = perf_counter()
        self._update(plan)
        entries = self.batch.entries(plan)
        self.batch.grow_tables(plan, entries)
        if plan.empty:
            return StepResult(plan.epoch, plan.step)
        hidden = self._model.forward(self._inputs(entries))
        prompts = list(self._prompt_logprobs(plan, entries, hidden))
        self.batch.computed(entries)
        result = StepResult(plan.epoch, plan.step, prompt_logprobs=prompts)
        if plan.sample_seqs:
            logits = self._model.logits(self._last_rows(plan, entries, hidden))
            slots = self.batch.sampled_slots(plan)
            token_ids, rows = self._sampler.sample(logits, slots)
            self.batch.append(slots, token_ids)
            result.logprobs = sampled_logprobs(logits, token_ids, rows)
            result.token_ids = pack(token_ids.to(torch.int32).cpu().numpy())
        result.device_s = perf_counter() - started_s
        return result

    def _update(self, plan: StepPlan) -> None:
        """Drop, add and copy, as the plan says."""
        if plan.dropped:
            self._state.drop(self.batch.drop(plan))
        for new in plan.new:
            self._state.add(self.batch.add(new), new)
        if plan.copies:
            pairs = unpack(plan.copies).astype(np.int64).reshape(-1, 2)
            self._cache.copy(torch.from_numpy(pairs).to(self._device))

    def _inputs(self, entries: Entries) -> StepInput:
        token_ids, positions, slots = self.batch.inputs(entries)
        num_decodes, num_entries = entries.num_decodes, len(entries.slots)
        decodes = prefills = None
        if num_decodes:
            decodes = Runs(*self.batch.tables(entries, 0, num_decodes))
        if num_entries > num_decodes:
            offsets = (entries.offsets[num_decodes:] - num_decodes).astype(np.int32)
            prefills = Runs(
                *self.batch.tables(entries, num_decodes, num_entries),
                cu_seqlens=torch.from_numpy(offsets).to(self._device),
                max_seqlen=int(entries.counts[num_decodes:].max()),
            )
        return StepInput(
            token_ids=token_ids,
            positions=positions,
            slots=slots,
            num_decodes=num_decodes,
            decodes=decodes,
            prefills=prefills,
            caches=self._cache.layers,
            cos_sin=self._cos_sin,
        )

    def _last_rows(self, plan: StepPlan, entries: Entries, hidden: Tensor) -> Tensor:
        """Hidden states [R, hidden_size] that tokens are drawn from: the last of each drawing sequence's entry."""
        sources = unpack(plan.sample_entries)
        if len(sources) == len(hidden) and np.array_equal(sources, np.arange(len(sources))):
            return hidden
        return hidden[torch.from_numpy(entries.offsets[1:][sources] - 1).to(self._device)]

    def _prompt_logprobs(self, plan: StepPlan, entries: Entries, hidden: Tensor) -> Iterator[PromptLogprobs]:
        """Log-probabilities of the prompt tokens that follow the step's tokens, for the sequences that want them."""
        flags = self._state.flags[entries.slots]
        if not (flags & PROMPT_LOGPROBS).any():
            return
        seq_ids = unpack(plan.seq_ids)
        rows_at_once = max(1, PROMPT_LOGITS_BYTES // (4 * self._vocab_size))
        for entry in np.flatnonzero(flags & PROMPT_LOGPROBS).tolist():
            slot, first = int(entries.slots[entry]), int(entries.starts[entry])
            count = self._state.params[slot].prompt_logprobs
            assert count is not None
            last = min(first + int(entries.counts[entry]), int(self.batch.num_prompt[slot]) - 1)
            row = int(entries.offsets[entry])
            for start in range(first, last, rows_at_once):
                end = min(start + rows_at_once, last)
                logits = self._model.logits(hidden[row + start - first : row + end - first])
                following = self.batch.tokens[slot, start + 1 : end + 1]
                yield prompt_logprobs(logits, following, int(seq_ids[entry]), start + 1, count)
