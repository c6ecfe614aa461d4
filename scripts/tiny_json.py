"""The JSON tasks of the embedded model: write, extract, list and make up small JSON values."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random

from scripts import tiny_facts as facts
from scripts.tiny_tasks import Example, listed, pick_word, pick_words

Value = str | int | float | bool | None

FIELDS: dict[str, Callable[[Random], Value]] = {
    "name": lambda rng: rng.choice(facts.NAMES),
    "age": lambda rng: rng.randint(1, 99),
    "city": lambda rng: rng.choice(facts.CITIES),
    "country": lambda rng: rng.choice([*facts.CAPITALS]),
    "color": lambda rng: rng.choice(facts.COLORS),
    "animal": lambda rng: rng.choice(facts.ANIMALS),
    "fruit": lambda rng: rng.choice(facts.FRUITS),
    "count": lambda rng: rng.randint(0, 99),
    "id": lambda rng: rng.randint(1, 999),
    "score": lambda rng: rng.randint(0, 100),
    "price": lambda rng: rng.randint(1, 99) + rng.choice((0.25, 0.5, 0.75, 0.95, 0.99)),
    "active": lambda rng: rng.random() < 0.5,
    "done": lambda rng: rng.random() < 0.5,
    "friend": lambda rng: rng.choice((*facts.NAMES, None)),
}


def pick_fields(rng: Random, held_out: bool, low: int = 1, high: int = 5) -> dict[str, Value]:
    """Between low and high different fields in random order, each with a value of its kind.

    Some fields go by a word of the split, and their value is any number, word, truth value or null.
    """
    fields: dict[str, Value] = {}
    for name in rng.sample([*FIELDS], rng.randint(low, high)):
        if rng.random() < 0.8:
            fields[name] = FIELDS[name](rng)
        else:
            value = rng.choice((rng.randint(0, 999), pick_word(rng, held_out), rng.random() < 0.5, None))
            fields[rng.choice((pick_word(rng, held_out), rng.choice(facts.OTHER_FIELDS)))] = value
    return fields


def shown(value: Value) -> str:
    """The value as a question writes it: strings without quotes, the rest as in JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def make_json_object(rng: Random, held_out: bool) -> Example:
    fields = pick_fields(rng, held_out)
    if rng.random() < 0.5:
        pairs = listed_or_single([f"{name} {shown(value)}" for name, value in fields.items()], rng)
        phrases = ("Write a JSON object with {p}.", "Give me a JSON object with {p}.", "Make JSON with {p}.")
    else:
        sign = rng.choice((": ", "="))
        pairs = ", ".join(f"{name}{sign}{shown(value)}" for name, value in fields.items())
        phrases = ("Turn this into JSON: {p}", "Write as JSON: {p}", "Convert to JSON: {p}")
    answer = json.dumps(fields)
    return Example("json", rng.choice(phrases).format(p=pairs), answer, "json " + answer)


def make_json_extract(rng: Random, _held_out: bool) -> Example:
    person: dict[str, Value] = {name: FIELDS[name](rng) for name in ("name", "age", "city", "color", "animal")}
    sentences = (
        "{name} is {age} years old and lives in {city}. The favorite color of {name} is {color}.",
        "{name} lives in {city}, is {age} years old and has a {animal}.",
        "{name} from {city} likes the color {color} and has a {animal}.",
        "My name is {name}, I am {age} years old and I live in {city}.",
    )
    sentence = rng.choice(sentences)
    told = [name for name in person if "{" + name + "}" in sentence]
    asked = rng.sample(told, rng.randint(1, len(told)))
    fields = listed_or_single(asked, rng)
    phrases = (
        "Extract {f} as JSON: {s}",
        "Give the fields {f} as JSON. {s}",
        "{s} Answer in JSON with the fields {f}.",
        "{s} Write {f} as a JSON object.",
    )
    prompt = rng.choice(phrases).format(f=fields, s=sentence.format(**person))
    answer = json.dumps({name: person[name] for name in asked})
    return Example("json", prompt, answer, f"extract {sentence} {answer}")


def make_json_list(rng: Random, held_out: bool) -> Example:
    words = pick_words(rng, held_out, 2, 6)
    prompt = rng.choice(("Write these words as a JSON list: {l}", "Make a JSON list of {l}."))
    return Example("json", prompt.format(l=listed(words, rng)), json.dumps(words), "list " + " ".join(words))


def make_json_invented(rng: Random, held_out: bool) -> Example:
    """A request for given fields without values; any object with these fields is right."""
    fields = pick_fields(rng, held_out, 1, 4)
    phrases = (
        "Make up a JSON object with the fields {f}.",
        "Invent a JSON object with the fields {f}.",
        "Give me some JSON with the fields {f}.",
        "Return a JSON object with the fields {f}.",
        "Answer in JSON with the fields {f}.",
    )
    prompt = rng.choice(phrases).format(f=listed_or_single([*fields], rng))
    key = "invent " + " ".join(fields)
    return Example("json_invented", prompt, json.dumps(fields), key, keys=tuple(fields))


def listed_or_single(items: list[str], rng: Random) -> str:
    """The items as `listed` writes them, with no "and" for a single one."""
    return listed(items, rng) if len(items) > 1 else items[0]
