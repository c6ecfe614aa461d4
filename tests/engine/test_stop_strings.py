"""StopMatcher: any cut of a text finds the same stop string and lets the same text through."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.stop_strings import StopMatcher


def reference(text: str, stops: tuple[str, ...], include: bool) -> tuple[str, str | None]:
    """The first stop string to be complete, the longest of several."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def run(pieces: list[str], stops: tuple[str, ...], include: bool) -> tuple[list[str], str | None]:
    matcher, out = StopMatcher(stops, include=include), []
    for piece in pieces:
        text, found = matcher.push(piece)
        out.append(text)
        if found is not None:
            return out, found
    return [*out, matcher.finish()], None


@given(
    pieces=st.lists(st.text("ab\n", max_size=5), max_size=12),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=5), min_size=1, max_size=4).map(tuple),
    include=st.booleans(),
)
@settings(max_examples=1500, deadline=None)
def test_any_cut_gives_what_the_whole_text_gives(pieces: list[str], stops: tuple[str, ...], include: bool) -> None:
    out, found = run(pieces, stops, include)
    assert ("".join(out), found) == reference("".join(pieces), stops, include)


@given(pieces=st.lists(st.text("ab", max_size=4), max_size=12), stop=st.text("ab", min_size=1, max_size=6))
def test_only_a_possible_beginning_is_held_back(pieces: list[str], stop: str) -> None:
    matcher, seen, through = StopMatcher((stop,)), "", ""
    for piece in pieces:
        text, found = matcher.push(piece)
        seen, through = seen + piece, through + text
        if found is not None:
            return
        held = seen[len(through) :]
        assert stop.startswith(held) and len(held) < len(stop)


@pytest.mark.parametrize("include, text", [(False, "x"), (True, "xEND")])
def test_the_text_after_a_stop_string_is_dropped(include: bool, text: str) -> None:
    assert StopMatcher(("END",), include=include).push("xENDing") == (text, "END")


def test_the_worst_stop_strings_take_linear_time() -> None:
    stops = tuple("a" * n + "b" for n in range(64, 128))
    matcher, start = StopMatcher(stops), time.thread_time()
    for _ in range(2_000):
        matcher.push("aaaa")
    assert time.thread_time() - start < 10
