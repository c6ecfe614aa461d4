"""BeamSearch: the likeliest continuations of one prompt, a step at a time. Scores only, no sequences and no blocks.

Each step takes the likeliest next tokens of every live beam and orders all of them by their sums of log-probabilities,
in which penalties are. Those among the first `width` that end are set aside, the first `width` of the others are the
next live beams. What is set aside is ranked by sum / length ** length_penalty. The rules are those of
`generate(num_beams=...)` in Transformers 5.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.request import TokenLogprobs
from engine.sampling_params import SamplingParams
from engine.step import Int32Array

Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Beam:
    """A continuation of the prompt: its last token, and the beam that it continues."""

    score: float
    """Sum of its tokens' log-probabilities, penalties in them."""
    parent: Beam | None = None
    token: int = -1
    logprobs: TokenLogprobs | None = None

    def history(self) -> list[Beam]:
        """The beams that it came by, one a token, without the empty one."""
        out, beam = [], self
        while beam.parent is not None:
            out.append(beam)
            beam = beam.parent
        return out[::-1]


@dataclass(frozen=True, slots=True, eq=False)
class Hypothesis:
    """An ended continuation."""

    score: float
    """Length penalty applied."""
    beam: Beam
    finish_reason: str
    """"stop" or "length"."""

    @property
    def token_ids(self) -> list[int]:
        return [beam.token for beam in self.beam.history()]

    @property
    def logprobs(self) -> list[TokenLogprobs]:
        return [beam.logprobs for beam in self.beam.history() if beam.logprobs is not None]


class BeamSearch:
    """One request's beams: `beams` are the live ones, each to be reported on once before every `advance`."""

    def __init__(self, params: SamplingParams, stop_ids: frozenset[int], max_tokens: int) -> None:
        """`stop_ids` end a beam that has min_tokens before it; every beam ends at `max_tokens`, at least 1."""
        self.max_tokens, self.stop_ids = max_tokens, stop_ids
        self.beams = [Beam(0.0)]
        self.finished: list[Hypothesis] = []
        """The best so far, at most `width`, best first."""
        self._params, self._width = params, params.beam_width
        self.num_tokens = 0
        """Of each live beam."""
        self._reports: dict[int, tuple[Int32Array, Float64Array]] = {}

    @property
    def rank_params(self) -> SamplingParams:
        """What the ranks are asked of each beam: its likeliest tokens, as many as could all be among the chosen."""
        return SamplingParams(
            n=self._width,
            use_beam_search=True,
            temperature=0,
            max_tokens=self._params.max_tokens,
            logprobs=self._params.logprobs,
            presence_penalty=self._params.presence_penalty,
            frequency_penalty=self._params.frequency_penalty,
            repetition_penalty=self._params.repetition_penalty,
            stop_token_ids=tuple(sorted(self.stop_ids)),
        )

    def report(self, index: int, top_ids: Int32Array, top_logprobs: npt.NDArray[np.float32]) -> None:
        """The likeliest tokens after beam `index`, best first, all different: `rank_params.num_logprobs` of them.

        Reporting again replaces what was reported.
        """
        self._reports[index] = (top_ids, top_logprobs.astype(np.float64))

    @property
    def complete(self) -> bool:
        """Whether every live beam was reported on."""
        return len(self._reports) == len(self.beams)

    def advance(self) -> list[tuple[int, int]]:
        """Take a step. The new beams as (index of the beam continued, token), best first; none: the search is over."""
        assert self.complete
        self.num_tokens += 1
        last, width = self.num_tokens >= self.max_tokens, self._width
        going: list[tuple[int, Beam]] = []
        for place, (index, beam) in enumerate(self._candidates()):
            if place >= width and (last or len(going) == width):
                break
            stopped = beam.token in self.stop_ids
            if not (stopped or last):
                going.append((index, beam))
            elif place < width:
                score: float = beam.score / self.num_tokens**self._params.length_penalty
                self.finished.append(Hypothesis(score, beam, "stop" if stopped else "length"))
        self.finished.sort(key=lambda hypothesis: -hypothesis.score)
        del self.finished[width:]
        going = going[:width]
        self._reports = {}
        if not going or not self._can_improve(going[0][1]):
            going = []
        self.beams = [beam for _, beam in going]
        return [(index, beam.token) for index, beam in going]

    def results(self) -> list[Hypothesis]:
        """The n best of an ended search, best first."""
        return self.finished[: self._params.n]

    def _candidates(self) -> Iterator[tuple[int, Beam]]:
        """Continuations of all beams, best first, each with the index of the beam that it continues."""
        shown = self._params.logprobs or 0
        early = self.num_tokens <= self._params.min_tokens
        reports = [self._reports[index] for index in range(len(self.beams))]
        sums = np.stack([beam.score + logprobs for beam, (_, logprobs) in zip(self.beams, reports)])
        for flat in np.argsort(-sums, axis=None, kind="stable").tolist():
            index, rank = divmod(flat, sums.shape[1])
            top_ids, top_logprobs = reports[index]
            token = int(top_ids[rank])
            if early and token in self.stop_ids:
                continue
            likeliest = top_ids[:shown].tolist(), top_logprobs[:shown].tolist()
            entry = TokenLogprobs(float(top_logprobs[rank]), rank + 1, *likeliest)
            yield index, Beam(float(sums[index, rank]), self.beams[index], token, entry)

    def _can_improve(self, best: Beam) -> bool:
        """Whether going on could change the hypotheses, as far as early_stopping wants to know."""
        params = self._params
        if len(self.finished) < self._width:
            return True
        if params.early_stopping is True:
            return False
        longest = params.early_stopping == "never" and params.length_penalty > 0
        length = self.max_tokens if longest else self.num_tokens
        hoped: float = best.score / length**params.length_penalty
        return hoped > self.finished[-1].score
