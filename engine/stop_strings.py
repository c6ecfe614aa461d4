"""StopMatcher: finds stop strings in a text that arrives in pieces, and never lets one slip out."""

from __future__ import annotations

from functools import lru_cache


class StopMatcher:
    """Looks for several strings at once in linear time (Knuth, Morris and Pratt 1977, one automaton a string).

    Text that could be the beginning of a stop string is held back until it is known. The first string to be complete
    wins; of several complete at the same character, the longest. Where pieces begin and end makes no difference.
    """

    __slots__ = ("_fallbacks", "_first", "_held", "_include", "_states", "_stops")

    def __init__(self, stops: tuple[str, ...], *, include: bool = False) -> None:
        """`include`: a found stop string is part of the text that is let through."""
        self._stops = sorted(stops, key=len, reverse=True)
        self._fallbacks = [_fallback(stop) for stop in self._stops]
        self._first = frozenset(stop[0] for stop in stops)
        self._states = [0] * len(stops)
        """For each stop string, how many of its first characters the text so far ends with."""
        self._held = ""
        self._include = include

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that can be let through now, and the stop string found, if one was: then nothing may follow."""
        if not self._held and self._first.isdisjoint(text):
            return text, None
        buffer = self._held + text
        for end, character in enumerate(text, start=len(self._held) + 1):
            found = self._advance(character)
            if found is not None:
                self._held = ""
                return buffer[: end if self._include else end - len(found)], found
        safe = len(buffer) - max(self._states)
        self._held = buffer[safe:]
        return buffer[:safe], None

    def finish(self) -> str:
        """What was held back, once no more text can come."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> str | None:
        states = self._states
        for i, stop in enumerate(self._stops):
            state, fallback = states[i], self._fallbacks[i]
            while state and stop[state] != character:
                state = fallback[state - 1]
            if stop[state] == character:
                state += 1
                if state == len(stop):
                    return stop
            states[i] = state
        return None


@lru_cache(maxsize=512)
def _fallback(stop: str) -> list[int]:
    """For each prefix of `stop`, the length of its longest proper prefix that is also its suffix."""
    lengths, k = [0] * len(stop), 0
    for i in range(1, len(stop)):
        while k and stop[i] != stop[k]:
            k = lengths[k - 1]
        k += stop[i] == stop[k]
        lengths[i] = k
    return lengths
