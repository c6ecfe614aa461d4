"""HashExecutor: ranks without a model, strict about everything a plan promises."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np

from engine.config import EngineConfig
from engine.errors import ExecutorDied
from engine.executor import CacheCapacity
from engine.request import SequenceOutput
from engine.step import (
    NewSequence,
    Pooled,
    PromptLogprobs,
    SampledLogprobs,
    StepMasks,
    StepPlan,
    StepResult,
    decode_masks,
    decode_plan,
    encode,
    unpack,
)
from tests.hash_model import attend, draw, fake_logprob, fake_vector, likeliest


class _Mirror:
    """What a rank holds of one sequence."""

    def __init__(self, new: NewSequence) -> None:
        self.new, self.params = new, new.params
        self.tokens: list[int] = unpack(new.token_ids).tolist()
        self.computed = new.num_computed
        self.table: list[int] = unpack(new.block_table).tolist()
        self.seen: list[int] = []
        """What every token computed here left behind: a mean needs all of them."""


class HashExecutor:
    """An Executor whose KV slots hold hashes of their prefix, read back through the block tables.

    The next token is a function of all slots of the sequence, its seed and its position, so that a block freed too
    early, a wrong copy-on-write, a stale prefix hit or a lost preemption changes tokens or fails. A plan that breaks
    the protocol raises AssertionError from submit. Plans run in order at submit; with `lazy`, results come only when
    `release` or `thaw` is called. `fail_at` holds numbers of submissions, counted over all epochs, and `fail_when` says
    it of a plan: their futures raise ExecutorDied, and all later ones, until a restart.
    """

    def __init__(
        self,
        config: EngineConfig,
        num_blocks: int = 1000,
        *,
        block_size: int | None = None,
        eos_every: int = 20,
        lazy: bool = False,
        fail_at: frozenset[int] = frozenset(),
        fail_when: Callable[[StepPlan], bool] = lambda _: False,
        model: Callable[[list[int], int], int] = attend,
    ) -> None:
        self.config, self.num_blocks, self.block_size = config, num_blocks, block_size or config.block_size
        self.eos_every, self.lazy, self.model = eos_every, lazy, model
        self.fail_at, self.fail_when = fail_at, fail_when
        self.epoch = 0
        self.plans: list[StepPlan] = []
        """All plans of this epoch."""
        self.num_submitted = 0
        self.num_restarts = 0
        self.max_batched_tokens = self.max_live = 0
        """The most tokens of a step, and the most sequences known at once."""
        self.running = False
        self._results = threading.Lock()
        """Of lazy and pending: a test lets results out while the engine's thread adds some."""
        self._reset()

    def _reset(self) -> None:
        self.plans = []
        self.mirrors: dict[int, _Mirror] = {}
        self._slots: list[list[int | None]] = [[None] * self.block_size for _ in range(self.num_blocks)]
        self._owners: Counter[int] = Counter()
        self._unborn: Counter[int] = Counter()
        """Blocks by the children forked in this plan, which own what their parent is still computing."""
        self._pending: deque[tuple[Future[StepResult], StepResult]] = deque()
        self._dead = False
        self._awaiting: tuple[StepPlan, Future[StepResult]] | None = None
        """A plan whose masks have not come."""

    def start(self) -> CacheCapacity:
        assert not self.running
        self.running = True
        return CacheCapacity(num_blocks=self.num_blocks, block_size=self.block_size)

    def restart(self) -> CacheCapacity:
        self.epoch += 1
        self.num_restarts += 1
        self._reset()
        self.running = True
        return CacheCapacity(num_blocks=self.num_blocks, block_size=self.block_size)

    def check(self) -> None:
        if self._dead:
            raise ExecutorDied("injected", ranks=(0,))

    def shutdown(self) -> None:
        self.running = False
        while self._pending:
            self._pending.popleft()[0].set_exception(ExecutorDied("shut down"))

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        future: Future[StepResult] = Future()
        number = self.num_submitted
        self.num_submitted += 1
        if number in self.fail_at or self.fail_when(plan):
            self._dead = True
        if self._dead or not self.running:
            future.set_exception(ExecutorDied(f"injected at {number}", ranks=(0,)))
            return future
        assert self._awaiting is None, "a plan before the masks of the last one"
        plan = decode_plan(encode(plan))
        if plan.masked:
            self._awaiting = (plan, future)
        else:
            self._finish(plan, future, None)
        return future

    def send_masks(self, masks: StepMasks) -> None:
        if self._dead or not self.running:
            return
        assert self._awaiting is not None, "masks that no plan awaits"
        plan, future = self._awaiting
        self._awaiting = None
        assert (masks.epoch, masks.step) == (plan.epoch, plan.step), "masks of another step"
        self._finish(plan, future, decode_masks(encode(masks)))

    def _finish(self, plan: StepPlan, future: Future[StepResult], masks: StepMasks | None) -> None:
        result = self._run(plan, masks)
        self.plans.append(plan)
        with self._results:
            if self.lazy:
                self._pending.append((future, result))
                return
        future.set_result(result)

    def release(self, count: int = 1) -> None:
        """Let the oldest results of a lazy executor out."""
        with self._results:
            released = [self._pending.popleft() for _ in range(min(count, len(self._pending)))]
        for future, result in released:
            future.set_result(result)

    def thaw(self) -> None:
        """Be lazy no more: let all results out, and later ones at once."""
        with self._results:
            self.lazy = False
        self.release(len(self._pending))

    # A plan, in the order that engine/step.py gives.

    def _run(self, plan: StepPlan, masks: StepMasks | None) -> StepResult:
        assert plan.epoch == self.epoch, f"plan of epoch {plan.epoch}, this is {self.epoch}"
        assert plan.step == len(self.plans), f"step {plan.step}, expected {len(self.plans)}"
        for seq_id in unpack(plan.dropped).tolist():
            for block in self.mirrors.pop(seq_id).table:
                self._owners[block] -= 1
        for new in plan.new:
            self._add(new)
        scheduled = set(unpack(plan.seq_ids).tolist())
        self._unborn = Counter(
            b for new in plan.new if new.seq_id not in scheduled for b in self.mirrors[new.seq_id].table
        )
        self._copy(plan)
        entries = self._entries(plan)
        states = [self._compute(mirror, count) for mirror, count in entries]
        result = StepResult(plan.epoch, plan.step, device_s=1e-3)
        if any(mirror.params.prompt_logprobs is not None for mirror, _ in entries):
            result.prompt_logprobs = [
                part
                for (mirror, count), state in zip(entries, states)
                if (part := self._prompt_logprobs(mirror, count, state)) is not None
            ]
        self._draw(plan, entries, states, result, _allowed_tokens(plan, masks))
        self.max_live = max(self.max_live, len(self.mirrors))
        return result

    def _add(self, new: NewSequence) -> None:
        assert new.seq_id not in self.mirrors, f"{new.seq_id} is known already"
        mirror = self.mirrors[new.seq_id] = _Mirror(new)
        assert 0 <= new.num_computed <= len(mirror.tokens)
        assert len(mirror.table) >= -(-new.num_computed // self.block_size), "too few blocks for what is computed"
        assert len(set(mirror.table)) == len(mirror.table), "a block twice in a table"
        self._owners.update(mirror.table)

    def _copy(self, plan: StepPlan) -> None:
        pairs = unpack(plan.copies).reshape(-1, 2).tolist()
        sources, targets = [s for s, _ in pairs], [t for _, t in pairs]
        assert len(set(targets)) == len(targets) and not set(targets) & set(sources), "copies depend on their order"
        for source, target in pairs:
            assert not self._owners[target], f"copy to block {target}, which is owned"
            assert self._slots[source][0] is not None, f"copy of block {source}, never written"
            self._slots[target] = list(self._slots[source])
        replaced = unpack(plan.replaced).reshape(-1, 3).tolist()
        assert sorted(block for _, _, block in replaced) == sorted(targets)
        for seq_id, index, block in replaced:
            table = self.mirrors[seq_id].table
            assert (table[index], block) in [tuple(pair) for pair in pairs], "replaced by something else than its copy"
            self._owners[table[index]] -= 1
            self._owners[block] += 1
            table[index] = block

    def _entries(self, plan: StepPlan) -> list[tuple[_Mirror, int]]:
        seq_ids, counts = unpack(plan.seq_ids).tolist(), unpack(plan.num_tokens).tolist()
        appended, blocks = unpack(plan.block_counts).tolist(), deque(unpack(plan.block_ids).tolist())
        assert len(seq_ids) == len(counts) == len(appended) and sum(appended) == len(blocks)
        assert len(set(seq_ids)) == len(seq_ids), "a sequence twice in a plan"
        assert all(count == 1 for count in counts[: plan.num_decodes]) and all(count > 0 for count in counts)
        assert sum(counts) <= self.config.max_num_batched_tokens, "max_num_batched_tokens"
        assert len(self.mirrors) <= self.config.max_num_seqs, "max_num_seqs"
        self.max_batched_tokens = max(self.max_batched_tokens, sum(counts))
        entries = []
        for seq_id, count, more in zip(seq_ids, counts, appended):
            mirror = self.mirrors[seq_id]
            for block in (blocks.popleft() for _ in range(more)):
                assert self._owners[block] == self._unborn[block], f"block {block} is given out twice"
                self._owners[block] += 1
                self._slots[block] = [None] * self.block_size
                mirror.table.append(block)
            entries.append((mirror, count))
        for entry, (mirror, count) in enumerate(entries):
            decode = count == 1 and mirror.computed == len(mirror.tokens) - 1 and mirror.computed > 0
            assert decode or entry >= plan.num_decodes, "a decode that is none"
        return entries

    def _compute(self, mirror: _Mirror, count: int) -> list[int]:
        """Fill the slots of the next `count` tokens; what each of them holds."""
        size, start = self.block_size, mirror.computed
        end = start + count
        assert end <= len(mirror.tokens), "computes tokens it does not have"
        assert end <= self.config.model_len, "max_model_len"
        assert end <= len(mirror.table) * size, "no block for a token"
        assert len(mirror.table) == -(-end // size), "blocks beyond what is computed"
        values: list[int] = []
        for block in mirror.table[: -(-start // size)]:
            values += self._slots[block]  # type: ignore[arg-type]
        del values[start:]
        assert None not in values, "reads a slot never written"
        for position in range(start, end):
            block = mirror.table[position // size]
            assert self._owners[block] - self._unborn[block] == 1, (
                f"writes to block {block} of {self._owners[block]} sequences"
            )
            values.append(self.model(values, mirror.tokens[position]))
            self._slots[block][position % size] = values[-1]
            mirror.seen.append(values[-1])
        mirror.computed = end
        return values[start:]

    def _prompt_logprobs(self, mirror: _Mirror, count: int, states: list[int]) -> PromptLogprobs | None:
        top = mirror.params.prompt_logprobs
        first = mirror.computed - count + 1
        last = min(mirror.computed + 1, mirror.new.num_prompt_tokens)
        if top is None or first >= last:
            return None
        tokens = mirror.tokens[first:last]
        return PromptLogprobs(
            seq_id=mirror.new.seq_id,
            start=first,
            logprobs=np.array([fake_logprob(s, t) for s, t in zip(states, tokens)], "<f4").tobytes(),
            ranks=np.array([1 + s % 5 for s, _ in zip(states, tokens)], "<i4").tobytes(),
            top_ids=np.array([list(range(top)) for _ in tokens], "<i4").tobytes(),
            top_logprobs=np.array(
                [[fake_logprob(s, k) for k in range(top)] for s, _ in zip(states, tokens)], "<f4"
            ).tobytes(),
        )

    def _vector(self, mirror: _Mirror, state: int) -> bytes:
        """The pooled states of a prompt: one number."""
        if mirror.new.pooling == "mean":
            assert len(mirror.seen) == mirror.new.num_prompt_tokens, "a mean of some tokens only"
        return fake_vector(mirror.seen if mirror.new.pooling == "mean" else [state])

    def _draw(
        self,
        plan: StepPlan,
        entries: list[tuple[_Mirror, int]],
        states: list[list[int]],
        result: StepResult,
        allowed: dict[int, list[int]],
    ) -> None:
        drawn: list[int] = []
        seq_ids, sources = unpack(plan.sample_seqs).tolist(), unpack(plan.sample_entries).tolist()
        assert len(seq_ids) == len(sources) and len(set(seq_ids)) == len(seq_ids)
        for sample, (seq_id, entry) in enumerate(zip(seq_ids, sources)):
            mirror, state, params = self.mirrors[seq_id], states[entry][-1], self.mirrors[seq_id].params
            assert mirror.tokens == entries[entry][0].tokens[: entries[entry][0].computed], "draws from other tokens"
            assert mirror.computed == len(mirror.tokens), "draws before all its tokens are computed"
            position, prompt = len(mirror.tokens), mirror.new.num_prompt_tokens
            if mirror.new.pooling is not None:
                assert position == prompt, "an embedded prompt grew"
                result.pooled.append(Pooled(sample, self._vector(mirror, state)))
                drawn.append(0)
                continue
            assert position < self.config.model_len, "draws past max_model_len"
            assert params.max_tokens is None or position < prompt + params.max_tokens, "draws past max_tokens"
            token = draw(state, params, mirror.new.seed, position, prompt, self.eos_every)
            if sample in allowed and token not in allowed[sample]:
                token = allowed[sample][token % len(allowed[sample])]
            drawn.append(token)
            if params.needs_logprobs:
                top = list(range(params.num_logprobs))
                if params.use_beam_search:
                    top = likeliest(state, params.num_logprobs)
                result.logprobs.append(
                    SampledLogprobs(
                        sample=sample,
                        logprob=fake_logprob(state, drawn[-1]),
                        rank=1 + state % 5,
                        top_ids=np.array(top, "<i4").tobytes(),
                        top_logprobs=np.array([fake_logprob(state, k) for k in top], "<f4").tobytes(),
                    )
                )
        for seq_id, token in zip(seq_ids, drawn):
            self.mirrors[seq_id].tokens.append(token)
        result.token_ids = np.array(drawn, "<i4").tobytes()


def _allowed_tokens(plan: StepPlan, masks: StepMasks | None) -> dict[int, list[int]]:
    """The tokens that each masked sample may draw."""
    if masks is None:
        return {}
    samples = unpack(plan.masked).tolist()
    rows = np.frombuffer(masks.bits, np.uint8).reshape(len(samples), -1)
    return {s: np.flatnonzero(np.unpackbits(row, bitorder="little")).tolist() for s, row in zip(samples, rows)}


def engine_config(**changes: object) -> EngineConfig:
    """A resolved configuration for tests; small where it matters."""
    settings: dict[str, object] = {
        "model": "fake",
        "max_model_len": 64,
        "block_size": 8,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        **changes,
    }
    return EngineConfig.from_args(**settings)


class Collected:
    """Gathers outputs by sample, and checks what every stream must keep."""

    def __init__(self) -> None:
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.reasons: dict[tuple[str, int], str] = {}
        self.outputs: list[SequenceOutput] = []

    def add(self, outputs: list[SequenceOutput]) -> None:
        for output in outputs:
            sample = (output.request_id, output.index)
            assert sample not in self.reasons, f"{sample} goes on after its end"
            self.tokens.setdefault(sample, []).extend(output.token_ids)
            if output.finish_reason is not None:
                self.reasons[sample] = output.finish_reason
            self.outputs.append(output)
