"""ModelRunner: one step of one rank, from a plan to drawn tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.layers.attention import Runs, StepInput
from engine.layers.rotary import cos_sin_table
from engine.model_config import ModelConfig
from engine.models.base import Model
from engine.step import PromptLogprobs, StepMasks, StepPlan, StepResult, pack, unpack
from engine.worker.batch import Batch, Entries, Int64Array
from engine.worker.cuda_graphs import DecodeGraphs
from engine.worker.kv_cache import KvCache
from engine.worker.mixed_graphs import DEPENDENT_LAUNCH_TOKENS, MixedGraphs
from engine.worker.pooling import Pooler
from engine.worker.recorder import Recorder
from engine.worker.recordings import Recordings, all_recordings
from engine.worker.sampler import Sampler, prompt_logprobs, sampled_logprobs
from engine.worker.sampling_state import PROMPT_LOGPROBS, SamplingState
from engine.worker.transfers import Download, upload
from kernels.launch import dependent_launches

PROMPT_LOGITS_BYTES = 256 << 20
"""Logits of prompt tokens are made for as many rows at a time as fit in this."""

Finish = Callable[[], StepResult]


class ModelRunner:
    """Applies plans to the mirror, computes their tokens and draws. Plans come in order.

    On a GPU everything is queued, nothing waited for. With `graphs`, all but the largest steps take static buffers, and
    on a GPU replay CUDA graphs.
    """

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        model: Model,
        cache: KvCache,
        device: torch.device,
        *,
        graphs: bool = False,
    ) -> None:
        self._model, self._cache, self._device = model, cache, device
        self._vocab_size = model_config.vocab_size
        self._cos_sin = cos_sin_table(model_config.rope, model_config.head_dim, config.model_len + 1, device)
        self.batch = Batch(config.max_num_seqs, config.model_len, config.block_size, device)
        self._state = SamplingState(
            self.batch, config.max_num_seqs, model_config.vocab_size, model_config.eos_token_ids
        )
        self._sampler = Sampler(self.batch, self._state)
        self._pooler = Pooler(self.batch, model_config.hidden_size)
        self._graphs: DecodeGraphs | None = None
        self._mixed: MixedGraphs | None = None
        self.recordings = Recordings()
        """What a step may find recorded, for whoever has time."""
        if graphs:
            recorder, shared = Recorder(device), (cache.layers, self._cos_sin)
            self._graphs = DecodeGraphs(model, self.batch, self._state, *shared, recorder)
            self._mixed = MixedGraphs(model, self.batch, config.max_num_batched_tokens, *shared, recorder)
            self.recordings = Recordings(all_recordings(self._mixed, self._graphs))

    def prepare(self, limit_s: float = float("inf")) -> None:
        """Record CUDA graphs, the largest and the smallest first; begin none after limit_s.

        The others are recorded when they are first needed, or by `recordings` ahead of it. With several ranks the
        limit must be none: all record alike.
        """
        if self._device.type == "cuda":
            self.recordings.record_for(limit_s)

    def clear(self) -> None:
        """Forget every sequence."""
        self.batch.clear()

    @torch.inference_mode()
    def run(self, plan: StepPlan, masks: Callable[[], StepMasks] | None = None) -> Finish:
        """Queue a plan on the device; the tokens drawn are in the mirror for the next. `masks` waits for the plan's.

        Returns what makes the result, to be called once the device has come this far.
        """
        self._update(plan)
        entries = self.batch.entries(plan)
        self.batch.grow_tables(plan, entries)
        if plan.empty:
            return lambda: StepResult(plan.epoch, plan.step)
        slots = self.batch.sampled_slots(plan)
        if self._graphs is not None and _all_decode(plan) and not (self._state.flags[slots] & PROMPT_LOGPROBS).any():
            return self._decode(self._graphs, plan, entries, slots, masks)
        drawing = _last_rows(plan, entries)
        with_prompts = self._with_prompt_logprobs(entries)
        needs_all = bool(with_prompts.size) or self._pooler.needs_all(entries)
        hidden = self._forward(entries, np.arange(entries.num_tokens) if needs_all else drawing)
        last = hidden[upload(drawing, self._device)] if needs_all else hidden
        prompts = list(self._prompt_logprobs(plan, entries, with_prompts, hidden))
        pooled = self._pooler.pool(plan, entries, hidden, last)
        self.batch.computed(entries)
        if not plan.sample_seqs:
            return lambda: StepResult(plan.epoch, plan.step, prompt_logprobs=[finish() for finish in prompts])
        if self._pooler.only(slots):
            self.batch.append(slots, torch.zeros(len(slots), dtype=torch.int64, device=self._device))
            nothing = bytes(len(plan.sample_seqs))
            return lambda: StepResult(plan.epoch, plan.step, nothing, pooled=pooled())
        logits = self._model.logits(last)
        token_ids, rows = self._sampler.sample(logits, slots, self._allowed(plan, masks))
        self.batch.append(slots, token_ids)
        drawn = Download(token_ids.to(torch.int32))
        logprobs = sampled_logprobs(logits, token_ids, rows)
        return lambda: StepResult(
            plan.epoch,
            plan.step,
            pack(drawn.numpy()),
            logprobs(),
            [finish() for finish in prompts],
            pooled=pooled(),
        )

    def _forward(self, entries: Entries, rows: Int64Array) -> Tensor:
        """The last hidden states of the step's tokens `rows` [R], [R, hidden_size]."""
        if self._mixed is not None and self._mixed.serves(entries, rows):
            return self._mixed.forward(entries, rows)
        with dependent_launches(entries.num_tokens <= DEPENDENT_LAUNCH_TOKENS):
            return self._model.forward(self._inputs(entries, rows))

    def _decode(
        self,
        graphs: DecodeGraphs,
        plan: StepPlan,
        entries: Entries,
        slots: Int64Array,
        masks: Callable[[], StepMasks] | None,
    ) -> Finish:
        """A step of decodes alone, each drawing its next token."""
        rows = self._state.rows(slots)
        logits = graphs.forward(slots, entries.starts)
        if not plan.masked and graphs.can_draw(rows):
            drawn = Download(graphs.draw(rows))
            token_ids = None
        else:
            token_ids, rows = self._sampler.sample(logits, slots, self._allowed(plan, masks))
            drawn = Download(graphs.append(token_ids))
        self.batch.computed(entries)
        self.batch.num_tokens[slots] += 1
        logprobs = sampled_logprobs(logits, token_ids, rows) if token_ids is not None else list
        return lambda: StepResult(plan.epoch, plan.step, pack(drawn.numpy()), logprobs())

    def _update(self, plan: StepPlan) -> None:
        """Drop, add and copy, as the plan says."""
        if plan.dropped:
            self._state.drop(self.batch.drop(plan))
        for new in plan.new:
            slot = self.batch.add(new)
            self._state.add(slot, new)
            self._pooler.add(slot, new)
        if plan.copies:
            self._cache.copy(upload(unpack(plan.copies).astype(np.int64).reshape(-1, 2), self._device))

    def _allowed(self, plan: StepPlan, masks: Callable[[], StepMasks] | None) -> Tensor | None:
        """The tokens each drawing row may draw, [R, ceil(vocab / 32)] int32 on the device; None: all of them."""
        if not plan.masked:
            return None
        assert masks is not None, "a plan with masked samples came without a way to their masks"
        given = masks()
        assert (given.epoch, given.step) == (plan.epoch, plan.step), "masks of another step"
        allowed = np.full((len(plan.sample_seqs) // 4, -(-self._vocab_size // 32)), -1, np.int32)
        allowed[unpack(plan.masked)] = unpack(given.bits).reshape(-1, allowed.shape[1])
        return upload(allowed, self._device)

    def _inputs(self, entries: Entries, rows: Int64Array) -> StepInput:
        token_ids, positions, slots = self.batch.inputs(entries)
        num_decodes, num_entries = entries.num_decodes, len(entries.slots)
        decodes = prefills = None
        if num_decodes:
            decodes = Runs(*self.batch.tables(entries, 0, num_decodes))
        if num_entries > num_decodes:
            offsets = (entries.offsets[num_decodes:] - num_decodes).astype(np.int32)
            prefills = Runs(
                *self.batch.tables(entries, num_decodes, num_entries),
                cu_seqlens=upload(offsets, self._device),
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
            wanted=None if entries.are_all(rows) else upload(rows, self._device),
        )

    def _with_prompt_logprobs(self, entries: Entries) -> Int64Array:
        """The entries with tokens in front of a prompt token whose log-probability is wanted."""
        wanted = self._state.flags[entries.slots] & PROMPT_LOGPROBS != 0
        return np.flatnonzero(wanted & (entries.starts < self.batch.num_prompt[entries.slots] - 1))

    def _prompt_logprobs(
        self, plan: StepPlan, entries: Entries, with_prompts: Int64Array, hidden: Tensor
    ) -> Iterator[Callable[[], PromptLogprobs]]:
        """Log-probabilities of the prompt tokens that follow the tokens of these entries; hidden [T, hidden_size]."""
        seq_ids = unpack(plan.seq_ids)
        rows_at_once = max(1, PROMPT_LOGITS_BYTES // (4 * self._vocab_size))
        for entry in with_prompts.tolist():
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


def _last_rows(plan: StepPlan, entries: Entries) -> Int64Array:
    """The rows [R] that tokens are drawn from; where none are, one that is of no use: products have a row or more."""
    return entries.last_rows(unpack(plan.sample_entries)) if plan.sample_seqs else np.zeros(1, np.int64)


def _all_decode(plan: StepPlan) -> bool:
    """Whether every entry is a decode that draws its own next token."""
    num_entries = len(plan.seq_ids) // 4
    return (
        plan.num_decodes == num_entries
        and plan.sample_seqs == plan.seq_ids
        and np.array_equal(unpack(plan.sample_entries), np.arange(num_entries))
    )
