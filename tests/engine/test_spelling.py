"""Spelling: which vocabularies are bytes, and which bytes."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from engine.spelling import find_spelling


def test_byte_level_covers_every_byte_once() -> None:
    spelling = find_spelling({"type": "ByteLevel"})
    assert spelling is not None and not spelling.strips_first_space
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    assert {spelling.bytes_of(character) for character in alphabet} == {bytes([b]) for b in range(256)}
    for text in ("Hello, 世界 🙂\n\t", "naïve\u00a0\u00ad"):
        pieces = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
        assert b"".join(spelling.bytes_of(piece) for piece, _ in pieces) == text.encode()
    assert spelling.bytes_of("<|tool 世|>") == "<|tool 世|>".encode(), "an added token spells itself"


REPLACE, FALLBACK, FUSE = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()


@pytest.mark.parametrize(
    "steps, strips",
    [([REPLACE, FALLBACK, FUSE], False), ([REPLACE, FALLBACK, FUSE, decoders.Strip(" ", 1, 0)], True)],
)
def test_byte_fallback(steps: list[decoders.Decoder], strips: bool) -> None:
    backend = Backend(models.BPE())
    backend.decoder = decoders.Sequence(steps)
    spelling = find_spelling(json.loads(backend.to_str())["decoder"])
    assert spelling is not None and spelling.strips_first_space == strips
    assert spelling.bytes_of("▁the") == b" the"
    assert spelling.bytes_of("<0xE4>") == b"\xe4"


@pytest.mark.parametrize(
    "decoder",
    [decoders.WordPiece(), decoders.Metaspace(), decoders.Sequence([FALLBACK]), decoders.Sequence([REPLACE, FUSE])],
)
def test_others_are_not_spelled(decoder: decoders.Decoder) -> None:
    assert find_spelling(json.loads(decoder.__getstate__())) is None
