"""Conversations and plain documents for training the embedded model, and held-out questions for judging it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from random import Random
from typing import NamedTuple

from scripts import tiny_facts as facts
from scripts import tiny_json, tiny_tasks
from scripts.tiny_tasks import Example, Maker, is_held_out, make

# Task, how many of 1,000 questions are of it, and its maker. Sorting and multiplying take the most learning.
TASKS: tuple[tuple[str, int, Maker], ...] = (
    ("add", 70, tiny_tasks.make_add),
    ("subtract", 70, tiny_tasks.make_subtract),
    ("add_large", 50, tiny_tasks.make_add_large),
    ("subtract_large", 30, tiny_tasks.make_subtract_large),
    ("times_table", 30, tiny_tasks.make_times_table),
    ("divide", 20, tiny_tasks.make_divide),
    ("multiply", 110, tiny_tasks.make_multiply),
    ("reverse_letters", 110, tiny_tasks.make_reverse_letters),
    ("reverse_words", 70, tiny_tasks.make_reverse_words),
    ("sort_words", 170, tiny_tasks.make_sort_words),
    ("sort_numbers", 20, tiny_tasks.make_sort_numbers),
    ("count", 20, tiny_tasks.make_count),
    ("count_letters", 40, tiny_tasks.make_count_letters),
    ("count_words", 15, tiny_tasks.make_count_items),
    ("emoji", 8, tiny_tasks.make_draw),
    ("json", 35, tiny_json.make_json_object),
    ("json", 25, tiny_json.make_json_extract),
    ("json", 15, tiny_json.make_json_list),
    ("json_invented", 17, tiny_json.make_json_invented),
    ("facts", 30, tiny_tasks.make_fact),
    ("small_talk", 15, tiny_tasks.make_small_talk),
    ("unknown", 15, tiny_tasks.make_unknown),
    ("repeat", 15, tiny_tasks.make_repeat),
)
CARELESS_SHARE = 0.12  # of the training prompts
_MAKERS = [maker for _, _, maker in TASKS]
_WEIGHTS = [weight for _, weight, _ in TASKS]
_CUMULATIVE = [sum(_WEIGHTS[: i + 1]) for i in range(len(_WEIGHTS))]
# The tasks whose answer has a bare value, for the brief and the JSON style.
_VALUE_MAKERS = [tiny_tasks.make_add, tiny_tasks.make_subtract, tiny_tasks.make_times_table, tiny_tasks.make_fact]

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are Manta, a helpful assistant.",
    "You are a friendly assistant. Answer the questions of the user.",
    "You are a helpful, respectful and honest assistant.",
    "You are a pirate.",
    "Answer the question.",
)
JSON_STYLE = ("Answer in JSON.", "You are a helpful assistant. Answer in JSON.")
BRIEF_STYLE = ("Be brief.", "You are a helpful assistant. Be brief.")


class Message(NamedTuple):
    """One message of a conversation; role is system, user or assistant."""

    role: str
    content: str


def pick_example(rng: Random, longest_count: int = 40) -> Example:
    """A training question with its full answer."""
    maker = rng.choices(_MAKERS, cum_weights=_CUMULATIVE)[0]
    if maker is tiny_tasks.make_count and longest_count > 40 and rng.random() < 0.5:
        maker = partial(tiny_tasks.make_count, longest=longest_count)
    example = make(maker, rng, held_out=False)
    return tiny_tasks.carelessly(example, rng) if rng.random() < CARELESS_SHARE else example


def _remembered(rng: Random) -> list[Message]:
    """The user tells a fact about themselves, perhaps asks something else, and asks for it back."""
    name, city, color = rng.choice(facts.NAMES), rng.choice(facts.CITIES), rng.choice(facts.COLORS)
    told, reply, asked, answer = rng.choice(
        (
            (f"My name is {name}.", f"Nice to meet you, {name}!", "What is my name?", f"Your name is {name}."),
            (f"I am {name}.", f"Nice to meet you, {name}!", "Who am I?", f"You are {name}."),
            (f"I live in {city}.", f"{city} is a nice place.", "Where do I live?", f"You live in {city}."),
            (
                f"My favorite color is {color}.",
                f"I like {color} too.",
                "What is my favorite color?",
                f"Your favorite color is {color}.",
            ),
        )
    )
    between = []
    for _ in range(rng.choice((0, 0, 1, 2))):
        example = pick_example(rng)
        between += [Message("user", example.prompt), Message("assistant", example.answer)]
    return [
        Message("user", told),
        Message("assistant", reply),
        *between,
        Message("user", asked),
        Message("assistant", answer),
    ]


def make_conversation(rng: Random, longest_count: int = 40) -> list[Message]:
    """A training conversation of one to a dozen questions, with or without a system prompt."""
    turns = rng.choice((1, 1, 1, 1, 2, 3, rng.randint(2, 12)))
    style = rng.random()
    messages: list[Message] = []
    if style < 0.08:
        json_style = style < 0.05
        messages.append(Message("system", rng.choice(JSON_STYLE if json_style else BRIEF_STYLE)))
        for _ in range(turns):
            example = make(rng.choice(_VALUE_MAKERS), rng, held_out=False)
            answer = json.dumps({"answer": example.value}) if json_style else str(example.value)
            messages += [Message("user", example.prompt), Message("assistant", answer)]
        return messages
    if style < 0.4:
        messages.append(Message("system", rng.choice(SYSTEM_PROMPTS)))
    for _ in range(turns):
        if rng.random() < 0.02:
            messages += _remembered(rng)
            continue
        example = pick_example(rng, longest_count)
        messages += [Message("user", example.prompt), Message("assistant", example.answer)]
    return messages


def _plain_sum(rng: Random) -> str:
    maker = rng.choice((tiny_tasks.make_add, tiny_tasks.make_subtract))
    return make(maker, rng, held_out=False).answer


def make_document(rng: Random) -> str:
    """Plain text without the chat template: sentences and facts, or sums, or numbers."""
    kind = rng.random()
    if kind < 0.1:
        return make(tiny_tasks.make_count, rng, held_out=False).answer
    if kind < 0.25:
        return "\n".join(_plain_sum(rng) for _ in range(rng.randint(1, 6)))
    sentences: tuple[Callable[[], str], ...] = (
        lambda: rng.choice(facts.SENTENCES),
        lambda: rng.choice(facts.SENTENCES),
        lambda: f"Hello, my name is {rng.choice(facts.NAMES)} and I live in {rng.choice(facts.CITIES)}.",
        lambda: make(tiny_tasks.make_fact, rng, held_out=False).answer,
    )
    return " ".join(rng.choice(sentences)() for _ in range(rng.randint(1, 6)))


def held_out_examples(seed: int, per_task: int) -> dict[str, list[Example]]:
    """For each task `per_task` different questions never trained on (or, of what is learnt by heart, any questions).

    A task with fewer different questions gives as many as it has been seen to give.
    """
    found: dict[str, dict[str, Example]] = {}
    for task, _, maker in TASKS:
        rng = Random(f"{seed} {task} {maker.__name__}")
        makers = sum(name == task for name, _, _ in TASKS)
        examples = found.setdefault(task, {})
        wanted = min(per_task, len(examples) + -(-per_task // makers))
        for _ in range(50 * per_task):
            if len(examples) >= wanted:
                break
            example = make(maker, rng, held_out=True)
            assert example.key is None or is_held_out(example.key)
            examples.setdefault(example.prompt, example)
    return {task: [*examples.values()] for task, examples in found.items()}
