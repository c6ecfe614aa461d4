"""Splitting a stream of text at markers without ever letting half a marker through."""

from __future__ import annotations


def held_back(text: str, markers: tuple[str, ...]) -> int:
    """How many characters at the end of `text` might be the beginning of one of `markers` (none of them whole)."""
    longest = max(map(len, markers), default=0)
    for size in range(min(longest - 1, len(text)), 0, -1):
        tail = text[-size:]
        if any(len(marker) > size and marker.startswith(tail) for marker in markers):
            return size
    return 0


class MarkerScanner:
    """A buffer of streamed text that gives up what certainly precedes the next marker."""

    def __init__(self) -> None:
        self._buffer = ""

    def push(self, text: str) -> None:
        """Add what came."""
        self._buffer += text

    def push_front(self, text: str) -> None:
        """Put back text that was taken and not used."""
        self._buffer = text + self._buffer

    def until(self, *markers: str) -> tuple[str, str | None]:
        """Text up to the first of `markers`, and that marker, both taken; no marker yet: what cannot be part of one."""
        found = [(at, -len(marker), marker) for marker in markers if (at := self._buffer.find(marker)) >= 0]
        if found:
            at, _, marker = min(found)
            text, self._buffer = self._buffer[:at], self._buffer[at + len(marker) :]
            return text, marker
        keep = held_back(self._buffer, markers)
        cut = len(self._buffer) - keep
        text, self._buffer = self._buffer[:cut], self._buffer[cut:]
        return text, None

    def rest(self) -> str:
        """All that is left, taken: the stream has ended."""
        text, self._buffer = self._buffer, ""
        return text
