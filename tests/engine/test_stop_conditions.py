"""StopConditions: stop tokens, end of sequence, min_tokens and lengths, for one sequence and for a step's draws."""

from __future__ import annotations

import numpy as np
import pytest

from engine.draft import ScheduledStep
from engine.draws import Draws
from engine.request import Request
from engine.sampling_params import SamplingParams
from engine.sequence import Group, Sequence, SequenceTable
from engine.step import Pooled, Pooling, SampledLogprobs, StepPlan, StepResult, pack
from engine.stop_conditions import StopConditions

EOS, STOP, OTHER = 2, 7, 5
VOCAB_SIZE = 10


def make(table: SequenceTable, number: int = 0, *, pooling: Pooling | None = None, **params: object) -> Sequence:
    """A sequence of three prompt tokens, which may have four more."""
    sampling = SamplingParams(seed=1, **params)  # type: ignore[arg-type]
    group = Group(Request.create(str(number), [4, 4, 4], sampling, pooling=pooling), 0.0)
    return Sequence(group, 0, number, (0, 0.0, 0.0, number, 0), 7, table)


def draw(table: SequenceTable, sequences: list[Sequence], tokens: list[int], **result: object) -> Draws:
    rows = np.array([sequence.row for sequence in sequences], np.intp)
    scheduled = ScheduledStep(StepPlan(0, 0), sequences, rows, table.seq_id[rows], len(rows))
    alive = np.array([sequence.seq_id >= 0 for sequence in sequences])
    return Draws(scheduled, StepResult(0, 0, pack(tokens), **result), alive, table)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("params", "tokens", "ended"),
    [
        ({}, [OTHER], None),
        ({}, [EOS], ("stop", None)),
        ({"ignore_eos": True}, [EOS], None),
        ({"stop_token_ids": [STOP]}, [STOP], ("stop", STOP)),
        ({"stop_token_ids": [EOS]}, [EOS], ("stop", None)),
        ({"stop_token_ids": [EOS], "ignore_eos": True}, [EOS], ("stop", EOS)),
        ({"min_tokens": 1, "stop_token_ids": [STOP]}, [STOP], None),
        ({"min_tokens": 1, "stop_token_ids": [STOP]}, [STOP, STOP], ("stop", STOP)),
        ({"min_tokens": 1}, [EOS, OTHER, OTHER, OTHER], ("length", None)),
        ({}, [OTHER, OTHER, OTHER, EOS], ("stop", None)),
    ],
)
def test_a_draw_ends_what_the_rules_say(params: dict[str, object], tokens: list[int], ended: object) -> None:
    table = SequenceTable()
    conditions, sequence = StopConditions(VOCAB_SIZE, [EOS, VOCAB_SIZE + 3], table), make(table, **params)
    for number, token in enumerate(tokens):
        draws = draw(table, [sequence], [token])
        draws.take(table, [])
        wanted = ended if number == len(tokens) - 1 else None
        assert conditions.ended(sequence, token) == wanted
        assert conditions.ends(draws) == ([(0, wanted)] if wanted else [])


def test_those_that_are_gone_take_nothing() -> None:
    table = SequenceTable()
    sequences = [make(table, number, logprobs=1) for number in range(3)]
    sequences[1].seq_id = -1
    conditions = StopConditions(VOCAB_SIZE, [EOS], table)
    logprob = SampledLogprobs(2, -0.5, 1, pack([EOS]), np.array([-0.5], "<f4").tobytes())
    draws = draw(table, sequences, [OTHER, EOS, EOS])
    outputs = draws.take(table, [logprob])
    assert (draws.num_lost, draws.token_ids) == (1, [OTHER, EOS])
    assert [sequence.num_output_tokens for sequence in sequences] == [1, 0, 1]
    assert [output.request_id for output in outputs] == ["0", "2"]
    assert outputs[0].logprobs is None
    assert outputs[1].logprobs is not None and outputs[1].logprobs[0].top_ids == [EOS]
    assert conditions.ends(draws) == [(1, ("stop", None))]


def test_an_embedded_prompt_has_its_vector_for_a_token() -> None:
    table = SequenceTable()
    sequences = [make(table), make(table, 1, pooling="last")]
    table.limit[sequences[1].row] = 4  # as Limits.length says
    draws = draw(table, sequences, [OTHER, 0], pooled=[Pooled(1, b"vector")])
    plain, embedded = draws.take(table, [])
    assert (plain.token_ids, plain.embedding) == ([OTHER], None)
    assert (embedded.token_ids, embedded.embedding) == ([], b"vector")
    assert draws.num_vectors == 1
    assert StopConditions(VOCAB_SIZE, [EOS], table).ends(draws) == [(1, ("stop", None))]
