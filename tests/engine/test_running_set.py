"""RunningSet: who holds a seat, and what `settle` takes out."""

from __future__ import annotations

from engine.request import Request
from engine.running_set import RunningSet
from engine.sampling_params import SamplingParams
from engine.sequence import Group, Sequence, SequenceTable, Status


def make(table: SequenceTable, number: int) -> Sequence:
    group = Group(Request.create(str(number), [5, 6, 7], SamplingParams(seed=1)), 0.0)
    return Sequence(group, 0, number, (0, 0.0, 0.0, number, 0), 20, table)


def test_prompts_under_way_come_in_their_order() -> None:
    table = SequenceTable()
    running, sequences = RunningSet(table), [make(table, number) for number in range(4)]
    for number in (2, 0, 3, 1):
        running.admit(sequences[number])
    assert running.prefills == list(running) == sequences
    assert running.last() is sequences[3] and len(running) == 4


def test_a_decode_that_left_frees_its_seat_at_once_and_its_place_at_settle() -> None:
    table = SequenceTable()
    running, sequences = RunningSet(table), [make(table, number) for number in range(3)]
    for sequence in sequences:
        sequence.status = Status.RUNNING
    running.set_decodes(sequences)
    running.settle()
    assert running.decodes.sequences is sequences  # nothing is made anew without need
    running.leave(sequences[1])
    sequences[1].status = Status.WAITING
    assert len(running) == 2 and len(running.decodes) == 3
    assert list(running) == running.running_decodes() == [sequences[0], sequences[2]]
    running.settle()
    assert running.decodes.seq_ids.tolist() == [0, 2]
    assert running.decodes.rows.tolist() == [sequences[0].row, sequences[2].row]


def test_a_paused_beam_is_stuck_once_no_draw_is_in_flight() -> None:
    table = SequenceTable()
    running, sequences = RunningSet(table), [make(table, number) for number in range(2)]
    assert running.stuck() is None
    for sequence in sequences:
        running.pause(sequence)
    table.length[sequences[0].row] += 1
    assert len(running) == 2 and running.stuck() is None
    table.length[sequences[0].row] -= 1
    assert running.stuck() is sequences[1]
    running.leave(sequences[1])
    assert list(running) == [sequences[0]]
