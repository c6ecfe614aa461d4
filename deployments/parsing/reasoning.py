"""Reasoning models think between <think> and </think>; clients get that apart from the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from deployments.parsing.markers import MarkerScanner

OPEN, CLOSE = "<think>", "</think>"


def count_reasoning(token_ids: Sequence[int], text_of: Callable[[int], str], *, prompt: str = "") -> int:
    """How many of a sample's first tokens are its reasoning, the tags included; `text_of` is what each of them adds."""
    splitter = ReasoningSplitter(prompt=prompt)
    for count, token_id in enumerate(token_ids):
        splitter.push(text_of(token_id))
        if splitter.at == "content":
            return count + 1 if splitter.reasoned else 0
    return len(token_ids) if splitter.at == "reasoning" else 0


class ReasoningSplitter:
    """Splits one sample's text, as it streams, into reasoning and content.

    Reasoning comes first or not at all: once the answer has begun, a "<think>" is part of it.
    """

    def __init__(self, *, prompt: str = "") -> None:
        """`prompt`: the rendered prompt; a template that ends with an open <think> has begun the reasoning."""
        self._scanner = MarkerScanner()
        self._at: Literal["start", "reasoning", "content"] = "reasoning" if prompt.rstrip().endswith(OPEN) else "start"
        self._trim = self._at == "reasoning"  # white space right after a tag belongs to the tag
        self.reasoned = self._at == "reasoning"
        """Whether any of it was reasoning, be it empty."""

    def push(self, text: str) -> tuple[str, str]:
        """The (reasoning, content) that `text` adds."""
        self._scanner.push(text)
        return self._drain(last=False)

    def finish(self) -> tuple[str, str]:
        """What was held back, when the sample has ended."""
        return self._drain(last=True)

    @property
    def at(self) -> Literal["start", "reasoning", "content"]:
        """What the text so far ends in; "start" while it is white space or the beginning of a tag."""
        return self._at

    def _drain(self, *, last: bool) -> tuple[str, str]:
        reasoning, content = "", ""
        if self._at == "start":
            piece, marker = self._scanner.until(OPEN)
            content += piece
            if piece.strip():
                self._at = "content"
                content += marker or ""
            elif marker is not None:
                self._at, self._trim = "reasoning", True
                self.reasoned = True
        if self._at == "reasoning":
            piece, marker = self._scanner.until(CLOSE)
            if last and marker is None:
                piece += self._scanner.rest()
            reasoning += self._trimmed(piece)
            if marker is not None:
                self._at, self._trim = "content", True
        if self._at == "content" or last:
            content += self._trimmed(self._scanner.rest())
        return reasoning, content

    def _trimmed(self, piece: str) -> str:
        if self._trim:
            piece = piece.lstrip()
            self._trim = not piece
        return piece
