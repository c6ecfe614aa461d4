"""BeamRequests: the beam searches of an engine, and the sequences that are their live beams.

A live beam is a sequence that draws once. It pauses then, holding its blocks, until all beams of its request have
reported what may follow; the beams of the next step are forked from those they continue. Nothing of a search is told
before its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec
import numpy as np

from engine.beam_search import BeamSearch, Hypothesis
from engine.draft import Mask, ScheduledStep
from engine.errors import RequestError
from engine.request import Request, SequenceOutput
from engine.scheduler import Scheduler
from engine.sequence import Group
from engine.step import SampledLogprobs, unpack


class BeamRequests:
    """Moves the searches of one engine's groups on."""

    def __init__(
        self, scheduler: Scheduler, vocab_size: int, eos_token_ids: Iterable[int], new_id: Callable[[], int]
    ) -> None:
        """`new_id` gives sequence ids."""
        self._scheduler, self._vocab_size, self._new_id = scheduler, vocab_size, new_id
        self._eos_ids = frozenset(token for token in eos_token_ids if token < vocab_size)
        self._reported: dict[Group, None] = {}
        """Whose live beams have all drawn, in order. After a restart a beam may have drawn twice."""

    def search(self, request: Request, limit: int) -> BeamSearch:
        """What a request asks for, its beams ending at `limit` tokens. Raises RequestError for a tiny vocabulary."""
        stop_ids = frozenset(request.params.stop_token_ids) | self._ends(request)
        if (wanted := request.params.beam_width + len(stop_ids)) > self._vocab_size:
            field = "best_of" if request.params.best_of else "n"
            message = f"so many beams, and what ends them, need {wanted} tokens of the {self._vocab_size} there are"
            raise RequestError(f"{field}: {message}", param=field)
        return BeamSearch(request.params, stop_ids, limit - request.num_prompt_tokens)

    def read(
        self, scheduled: ScheduledStep, logprobs: list[SampledLogprobs], alive: Mask
    ) -> tuple[list[SampledLogprobs], int]:
        """Take in what a step says of live beams, and clear their flags in `alive` [R].

        The log-probabilities of all others, and how many beams drew.
        """
        others, num_drawn = [], 0
        for entry in logprobs:
            sequence = scheduled.samples[entry.sample]
            group = sequence.group
            if group.search is None:
                others.append(entry)
            elif alive[entry.sample]:
                alive[entry.sample] = False
                num_drawn += 1
                sequence.forget_in_flight()
                group.search.report(
                    sequence.index, unpack(entry.top_ids), np.frombuffer(entry.top_logprobs, np.float32)
                )
                if group.search.complete:
                    self._reported[group] = None
        return others, num_drawn

    def advance(self) -> list[tuple[Group, list[SequenceOutput]]]:
        """Take a step of every search whose beams have all drawn. Those that ended, with what to tell of them."""
        reported, self._reported = self._reported, {}
        ended = []
        for group in reported:
            assert group.search is not None
            if chosen := group.search.advance():
                self._replace(group, chosen)
            else:
                ended.append((group, self._outputs(group, group.search.results())))
        return ended

    def shrink(self, group: Group, limit: int, error: str) -> list[SequenceOutput]:
        """Let the beams of a group end at `limit` tokens from now on; if one is longer, what to tell, with `error`."""
        assert group.search is not None
        group.search.max_tokens = limit - group.request.num_prompt_tokens
        if all(beam.num_tokens < limit for beam in group.sequences.values()):
            return []
        failed = SequenceOutput(group.request.request_id, 0, [], finish_reason="error", error=error)
        return [msgspec.structs.replace(failed, index=index) for index in range(group.request.params.n)]

    def _replace(self, group: Group, chosen: list[tuple[int, int]]) -> None:
        """Let the beams of the next step take the place of those that they continue."""
        parents = group.sequences
        pairs = [
            (parents[parent], parents[parent].continued(index, self._new_id(), token))
            for index, (parent, token) in enumerate(chosen)
        ]
        self._scheduler.branch(list(parents.values()), pairs)
        group.sequences = {child.index: child for _, child in pairs}

    def _outputs(self, group: Group, results: list[Hypothesis]) -> list[SequenceOutput]:
        request, outputs = group.request, []
        num_cached = next(iter(group.sequences.values())).num_cached
        for index, result in enumerate(results):
            tokens, reason = result.token_ids, result.finish_reason
            outputs.append(
                SequenceOutput(
                    request.request_id,
                    index,
                    tokens,
                    finish_reason=reason,
                    stop_reason=tokens[-1] if reason == "stop" and tokens[-1] not in self._ends(request) else None,
                    logprobs=result.logprobs,
                    num_cached_tokens=num_cached,
                )
            )
        return outputs

    def _ends(self, request: Request) -> frozenset[int]:
        """The model's own end of sequence, if the request heeds it."""
        return frozenset() if request.params.ignore_eos else self._eos_ids
