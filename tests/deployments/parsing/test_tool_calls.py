"""Tool calls read from streams cut anywhere, against the calls that were written."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.parsing.tool_calls import ToolFormat, detect_format, make_parser

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
arguments = st.dictionaries(st.text(min_size=1, max_size=6), json_values, max_size=3)
calls = st.lists(st.tuples(st.sampled_from(["get_weather", "f", "größe", 'a"b']), arguments), min_size=1, max_size=3)


def write(tool_format: str, call_list: list[tuple[str, Any]], indent: int | None) -> str:
    def one(name: str, args: Any, key: str = "arguments") -> str:
        return json.dumps({"name": name, key: args}, indent=indent)

    if tool_format == "hermes":
        return "\n".join(f"<tool_call>\n{one(*call)}\n</tool_call>" for call in call_list)
    if tool_format == "llama3":
        return "; ".join(one(*call, "parameters") for call in call_list)
    if tool_format == "mistral":
        return "[TOOL_CALLS] [" + ", ".join(one(*call) for call in call_list) + "]"
    return "".join(f"[TOOL_CALLS]{name}[ARGS]{json.dumps(args, indent=indent)}" for name, args in call_list)


def read(tool_format: ToolFormat, text: str, cuts: list[int]) -> tuple[str, list[tuple[str, Any]], int]:
    """Content, calls, and the number of deltas; checks OpenAI's order: id and name first, once."""
    parser = make_parser(tool_format)
    edges = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    content, names, args, ids, pieces = "", {}, {}, set(), 0
    parts = [parser.push(text[a:b]) for a, b in itertools.pairwise(edges)] + [parser.finish()]
    for part in parts:
        content += part.content
        for delta in part.calls:
            pieces += 1
            if delta.name is not None:
                assert delta.index == len(names)
                assert delta.id not in ids
                names[delta.index], args[delta.index] = delta.name, ""
                ids.add(delta.id)
            args[delta.index] += delta.arguments
    return content, [(names[i], json.loads(args[i])) for i in range(len(names))], pieces


@pytest.mark.parametrize("tool_format", ["hermes", "llama3", "mistral", "mistral-args"])
@settings(max_examples=150, deadline=None)
@given(written=calls, cuts=st.lists(st.integers(0, 400), max_size=12), indent=st.sampled_from([None, 2]))
def test_calls_survive_any_cut(tool_format: str, written: list[tuple[str, Any]], cuts: list[int], indent: Any) -> None:
    if tool_format == "mistral-args":
        written = [(name.replace('"', ""), args) for name, args in written]
    text = write(tool_format, written, indent)
    kind: Any = "mistral" if tool_format == "mistral-args" else tool_format
    content, got, _ = read(kind, text, cuts)
    assert got == written
    assert content.strip() == ""


@pytest.mark.parametrize("tool_format", ["hermes", "llama3", "mistral"])
@settings(max_examples=100, deadline=None)
@given(words=st.text(alphabet="ab <>[]{}/\n_tolcTOLACS", max_size=60), cuts=st.lists(st.integers(0, 60), max_size=8))
def test_plain_words_come_through_unchanged(tool_format: Any, words: str, cuts: list[int]) -> None:
    if "<tool_call>" in words or "[TOOL_CALLS]" in words or words.lstrip().startswith("{"):
        return
    content, got, _ = read(tool_format, words, cuts)
    assert (content, got) == (words, [])


def test_arguments_stream_before_the_call_ends() -> None:
    parser = make_parser("hermes")
    parts = [parser.push(c) for c in '<tool_call>{"name": "f", "arguments": {"city": "Oslo", "d": 3}']
    streamed = "".join(d.arguments for part in parts for d in part.calls)
    assert streamed == '{"city": "Oslo", "d": 3}'


def test_words_around_hermes_calls_stay_words() -> None:
    text = 'Let me look.\n<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert read("hermes", text, [3, 20])[:2] == ("Let me look.\n", [("f", {})])


def test_name_after_arguments() -> None:
    assert read("llama3", '{"parameters": {"x": [1, 2]}, "name": "f"}', [5, 20])[1] == [("f", {"x": [1, 2]})]


def test_python_tag() -> None:
    assert read("llama3", '<|python_tag|>{"name": "f", "parameters": {"a": "}"}}', [4, 30])[1] == [("f", {"a": "}"})]


@pytest.mark.parametrize("text", ['{"answer": 4, "list": [1, {"b": 2}]}', "{oops", '{"name": 3'])
def test_json_that_is_no_call_is_content(text: str) -> None:
    content, got, _ = read("llama3", text, [4])
    assert (content, got) == (text, [])


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, "hermes"),
        ("... <tool_call> ...", "hermes"),
        ("{{ '[TOOL_CALLS]' }}", "mistral"),
        ('<|python_tag|> {"name": .., "parameters": ..}', "llama3"),
    ],
)
def test_detect_format(template: str | None, expected: str) -> None:
    assert detect_format(template) == expected
