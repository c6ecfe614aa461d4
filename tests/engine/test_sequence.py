"""Sequence and its row in the table."""

from __future__ import annotations

import numpy as np

from engine.request import Request, TokenLogprobs
from engine.sampling_params import SamplingParams
from engine.sequence import Group, Sequence, SequenceTable
from engine.step import PromptLogprobs, pack, unpack


def make(table: SequenceTable, *, index: int = 0, resume: tuple[bytes, ...] = (), **params: object) -> Sequence:
    request = Request(
        request_id="r",
        prompt=pack([1, 2, 3]),
        params=SamplingParams(n=3, **params),  # type: ignore[arg-type]
        seed=11,
        resume=resume,
    )
    return Sequence(Group(request, 0.0), index, 40 + index, (0, 0.0, 0.0, 0, index), 20, table)


def test_a_row_starts_clean_whoever_had_it() -> None:
    table = SequenceTable(1)
    one = make(table, ignore_eos=True, min_tokens=2, stop_token_ids=[4])
    row = one.row
    assert (table.stop_from[row], table.heeds_eos[row], table.has_stop_ids[row]) == (5, False, True)
    table.num_computed[row] = table.num_slots[row] = 9
    table.tail_shared[row], table.last_token_s[row] = True, 1.0
    table.remove(row)
    assert table.seq_id[row] == -1
    two = make(table, index=1)
    assert two.row == row and table.seq_id[row] == 41
    assert (table.num_computed[row], table.num_slots[row], table.tail_shared[row]) == (0, 0, False)
    assert (table.stop_from[row], table.heeds_eos[row], table.has_stop_ids[row]) == (3, True, False)
    assert np.isnan(table.last_token_s[row])


def test_the_table_grows_and_keeps_what_it_holds() -> None:
    table = SequenceTable(2)
    rows = [make(table, index=number).row for number in range(9)]
    assert len(set(rows)) == 9
    assert table.seq_id[rows].tolist() == list(range(40, 49)) and table.limit[rows].tolist() == [20] * 9
    assert int((table.seq_id >= 0).sum()) == 9


def test_a_resumed_sample_has_its_tokens_and_its_own_seed() -> None:
    table = SequenceTable()
    resume = (pack([7]), pack([8, 9]))
    one = make(table, index=1, resume=resume)
    assert list(one.tokens) == [1, 2, 3, 8, 9] and one.num_output_tokens == 2 and one.num_in_flight == 0
    assert table.known[one.row] == table.length[one.row] == 5
    new = one.whole()
    assert unpack(new.token_ids).tolist() == [1, 2, 3, 8, 9] and new.num_prompt_tokens == 3
    assert new.seed == one.group.request.sample_seed(1) and new.seq_id == 41
    assert make(table, index=2, resume=resume).num_output_tokens == 0


def test_only_the_first_sample_is_asked_for_the_prompts_log_probabilities() -> None:
    table = SequenceTable()
    first, second = make(table, prompt_logprobs=2), make(table, index=1, prompt_logprobs=2)
    assert first.wants_prompt_logprobs and first.whole().params.prompt_logprobs == 2
    assert not second.wants_prompt_logprobs and second.whole().params.prompt_logprobs is None
    resumed = make(table, prompt_logprobs=2, resume=(pack([7]),))
    assert not resumed.wants_prompt_logprobs, "it told them before"


def test_log_probabilities_of_a_prompt_are_gathered_in_any_pieces() -> None:
    group = make(SequenceTable(), prompt_logprobs=1).group

    def piece(start: int, values: list[float]) -> PromptLogprobs:
        ids = pack(range(start, start + len(values)))
        floats = np.array(values, "<f4").tobytes()
        return PromptLogprobs(40, start, floats, ids, ids, floats)

    group.gather(piece(1, [-0.5]))
    group.gather(piece(2, []))
    group.gather(piece(2, [-0.25]))
    group.gather(piece(1, [-0.5]))
    assert group.prompt_logprobs == [
        None,
        TokenLogprobs(-0.5, 1, [1], [-0.5]),
        TokenLogprobs(-0.25, 2, [2], [-0.25]),
    ]
