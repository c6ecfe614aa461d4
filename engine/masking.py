"""Masking: the grammars of running sequences. Which samples of a step a mask restricts, and the masks themselves.

A mask depends on all tokens before it. One step ahead, the last of them is still being drawn when the next step is
submitted; so a plan only names its masked samples, and their masks follow once the step before it has been read, while
the ranks already compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from engine.draft import ScheduledStep
from engine.grammar import Grammar, GrammarCompiler, GrammarMatcher, fill_masks
from engine.sequence import Sequence
from engine.step import StepMasks, pack

CompilerSource = Callable[[], GrammarCompiler]


class Masking:
    """Holds a matcher for each sequence that has a grammar."""

    def __init__(self, source: CompilerSource) -> None:
        """`source` makes the compiler, when the first grammar comes."""
        self._source = source
        self._compiler: GrammarCompiler | None = None
        self._matchers: dict[int, GrammarMatcher] = {}

    def matcher(self, grammar: Grammar) -> GrammarMatcher:
        """A matcher at the grammar's start. Raises RequestError for a bad grammar, ConfigError without a tokenizer."""
        if self._compiler is None:
            self._compiler = self._source()
        return self._compiler.compile(grammar)

    def add(self, sequence: Sequence, matcher: GrammarMatcher) -> None:
        """Follow a sequence from its start; the output tokens it already has are replayed."""
        for token in sequence.tokens[sequence.num_prompt_tokens :]:
            matcher.accept(token)
        self._matchers[sequence.seq_id] = matcher

    def discard(self, sequence: Sequence) -> None:
        """Forget a sequence, if it has a grammar."""
        self._matchers.pop(sequence.seq_id, None)

    def mark(self, step: ScheduledStep) -> bool:
        """Name the plan's masked samples. Whether there are any."""
        if not self._matchers:
            return False
        step.plan.masked = pack(i for i, sequence in enumerate(step.samples) if sequence.seq_id in self._matchers)
        return bool(step.plan.masked)

    def masks(self, step: ScheduledStep) -> StepMasks:
        """The masks of a plan, when everything before it has been read. A sample that has ended may draw anything."""
        assert self._compiler is not None
        masked = np.frombuffer(step.plan.masked, "<i4").tolist()
        out = np.full((len(masked), self._compiler.mask_words), -1, np.int32)
        live = [(self._matchers.get(int(step.seq_ids[index])), row) for row, index in enumerate(masked)]
        fill_masks([(matcher, row) for matcher, row in live if matcher is not None], out)
        return StepMasks(step.plan.epoch, step.plan.step, out.tobytes())

    def read(self, samples: Iterable[Sequence], tokens: Iterable[int]) -> dict[int, str | None]:
        """Follow the tokens just read. By index of `samples`: who has ended, with an error, or None for a match."""
        ended: dict[int, str | None] = {}
        if not self._matchers:
            return ended
        for index, (sequence, token) in enumerate(zip(samples, tokens)):
            matcher = self._matchers.get(sequence.seq_id)
            if matcher is None:
                continue
            if not matcher.accept(token):
                ended[index] = matcher.error or "no token that the other parameters allow fits the grammar"
            elif matcher.exhausted:
                ended[index] = None
        return ended
