"""Grammars as token masks, against jsonschema and re over random schemas and random walks."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from tokenizers import Tokenizer

from engine.errors import RequestError
from engine.grammar import Grammar, GrammarCompiler, GrammarMatcher

FOLDER = "configs/tiny"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(f"{FOLDER}/tokenizer.json")


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    config = json.loads(Path(f"{FOLDER}/config.json").read_text())
    return GrammarCompiler.load(FOLDER, config["vocab_size"], (config["eos_token_id"],))


def allowed(compiler: GrammarCompiler, matcher: GrammarMatcher) -> Any:
    row = np.zeros(compiler.mask_words, np.int32)
    matcher.fill_mask(row)
    return np.nonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))[0]


def walk(
    compiler: GrammarCompiler, tokenizer: Tokenizer, matcher: GrammarMatcher, rng: random.Random, limit: int = 600
) -> tuple[list[int], bool]:
    """Random tokens that the masks allow, closing what is open half of the time; whether it came to an end."""
    closers = {tokenizer.token_to_id(t) for t in ('"', "}", "]", '"}', '"]', "}}")} - {None}
    eos = compiler._eos_token_ids[0]
    out: list[int] = []
    for _ in range(limit):
        ids = allowed(compiler, matcher)
        assert len(ids), "a live matcher must allow some token"
        if eos in ids:
            return out, True
        near = [t for t in ids if t in closers]
        token = int(rng.choice(near if near and rng.random() < 0.5 else list(ids)))
        assert matcher.accept(token)
        out.append(token)
    return out, False


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "pattern"]
    if depth < 3:
        kinds += ["object", "array", "anyOf", "object"]
    kind = "object" if depth == 0 else rng.choice(kinds)
    if kind == "string":
        low = rng.randrange(4)
        return {"type": "string", "minLength": low, "maxLength": low + rng.randrange(12)}
    if kind == "integer":
        low = rng.randrange(-50, 50)
        return {"type": "integer", "minimum": low, "maximum": low + rng.randrange(200)}
    if kind == "number":
        return {"type": "number", "minimum": 0, "maximum": rng.choice([1, 10, 99.5])}
    if kind in ("boolean", "null"):
        return {"type": kind}
    if kind == "enum":
        return {"enum": [rng.choice(["red", "gréen", 'quo"te', "", "back\\slash"]), rng.randrange(9), None, True]}
    if kind == "const":
        return {"const": rng.choice(["fixed", 42, [1, "two"], {"k": None}])}
    if kind == "pattern":
        return {"type": "string", "pattern": rng.choice(["^[a-f]{2,4}$", "^\\d{3}-\\d{4}$", "^(foo|bar)+$"])}
    if kind == "array":
        low = rng.randrange(3)
        return {
            "type": "array",
            "items": random_schema(rng, depth + 1),
            "minItems": low,
            "maxItems": low + rng.randrange(3),
        }
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth + 1) for _ in range(rng.randrange(1, 4))]}
    names = rng.sample(["id", "name", "größe", "a b", "x-y", "tags", "nested"], rng.randrange(1, 5))
    return {
        "type": "object",
        "properties": {name: random_schema(rng, depth + 1) for name in names},
        "required": rng.sample(names, rng.randrange(len(names) + 1)),
        "additionalProperties": False,
    }


def test_outputs_of_1000_random_schemas_validate(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    ended = 0
    for seed in range(1000):
        rng = random.Random(seed)
        schema = random_schema(rng)
        tokens, done = walk(compiler, tokenizer, compiler.compile(Grammar("json_schema", json.dumps(schema))), rng)
        if done:
            ended += 1
            jsonschema.validate(json.loads(tokenizer.decode(tokens)), schema)
    assert ended >= 950, f"only {ended} of 1000 walks came to an end"


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (Grammar("regex", "[a-c]{3}-[0-9]{1,4}"), "[a-c]{3}-[0-9]{1,4}"),
        (Grammar("choice", json.dumps(["yes", "no", 'may"be'])), 'yes|no|may"be'),
        (Grammar("grammar", 'start: "a" b\nb: /[0-9]/ "c"'), "a[0-9]c"),
        (Grammar("grammar", 'root ::= "a" b\nb ::= [0-9] "c"'), "a[0-9]c"),
    ],
)
def test_text_grammars(compiler: GrammarCompiler, tokenizer: Tokenizer, grammar: Grammar, pattern: str) -> None:
    for seed in range(30):
        tokens, done = walk(compiler, tokenizer, compiler.compile(grammar), random.Random(seed))
        assert done
        assert re.fullmatch(pattern, tokenizer.decode(tokens))


def test_structural_tag_binds_inside_the_tag_only(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    schema = {"type": "object", "properties": {"q": {"type": "integer"}}, "required": ["q"]}
    tag = {"triggers": ["<f"], "structures": [{"begin": "<f=g>", "schema": schema, "end": "</f>"}]}
    matcher = compiler.compile(Grammar("structural_tag", json.dumps(tag)))
    for token in tokenizer.encode("Any words. <f=g>", add_special_tokens=False).ids:
        assert matcher.accept(token)
    letters = tokenizer.encode("x", add_special_tokens=False).ids[0]
    brace = tokenizer.encode("{", add_special_tokens=False).ids[0]
    ids = allowed(compiler, matcher)
    assert brace in ids
    assert letters not in ids


def test_a_replayed_matcher_is_where_the_first_one_was(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "integer"}}, "required": ["a"]}
    grammar = Grammar("json_schema", json.dumps(schema))
    first = compiler.compile(grammar)
    tokens = tokenizer.encode('{"a": "hé', add_special_tokens=False).ids
    for token in tokens:
        assert first.accept(token)
    second = compiler.compile(grammar)
    for token in tokens:
        second.accept(token)
    assert (allowed(compiler, first) == allowed(compiler, second)).all()
    assert (allowed(compiler, first.copy()) == allowed(compiler, first)).all()


def test_a_token_the_grammar_forbids_is_refused(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    matcher = compiler.compile(Grammar("regex", "[0-9]+"))
    assert not matcher.accept(tokenizer.encode("x", add_special_tokens=False).ids[0])


@pytest.mark.parametrize(
    ("grammar", "said"),
    [
        (Grammar("json_schema", '{"type":"objec"}'), "objec"),
        (Grammar("json_schema", "{"), "not JSON"),
        (Grammar("json_schema", "3"), "an object"),
        (Grammar("regex", "(["), "unclosed"),
        (Grammar("choice", "[]"), "at least one"),
        (Grammar("grammar", "start: foo"), "foo"),
        (Grammar("grammar", "(("), "Expected"),
        (Grammar("structural_tag", "{}"), "triggers"),
    ],
)
def test_a_bad_grammar_is_refused_with_where(compiler: GrammarCompiler, grammar: Grammar, said: str) -> None:
    with pytest.raises(RequestError, match=re.escape(said)) as caught:
        compiler.compile(grammar)
    assert caught.value.param == grammar.kind


def test_a_huge_grammar_is_refused() -> None:
    with pytest.raises(RequestError, match="at most"):
        Grammar("regex", "a" * 300_000)
