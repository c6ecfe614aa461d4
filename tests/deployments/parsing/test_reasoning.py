"""Reasoning apart from content, in streams cut anywhere."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.parsing.reasoning import ReasoningSplitter, count_reasoning


def split(text: str, cuts: list[int], prompt: str = "") -> tuple[str, str]:
    splitter = ReasoningSplitter(prompt=prompt)
    edges = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    parts = [splitter.push(text[a:b]) for a, b in itertools.pairwise(edges)] + [splitter.finish()]
    return "".join(p[0] for p in parts), "".join(p[1] for p in parts)


CASES = [
    ("<think>\nhm, 2+2\n</think>\n\nIt is 4.", "", ("hm, 2+2\n", "It is 4.")),
    ("\n<think>a</think>b", "", ("a", "\nb")),
    ("so far</think>done", "<user>q<assistant><think>\n", ("so far", "done")),
    ("never closed", "x<think>", ("never closed", "")),
    ("no tags at all", "", ("", "no tags at all")),
    ("a word, then <think>not a tag</think>", "", ("", "a word, then <think>not a tag</think>")),
    ("<think></think>empty", "", ("", "empty")),
    ("<think>x < y </thin </think>z", "", ("x < y </thin ", "z")),
    ("<thi", "", ("", "<thi")),
]


@pytest.mark.parametrize(("text", "prompt", "expected"), CASES)
@settings(max_examples=60, deadline=None)
@given(cuts=st.lists(st.integers(0, 60), max_size=20))
def test_split_anywhere(text: str, prompt: str, expected: tuple[str, str], cuts: list[int]) -> None:
    assert split(text, cuts, prompt) == expected


@pytest.mark.parametrize(
    ("pieces", "prompt", "count"),
    [
        (["Hello", " there"], "", 0),
        (["<think>", "a", "b", "</think>", "c"], "", 4),
        (["\n", "<thi", "nk>a</th", "ink>c", "d"], "", 4),
        (["<think></think>c", "d"], "", 1),
        (["<think>", "a", "b"], "", 3),
        (["a", "b</think>", "c"], "<think>\n", 2),
        (["a <think>", "b</think>", "c"], "", 0),
        ([" ", "\n"], "", 0),
        ([], "", 0),
    ],
)
def test_reasoning_tokens_are_counted_with_their_tags(pieces: list[str], prompt: str, count: int) -> None:
    assert count_reasoning(range(len(pieces)), lambda token: pieces[token], prompt=prompt) == count
