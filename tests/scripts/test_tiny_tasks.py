"""The made-up tasks: right answers, a clean held-out split, and a stream that is the same every time."""

from __future__ import annotations

import json
from itertools import pairwise
from random import Random

import numpy as np
import pytest
from tokenizers import Tokenizer

from scripts import tiny_facts, tiny_tasks
from scripts.tiny_chats import TASKS, held_out_examples, make_conversation
from scripts.tiny_json import make_json_extract, make_json_list, make_json_object
from scripts.tiny_stream import (
    ANSWER_WEIGHT,
    LONG_EVERY,
    LONG_ROW_TOKENS,
    ROW_TOKENS,
    BatchStream,
    RowPacker,
    nth_batch,
)
from scripts.tiny_tasks import Example, carelessly, is_held_out, make
from scripts.tiny_tokenizer import BOS_ID

ROUNDS = 300


def made(maker: tiny_tasks.Maker, *, held_out: bool = False) -> list[Example]:
    rng = Random(3)
    return [make(maker, rng, held_out=held_out) for _ in range(ROUNDS)]


@pytest.mark.parametrize(
    "maker",
    [
        tiny_tasks.make_add,
        tiny_tasks.make_add_large,
        tiny_tasks.make_subtract,
        tiny_tasks.make_subtract_large,
        tiny_tasks.make_times_table,
        tiny_tasks.make_divide,
        tiny_tasks.make_multiply,
    ],
)
def test_every_step_of_a_sum_has_the_same_value(maker: tiny_tasks.Maker) -> None:
    for example in made(maker):
        values = {eval(side, {}) for side in example.answer.split(" = ")}  # our own digits and operators
        assert len(values) == 1, example
        if example.value is not None:
            assert values == {example.value}


def test_reversed_letters_read_the_same_backwards() -> None:
    for example in made(tiny_tasks.make_reverse_letters):
        assert example.answer[::-1] in example.prompt
        assert example.answer[::-1].lower() == example.key


def words_of(example: Example) -> list[str]:
    return example.answer.split(", ")


def test_sorted_and_reversed_lists_hold_the_words_of_the_prompt() -> None:
    for example in made(tiny_tasks.make_sort_words):
        words = words_of(example)
        assert words == sorted(set(words))
        assert all(word in example.prompt for word in words)
    for example in made(tiny_tasks.make_reverse_words):
        asked = example.prompt.replace(",", " ,").replace(".", " .").split()
        places = [asked.index(word) for word in words_of(example)]
        assert places == sorted(places, reverse=True)
    for example in made(tiny_tasks.make_sort_numbers):
        numbers = [int(word) for word in words_of(example)]
        assert numbers == sorted(numbers)


def test_counting_is_even_and_covers_what_was_asked() -> None:
    for example in made(tiny_tasks.make_count):
        numbers = [int(number) for number in example.answer.split(", ")]
        steps = {b - a for a, b in pairwise(numbers)}
        assert len(steps) == 1
        assert str(numbers[-1]) in example.prompt
    for example in made(tiny_tasks.make_count_letters):
        assert f'"{example.key}"' in example.answer
        assert str(example.value) in example.answer


def test_json_answers_parse_and_use_what_the_prompt_says() -> None:
    for maker in (make_json_object, make_json_extract, make_json_list):
        for example in made(maker):
            found = json.loads(example.answer)
            values = found.values() if isinstance(found, dict) else found
            for value in values:
                assert (value if isinstance(value, str) else json.dumps(value)) in example.prompt


def test_any_object_with_the_asked_fields_is_right() -> None:
    example = Example("json_invented", "", "", None, keys=("name", "age"))
    assert example.is_right('{"name": "Zoe", "age": null}')
    assert not example.is_right('{"age": 3, "name": "Zoe"}')
    assert not example.is_right('{"name": "Zoe"}')
    assert not example.is_right('["name", "age"]')
    assert not example.is_right('{"name": "Zoe", "age": ')


def test_an_answer_is_right_only_when_equal() -> None:
    example = Example("add", "1 + 1", "1 + 1 = 2", "add 1 1")
    assert example.is_right(" 1 + 1 = 2\n")
    assert not example.is_right("1 + 1 = 3")
    assert not example.is_right("2")


def _name(value: object) -> str:
    """A parameter's name, the same in every process."""
    return getattr(value, "__name__", None) or str(value)


@pytest.mark.parametrize("task, maker", [(task, maker) for task, _, maker in TASKS], ids=_name)
def test_training_never_yields_a_held_out_question(task: str, maker: tiny_tasks.Maker) -> None:
    training, held_out = made(maker), made(maker, held_out=True)
    if training[0].key is None:
        assert all(example.key is None for example in training + held_out), task
        return
    assert not any(is_held_out(example.key) for example in training if example.key is not None)
    assert all(is_held_out(example.key) for example in held_out if example.key is not None)
    assert not {example.prompt for example in training} & {example.prompt for example in held_out}


def test_about_a_tenth_of_the_sums_is_held_out() -> None:
    held_out = sum(is_held_out(f"add {a} {b}") for a in range(100) for b in range(a, 100))
    assert 0.08 < held_out / 5050 < 0.12


def test_held_out_words_are_never_a_training_task() -> None:
    rng = Random(4)
    seen = {word for _ in range(2000) for word in tiny_tasks.pick_words(rng, held_out=False)}
    assert len(tiny_tasks.HELD_OUT_WORDS) > 40
    assert not seen & set(tiny_tasks.HELD_OUT_WORDS)
    assert set(tiny_tasks.HELD_OUT_WORDS) | set(tiny_tasks.TRAINING_WORDS) == set(tiny_facts.WORDS)


def test_no_held_out_question_appears_in_conversations() -> None:
    questions = {e.prompt for t, examples in held_out_examples(9, 200).items() for e in examples if e.key is not None}
    rng = Random(5)
    asked = {message.content for _ in range(3000) for message in make_conversation(rng) if message.role == "user"}
    assert len(questions) > 2000
    assert not asked & questions


def test_careless_typing_keeps_words_and_numbers() -> None:
    rng = Random(6)
    for _, _, maker in TASKS:
        example = make(maker, rng, held_out=False)
        careless = carelessly(example, rng)
        assert careless.answer == example.answer
        assert careless.prompt.lower().rstrip(".?!") == example.prompt.lower().rstrip(".?!")


def test_held_out_examples_are_different_and_repeatable() -> None:
    first, second = held_out_examples(7, 30), held_out_examples(7, 30)
    assert first == second
    assert held_out_examples(8, 30) != first
    for examples in first.values():
        assert len({example.prompt for example in examples}) == len(examples)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file("configs/tiny/tokenizer.json")


def test_rows_start_with_a_document_and_weigh_answers_most(tokenizer: Tokenizer) -> None:
    batch = RowPacker(tokenizer).batch(Random(1), rows=4, row_tokens=256)
    assert batch.tokens.shape == batch.weights.shape == (4, 256)
    assert (batch.tokens[:, 0] == BOS_ID).all()
    assert (batch.weights[batch.tokens == BOS_ID] == 0).all()
    for row, weights in zip(batch.tokens, batch.weights, strict=True):
        text = tokenizer.decode([int(token) for token in row[weights == ANSWER_WEIGHT]], skip_special_tokens=False)
        assert "<|user|>" not in text
        assert "<|end|>" in text


def test_batch_n_depends_on_seed_and_n_only(tokenizer: Tokenizer) -> None:
    packer, size = RowPacker(tokenizer), LONG_ROW_TOKENS
    long_batch = nth_batch(packer, 0, LONG_EVERY - 1, size)
    assert long_batch.tokens.shape == (1, LONG_ROW_TOKENS)
    first = nth_batch(packer, 0, 0, size)
    assert first.tokens.shape == (LONG_ROW_TOKENS // ROW_TOKENS, ROW_TOKENS)
    assert np.array_equal(first.tokens, nth_batch(packer, 0, 0, size).tokens)
    assert not np.array_equal(first.tokens, nth_batch(packer, 1, 0, size).tokens)
    assert not np.array_equal(first.tokens, nth_batch(packer, 0, 1, size).tokens)


def test_the_stream_is_the_same_with_any_number_of_workers(tokenizer: Tokenizer) -> None:
    # Spawned here: this process may have threads of other tests, which a fork would cut off.
    streams = [BatchStream(tokenizer, 0, LONG_ROW_TOKENS, num_workers=n, start_method="spawn") for n in (1, 3)]
    try:
        for n, (one, three) in enumerate(zip(*streams, strict=False)):
            assert np.array_equal(one.tokens, three.tokens)
            assert np.array_equal(one.weights, three.weights)
            if n == 4:
                break
    finally:
        for stream in streams:
            stream.close()
