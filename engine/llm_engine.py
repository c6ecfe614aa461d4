"""LLMEngine: the life of requests, from acceptance to their last token. No I/O and no loop of its own.

    begin_step   schedule -> submit          up to config.steps_ahead plans in flight
    finish_step  wait for the oldest -> read its tokens -> end what has stopped -> outputs

Finish reasons by token are decided here, after the fact: a sequence may have been scheduled past its stop token by the
steps in flight, and what those draw for it is thrown away. Lengths are known beforehand and never exceeded.
"""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future

import msgspec
import numpy as np

from engine.beam_requests import BeamRequests
from engine.block_manager import BlockManager
from engine.config import EngineConfig
from engine.draft import ScheduledStep
from engine.draws import Draws
from engine.errors import ExecutorDied, RequestError
from engine.executor import CacheCapacity, Executor
from engine.grammar import GrammarCompiler
from engine.limits import Limits
from engine.masking import Masking
from engine.metrics import EngineMetrics, EngineStats
from engine.request import Request, SequenceOutput
from engine.scheduler import Scheduler
from engine.sequence import Group, Sequence, Status
from engine.step import StepResult, unpack
from engine.stop_conditions import StopConditions


class LLMEngine:
    """Turns requests into tokens, on the ranks behind an executor. Not thread-safe: one thread drives it.

    `config` is resolved; `vocab_size` is the model's; `eos_token_ids` end a sample unless it ignores them. When
    begin_step, finish_step or recover raise ExecutorDied, nothing is lost: call `recover`, as often as it takes.
    """

    def __init__(
        self, config: EngineConfig, executor: Executor, *, vocab_size: int, eos_token_ids: tuple[int, ...]
    ) -> None:
        self.config, self.executor, self.vocab_size = config, executor, vocab_size
        self.metrics = EngineMetrics()
        self._eos_token_ids = eos_token_ids
        self._groups: dict[str, Group] = {}
        self._in_flight: deque[tuple[ScheduledStep | None, Future[StepResult]]] = deque()
        self._ready: list[SequenceOutput] = []
        """Outputs that wait for the next finish_step: of samples that ended without a step."""
        self._listeners: dict[int, Group] = {}
        """Who waits for the prompt's log-probabilities that a sequence computes."""
        folder = config.tokenizer or config.model
        self._masking = Masking(lambda: GrammarCompiler.load(folder, vocab_size, eos_token_ids))
        self._unmasked: ScheduledStep | None = None
        """The last submitted step, while the ranks await its masks."""
        self._epoch = self._next_step = 0
        self._num_arrivals = self._num_sequences = 0

    def start(self) -> CacheCapacity:
        """Start the ranks; what they can hold. Must come before anything else."""
        capacity = self.executor.start()
        self.blocks = BlockManager(capacity.num_blocks, capacity.block_size, caching=self.config.enable_prefix_caching)
        self.scheduler = Scheduler(self.config, self.blocks)
        self._stops = StopConditions(self.vocab_size, self._eos_token_ids, self.scheduler.table)
        self._beams = BeamRequests(self.scheduler, self.vocab_size, self._eos_token_ids, self._new_id)
        self._limits = Limits(self.config, self.vocab_size, capacity.num_blocks, capacity.block_size)
        return capacity

    # Requests.

    def add_request(self, request: Request) -> None:
        """Accept a request; its tokens come from finish_step.

        Of a resumed request only further tokens come; a sample that had ended already ends again, without tokens. A
        beam search begins anew: nothing of it was told.
        Raises PromptTooLong, naming the limit, for what can never fit, and RequestError for what cannot be run.
        """
        if request.request_id in self._groups:
            raise RequestError(f"request_id: {request.request_id!r} is already running", param="request_id")
        self._limits.check(request)
        limit = self._limits.length(request)
        params = request.params
        search = None
        if params.use_beam_search:
            request = msgspec.structs.replace(request, resume=())
            search = self._beams.search(request, limit)
            limit = request.num_prompt_tokens + 1  # of its first beam, which is the prompt
        matcher = self._masking.matcher(params.grammar) if params.grammar is not None else None
        group = Group(request, time.perf_counter(), self.scheduler.shares.enter(request.tenant), search)
        priority = params.priority if self.config.policy == "priority" else 0
        key = (priority, 0.0, request.arrival_s, self._num_arrivals)
        self._num_arrivals += 1
        for index in range(params.num_sequences if search is None else 1):
            sequence = Sequence(group, index, self._new_id(), (*key, index), limit, self.scheduler.table)
            group.sequences[index] = sequence
            if matcher is not None:
                self._masking.add(sequence, matcher.copy())
        self._groups[request.request_id] = group
        self.metrics.num_requests += 1
        self.metrics.prompt_tokens += request.num_prompt_tokens
        self.scheduler.enqueue(group, list(group.sequences.values()))
        for sequence in list(group.sequences.values()):
            if sequence.num_output_tokens and (ended := self._stops.ended(sequence, sequence.tokens[-1])):
                self._ready.append(self._last_output(sequence, *ended))

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End a request, or one sample of it; nothing more comes of it. Its blocks are free for the next step.

        Unknown and finished ones are ignored, and so is one output of a beam search, which is not known before all are.
        """
        group = self._groups.get(request_id)
        if group is None or (group.search is not None and index is not None):
            return
        sequences = [s for s in group.sequences.values() if index is None or s.index == index]
        if sequences:
            self.metrics.num_aborted += 1
        for sequence in sequences:
            self._forget(sequence)
        self._ready = [o for o in self._ready if o.request_id != request_id or index not in (None, o.index)]

    def groups(self) -> list[Group]:
        """Unfinished requests, oldest first."""
        return list(self._groups.values())

    def searched(self, request_id: str) -> int:
        """How many tokens a beam search, of which nothing is told before its end, has got to; 0 of other requests."""
        group = self._groups.get(request_id)
        return group.search.num_tokens if group is not None and group.search is not None else 0

    @property
    def has_unfinished(self) -> bool:
        """Whether finish_step has more to tell."""
        return bool(self._groups or self._ready)

    # Steps.

    @property
    def num_in_flight(self) -> int:
        """Steps submitted and not finished."""
        return len(self._in_flight)

    @property
    def next_step(self) -> ScheduledStep | None:
        """The step that the next finish_step reads; None when none is in flight, or it computes nothing."""
        return self._in_flight[0][0] if self._in_flight else None

    def next_future(self) -> Future[StepResult] | None:
        """What the next finish_step waits for."""
        return self._in_flight[0][1] if self._in_flight else None

    def in_flight_requests(self) -> set[str]:
        """Requests that are part of the step that finish_step would read next."""
        scheduled = self.next_step
        seq_ids = set(unpack(scheduled.plan.seq_ids).tolist()) if scheduled is not None else set()
        return {s.request_id for g in self._groups.values() for s in g.sequences.values() if s.seq_id in seq_ids}

    def begin_step(self) -> bool:
        """Schedule and submit a step. False when enough are in flight or there is nothing to compute.

        Raises ExecutorDied.
        """
        if len(self._in_flight) >= self.config.steps_ahead or self._unmasked is not None:
            return False
        scheduled = self.scheduler.schedule(self._epoch, self._next_step)
        if scheduled is None:
            if not self._ready or self._in_flight:
                return False
            future: Future[StepResult] = Future()  # nothing to compute, but something to tell
            future.set_result(StepResult(self._epoch, -1))
            self._in_flight.append((None, future))
            return True
        self._next_step += 1
        if scheduled.plan.new:
            self._note_first_steps(scheduled)
        if self._masking.mark(scheduled):
            self._unmasked = scheduled
        self._in_flight.append((scheduled, self.executor.submit(scheduled.plan)))
        self._send_masks()
        self.metrics.num_steps += 1
        self.metrics.computed_tokens += scheduled.num_tokens
        return True

    def finish_step(self, timeout_s: float | None = None) -> list[SequenceOutput]:
        """Read the oldest step in flight: the new tokens of each sample that drew one.

        Empty when nothing is in flight. Raises ExecutorDied when the step failed, and TimeoutError when it is not done
        in time; it stays in flight then.
        """
        if not self._in_flight:
            ready, self._ready = self._ready, []
            return ready
        scheduled, future = self._in_flight[0]
        result = future.result(timeout_s)
        self._in_flight.popleft()
        ready, self._ready = self._ready, []
        if scheduled is None:
            return ready
        plan = scheduled.plan
        if (result.epoch, result.step) != (plan.epoch, plan.step) or len(result.token_ids) != len(plan.sample_seqs):
            raise ExecutorDied(
                f"step {plan.step} of epoch {plan.epoch} was answered with {len(result.token_ids) // 4} tokens of step "
                f"{result.step} of epoch {result.epoch}"
            )
        if result.device_s:
            self.metrics.step_s.observe(result.device_s)
        outputs = self._read(scheduled, result)
        for group, found in self._beams.advance():
            outputs += self._end_search(group, found)
        self._send_masks()
        return ready + outputs

    def _send_masks(self) -> None:
        """Give the ranks the masks they await, if everything before that step has been read."""
        if self._unmasked is not None and self._in_flight[0][0] is self._unmasked:
            step, self._unmasked = self._unmasked, None
            began_s = time.perf_counter()
            masks = self._masking.masks(step)
            self.metrics.mask_s.observe(time.perf_counter() - began_s)
            self.executor.send_masks(masks)

    def step(self) -> list[SequenceOutput]:
        """Fill the pipeline and finish its oldest step."""
        while self.begin_step():
            pass
        return self.finish_step()

    def recover(self) -> None:
        """Restart the ranks and begin a new epoch; everything that ran is preempted and will be sent whole again.

        Each call counts as one epoch, failed or not. Raises what Executor.restart raises: call it again then.
        """
        self._in_flight.clear()
        self._unmasked = None
        self._epoch += 1
        self._next_step = 0
        self.metrics.num_recoveries += 1
        capacity = self.executor.restart()
        assert capacity.block_size == self.blocks.block_size, "block_size never changes"
        changed = capacity.num_blocks != self.blocks.num_blocks
        unfinished = [s for group in self._groups.values() for s in group.sequences.values()]
        self.scheduler.restart(capacity.num_blocks, unfinished)
        if changed:
            self._shrink()

    def shutdown(self) -> None:
        """End the ranks. Idempotent."""
        self.executor.shutdown()

    def stats(self) -> EngineStats:
        """What the engine does now, and counts since it was made. Costs a look at every running sequence."""
        scheduler, blocks, table = self.scheduler, self.blocks.stats(), self.scheduler.table
        rows = [sequence.row for sequence in scheduler.running]
        slots = int(table.num_slots[rows].sum()) if rows else 0
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            num_blocks=blocks.num_blocks,
            free_blocks=blocks.free,
            used_blocks=blocks.used,
            cached_blocks=blocks.cached,
            shared_blocks=blocks.shared,
            saved_blocks=blocks.saved,
            kv_utilization=int(table.num_computed[rows].sum()) / slots if slots else 1.0,
            prefix_query_tokens=scheduler.prefix_query_tokens,
            prefix_hit_tokens=scheduler.prefix_hit_tokens,
            preemptions=scheduler.num_preemptions,
            steps=self.metrics.num_steps,
            generated_tokens=self.metrics.generated_tokens,
            recoveries=self.metrics.num_recoveries,
        )

    def _new_id(self) -> int:
        """A sequence id that nothing in flight remembers: 31 bits, not used again for a long time."""
        self._num_sequences = (self._num_sequences + 1) & 0x7FFFFFFF
        return self._num_sequences

    # Results.

    def _read(self, scheduled: ScheduledStep, result: StepResult) -> list[SequenceOutput]:
        """Append the tokens of a step to their sequences and end those that have stopped."""
        table, metrics = self.scheduler.table, self.metrics
        for part in result.prompt_logprobs:
            if (group := self._listeners.get(part.seq_id)) is not None:
                group.gather(part)
        alive = table.seq_id[scheduled.rows] == scheduled.seq_ids
        logprobs, num_beams = self._beams.read(scheduled, result.logprobs, alive) if result.logprobs else ([], 0)
        draws = Draws(scheduled, result, alive, table)
        metrics.generated_tokens += num_beams
        metrics.surplus_tokens += draws.num_lost - num_beams
        if not draws.samples:
            return []
        outputs = draws.take(table, logprobs)
        metrics.generated_tokens += len(outputs) - draws.num_vectors
        self._note_token_times(draws, outputs)
        self._register(draws)
        self._end_stopped(draws, outputs)
        return outputs

    def _register(self, draws: Draws) -> None:
        """Let the prefix cache know the blocks that are full now that their last token is."""
        if not self.blocks.caching:
            return
        for index in np.flatnonzero(draws.known % self.blocks.block_size == 0).tolist():
            sequence = draws.samples[index]
            if sequence.status is Status.RUNNING:
                self.blocks.register(sequence, int(draws.known[index]))

    def _end_stopped(self, draws: Draws, outputs: list[SequenceOutput]) -> None:
        """End those whose draw, or whose grammar, says so; their outputs tell why."""
        matched = self._masking.read(draws.samples, draws.token_ids)
        for index, (reason, stop) in self._stops.ends(draws):
            outputs[index].finish_reason, outputs[index].stop_reason = reason, stop
            self._end(draws.samples[index], reason)
        for index, error in matched.items():
            output = outputs[index]
            if output.finish_reason is None:
                output.finish_reason, output.error = "stop" if error is None else "error", error
                output.matched = error is None
                self._end(draws.samples[index], output.finish_reason)

    def _end(self, sequence: Sequence, reason: str) -> None:
        self.metrics.finished[reason] += 1
        self._forget(sequence)

    def _last_output(
        self, sequence: Sequence, reason: str, stop: int | None, error: str | None = None
    ) -> SequenceOutput:
        """End a sequence that is in no step; what to tell of it."""
        self._end(sequence, reason)
        return SequenceOutput(
            sequence.request_id, sequence.index, [], finish_reason=reason, stop_reason=stop, error=error
        )

    def _end_search(self, group: Group, outputs: list[SequenceOutput]) -> list[SequenceOutput]:
        """End a beam search with `outputs`, one for each of its n; these."""
        self.metrics.first_token_s.observe(time.perf_counter() - group.accepted_s)
        for output in outputs:
            self.metrics.finished[output.finish_reason or "stop"] += 1
        for sequence in list(group.sequences.values()):
            self._forget(sequence)
        return outputs

    def _forget(self, sequence: Sequence) -> None:
        group = sequence.group
        del group.sequences[sequence.index]
        self._masking.discard(sequence)
        self._listeners.pop(sequence.seq_id, None)
        self.scheduler.finish(sequence)
        if not group.sequences:
            del self._groups[sequence.request_id]
            self.scheduler.shares.leave(group.request.tenant)

    def _shrink(self) -> None:
        """The restarted ranks hold another number of blocks: move the limits, end what does not fit any more."""
        self._limits = Limits(self.config, self.vocab_size, self.blocks.num_blocks, self.blocks.block_size)
        error = f"after a restart the KV cache holds only {self.blocks.num_blocks} blocks"
        for group in list(self._groups.values()):
            limit = self._limits.length(group.request)
            if group.search is not None:
                if failed := self._beams.shrink(group, limit, error):
                    self._ready += self._end_search(group, failed)
                continue
            for sequence in list(group.sequences.values()):
                self.scheduler.table.limit[sequence.row] = limit
                if sequence.num_tokens >= limit:
                    self._ready.append(self._last_output(sequence, "error", None, error))

    def _note_first_steps(self, scheduled: ScheduledStep) -> None:
        """Requests that were in no step before: how long they waited, and whether their prompt is listened to."""
        for new in scheduled.plan.new:
            group = self._groups[new.request_id]
            if not group.started:
                group.started = True
                self.metrics.queue_s.observe(time.perf_counter() - group.accepted_s)
            if new.params.prompt_logprobs is not None:
                self._listeners[new.seq_id] = group

    def _note_token_times(self, draws: Draws, outputs: list[SequenceOutput]) -> None:
        """Measure the gaps between tokens, and put what is told once on first tokens."""
        table, now = self.scheduler.table, time.perf_counter()
        gaps = now - table.last_token_s[draws.rows]
        table.last_token_s[draws.rows] = now
        first = np.isnan(gaps)
        if first.any():
            for index in np.flatnonzero(first).tolist():
                sequence, output = draws.samples[index], outputs[index]
                self.metrics.first_token_s.observe(now - sequence.group.accepted_s)
                output.num_cached_tokens = sequence.num_cached
                if sequence.wants_prompt_logprobs:
                    output.prompt_logprobs, sequence.group.prompt_logprobs = sequence.group.prompt_logprobs, None
                    self._listeners.pop(sequence.seq_id, None)
            gaps = gaps[~first]
        self.metrics.token_gap_s.observe_many(gaps)
