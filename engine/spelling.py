"""Spelling: how a vocabulary's tokens stand for the bytes of UTF-8 text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Spelling:
    """A vocabulary in which each token stands for some bytes, whatever its neighbours are."""

    bytes_of: Callable[[str], bytes]
    strips_first_space: bool = False
    """Whether a decoded text drops one space at its very beginning."""


def find_spelling(decoder: Mapping[str, Any]) -> Spelling | None:
    """The spelling of a vocabulary, from the `decoder` of its tokenizer.json; None for an unknown one."""
    if decoder["type"] == "ByteLevel":  # GPT-2, Llama 3, Qwen
        return Spelling(_byte_level)
    if decoder["type"] != "Sequence":
        return None
    steps = list(decoder["decoders"])
    strips = steps[-1:] == [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    if strips:
        steps.pop()
    space = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    if steps == [space, {"type": "ByteFallback"}, {"type": "Fuse"}]:  # Llama 2, Mistral, Gemma
        return Spelling(_byte_fallback, strips)
    return None


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: the printable Latin-1 ones are themselves, the others follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _byte_level(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF[c] for c in token])
    except KeyError:  # an added token with characters of its own
        return token.encode()


def _byte_fallback(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()
