"""Structured output: a grammar as token masks. llguidance does the grammars; this is where Manta meets it.

A `Grammar` is what a request carries: plain data that crosses processes. A `GrammarCompiler` turns it into a
`GrammarMatcher`, the state of one sample: which tokens may come next. A matcher is a function of the output tokens
alone, so that a preempted or resumed sample replays its tokens and goes on.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from engine.errors import ConfigError, RequestError

GrammarKind = Literal["json_object", "json_schema", "regex", "choice", "grammar", "structural_tag"]

PARALLEL_FROM = 8
"""So many masks are worth the threads."""
MAX_GRAMMAR_CHARS = 256 * 1024
_JSON_OPTIONS: Any = {"whitespace_pattern": r"( |\r?\n[ \t]{0,24})?"}
"""Between JSON tokens one space, or one line break and its indent: a model that likes indenting may, and no model can
spend its answer on white space."""


class Grammar(msgspec.Struct, frozen=True):
    """What an output must match.

    `text` is the schema (JSON), the regex, the choices (a JSON list), or a grammar in Lark's or GBNF's notation.
    """

    kind: GrammarKind
    text: str = ""

    def __post_init__(self) -> None:
        if len(self.text) > MAX_GRAMMAR_CHARS:
            raise RequestError(
                f"{self.kind}: {len(self.text)} characters, allowed: at most {MAX_GRAMMAR_CHARS}", param=self.kind
            )


class GrammarMatcher:
    """One sample's place in its grammar."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def fill_mask(self, row: npt.NDArray[np.int32]) -> None:
        """Write the tokens that may come next into `row`, int32 [ceil(V / 32)]: bit t % 32 of word t // 32 is token t.

        When the grammar is complete and nothing may follow, only end-of-sequence tokens are set.
        """
        assert row.dtype == np.int32 and row.flags["C_CONTIGUOUS"]
        self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)

    def accept(self, token_id: int) -> bool:
        """Move past `token_id`; False when the grammar does not allow it (the place is then lost)."""
        return bool(self._matcher.consume_token(token_id))

    @property
    def complete(self) -> bool:
        """Whether the text so far matches the whole grammar."""
        return bool(self._matcher.is_accepting())

    @property
    def exhausted(self) -> bool:
        """Whether the whole grammar is matched and nothing but an end may follow."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    @property
    def error(self) -> str | None:
        """Why the grammar can go no further, when that is not because it is complete (a limit of the library)."""
        return str(self._matcher.get_error()) if self._matcher.is_error() else None

    def copy(self) -> GrammarMatcher:
        """Another matcher at the same place."""
        return GrammarMatcher(self._matcher.deep_copy())


def fill_masks(matchers: list[tuple[GrammarMatcher, int]], out: npt.NDArray[np.int32]) -> None:
    """Write the mask of each matcher into its row of `out` [rows, mask_words], many of them on several threads."""
    if len(matchers) < PARALLEL_FROM:
        for matcher, row in matchers:
            matcher.fill_mask(out[row])
        return
    assert out.dtype == np.int32 and out.flags["C_CONTIGUOUS"]
    pairs = [(matcher._matcher, row) for matcher, row in matchers]
    _threads().unsafe_compute_mask_ptr(pairs, out.ctypes.data, 4 * out.shape[1], out.shape[0])


@cache
def _threads() -> Any:
    import llguidance

    return llguidance.LLExecutor()


class GrammarCompiler:
    """Grammars over one vocabulary. Keeps the last compiled ones: compiling takes milliseconds, a copy microseconds."""

    def __init__(
        self, tokenizer_json: str, vocab_size: int, eos_token_ids: tuple[int, ...], *, cache_size: int = 256
    ) -> None:
        """`tokenizer_json` is the text of a Hugging Face tokenizer.json; `vocab_size` is the model's."""
        self._tokenizer_json = tokenizer_json
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._cache_size = cache_size
        self._compiled: OrderedDict[Grammar, Any] = OrderedDict()

    @classmethod
    def load(cls, folder: str, vocab_size: int, eos_token_ids: tuple[int, ...]) -> GrammarCompiler:
        """Of the tokenizer in `folder` (one with a tokenizer.json). Raises ConfigError."""
        path = Path(folder) / "tokenizer.json"
        if path.is_file():
            return cls(path.read_text(encoding="utf-8"), vocab_size, eos_token_ids)
        from engine.imports import transformers

        hf = transformers().AutoTokenizer.from_pretrained(folder)
        backend = getattr(hf, "backend_tokenizer", None)
        if backend is None:
            raise ConfigError("tokenizer", folder, "structured output needs a fast tokenizer (tokenizer.json)")
        return cls(backend.to_str(), vocab_size, eos_token_ids)

    @cached_property
    def _tokenizer(self) -> Any:
        import llguidance

        return llguidance.LLTokenizer(
            self._tokenizer_json, n_vocab=self._vocab_size, eos_token=list(self._eos_token_ids) or None
        )

    @property
    def mask_words(self) -> int:
        """int32 words of one row of masks."""
        return (self._vocab_size + 31) // 32

    def compile(self, grammar: Grammar) -> GrammarMatcher:
        """A fresh matcher at the grammar's start. Raises RequestError that says where the grammar is wrong."""
        prototype = self._compiled.get(grammar)
        if prototype is None:
            prototype = self._compile(grammar)
            self._compiled[grammar] = prototype
            if len(self._compiled) > self._cache_size:
                self._compiled.popitem(last=False)
        else:
            self._compiled.move_to_end(grammar)
        return GrammarMatcher(prototype.deep_copy())

    def _compile(self, grammar: Grammar) -> Any:
        import llguidance

        matcher = llguidance.LLMatcher(self._tokenizer, to_llguidance(grammar), log_level=0)
        if matcher.is_error():
            raise RequestError(f"{grammar.kind}: {' '.join(str(matcher.get_error()).split())}", param=grammar.kind)
        return matcher


def to_llguidance(grammar: Grammar) -> str:
    """The grammar in llguidance's own form. Raises RequestError for text that is not even well-formed."""
    import llguidance

    matcher = llguidance.LLMatcher
    if grammar.kind == "json_object":
        return str(matcher.grammar_from_json_schema('{"type": "object"}', _JSON_OPTIONS))
    if grammar.kind == "json_schema":
        schema = _json(grammar)
        if not isinstance(schema, dict | bool):
            raise RequestError(f"json_schema: got {schema!r:.100}, allowed: an object", param=grammar.kind)
        return str(matcher.grammar_from_json_schema(json.dumps(schema), _JSON_OPTIONS))
    if grammar.kind == "regex":
        return str(matcher.grammar_from_regex(grammar.text))
    if grammar.kind == "choice":
        choices = _json(grammar)
        if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c for c in choices):
            raise RequestError("choice: allowed: a list of at least one non-empty string", param=grammar.kind)
        return str(matcher.grammar_from_lark("start: " + " | ".join(json.dumps(c) for c in choices)))
    if grammar.kind == "grammar":
        from llguidance.gbnf_to_lark import any_to_lark

        try:
            return str(matcher.grammar_from_lark(any_to_lark(grammar.text)))
        except Exception as error:  # the converter raises bare Exceptions that say where
            raise RequestError(f"grammar: {error}", param=grammar.kind) from error
    return _structural_tag(grammar)


def _structural_tag(grammar: Grammar) -> str:
    """Free text in which a trigger starts a tag whose content must match that tag's schema."""
    import llguidance

    tag = _json(grammar)
    try:
        triggers = tag["triggers"]
        tags = [
            llguidance.StructTag(
                trigger=next(t for t in triggers if item["begin"].startswith(t)),
                begin=item["begin"],
                grammar=item.get("schema", {}),
                end=item.get("end", ""),
            )
            for item in tag["structures"]
        ]
        return str(llguidance.StructTag.to_grammar(tags, assume_special=False))
    except (KeyError, TypeError, AttributeError, AssertionError, StopIteration) as error:
        raise RequestError(
            'structural_tag: allowed: {"triggers": [text], "structures": [{"begin": text that starts with a trigger, '
            f'"schema": object, "end": text}}]}} ({type(error).__name__}: {error})',
            param=grammar.kind,
        ) from error


def _json(grammar: Grammar) -> Any:
    try:
        return json.loads(grammar.text)
    except ValueError as error:
        raise RequestError(f"{grammar.kind}: not JSON: {error}", param=grammar.kind) from error
