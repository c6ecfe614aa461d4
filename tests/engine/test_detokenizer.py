"""IncrementalDetokenizer: streams equal whole decodes, and no piece ends inside a character."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.detokenizer import PRIMING_TOKENS, IncrementalDetokenizer
from engine.tokenizer import Tokenizer
from tests.made_tokenizers import tokenizers

MADE = tokenizers()
BYTE_LEVEL, SENTENCEPIECE, METASPACE = MADE.values()
KINDS = pytest.mark.parametrize("tokenizer", MADE.values(), ids=MADE)
TEXTS = st.lists(
    st.one_of(
        st.text(max_size=6),
        st.sampled_from(["👩‍👩‍👧", "🇳🇴", "</s>", "<tool call>", " the sea", "naïve", "é≈", "\n\n", "  "]),
    )
).map("".join)


def cut(ids: list[int], sizes: list[int]) -> list[list[int]]:
    """`ids` in pieces of the given sizes, over and over."""
    pieces, start, i = [], 0, 0
    while start < len(ids):
        size = sizes[i % len(sizes)]
        pieces.append(ids[start : start + size])
        start, i = start + size, i + 1
    return pieces


@KINDS
@given(text=TEXTS, sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4), skip=st.booleans())
@settings(max_examples=300, deadline=None)
def test_a_stream_of_any_text_equals_its_decode(tokenizer: Tokenizer, text: str, sizes: list[int], skip: bool) -> None:
    ids = tokenizer.encode(text)
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
    deltas = [detokenizer.push(piece) for piece in cut(ids, sizes)]
    assert "".join(deltas) + detokenizer.finish() == tokenizer.hf.decode(ids, skip_special_tokens=skip)
    if "\ufffd" not in text:
        assert not any("\ufffd" in delta for delta in deltas)


@given(ids=st.lists(st.integers(0, BYTE_LEVEL.vocab_size + 5), max_size=40), skip=st.booleans())
@settings(max_examples=500, deadline=None)
def test_a_stream_of_any_bytes_equals_its_decode(ids: list[int], skip: bool) -> None:
    """Models may draw bytes that are no UTF-8 at all."""
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL, skip_special_tokens=skip)
    text = "".join([detokenizer.push([i]) for i in ids]) + detokenizer.finish()
    assert text == BYTE_LEVEL.hf.decode(ids, skip_special_tokens=skip)


@given(ids=st.lists(st.integers(0, SENTENCEPIECE.vocab_size - 1), max_size=40))
@settings(max_examples=500, deadline=None)
def test_malformed_byte_runs_spoil_nothing_around_them(ids: list[int]) -> None:
    """Where one bad byte makes Transformers drop its whole run, a stream keeps what it has already sent."""
    detokenizer = IncrementalDetokenizer(SENTENCEPIECE)
    text = "".join([detokenizer.push([i]) for i in ids]) + detokenizer.finish()
    spelled = b"".join(SENTENCEPIECE.token_bytes(i) for i in ids if i not in SENTENCEPIECE.special_ids)
    assert text == spelled.decode("utf-8", "replace").removeprefix(" ")
    whole = SENTENCEPIECE.hf.decode(ids, skip_special_tokens=True)
    if "\ufffd" not in whole:
        assert text == whole


@KINDS
@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_stream_of_any_tokens_equals_its_decode(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    detokenizer = IncrementalDetokenizer(tokenizer)
    text = "".join([detokenizer.push([i]) for i in ids]) + detokenizer.finish()
    whole = tokenizer.decode(ids)
    if "\ufffd" not in whole:
        assert text == whole


@KINDS
@given(prompt=TEXTS, text=TEXTS)
@settings(max_examples=200, deadline=None)
def test_text_goes_on_from_the_prompt(tokenizer: Tokenizer, prompt: str, text: str) -> None:
    """Wherever tokens are cut into prompt and output, the two texts join to the whole one."""
    ids = tokenizer.encode(prompt + text, add_special_tokens=False)
    at = len(tokenizer.encode(prompt, add_special_tokens=False))
    whole, head = tokenizer.decode(ids), tokenizer.decode(ids[:at])
    if not whole.startswith(head):  # cut inside a character
        return
    detokenizer = IncrementalDetokenizer(tokenizer, prompt_token_ids=ids[:at])
    tail = "".join([detokenizer.push([i]) for i in ids[at:]]) + detokenizer.finish()
    context = [i for i in ids[:at][-PRIMING_TOKENS:] if i not in tokenizer.special_ids]
    assert tail == (whole[len(head) :] if context else tokenizer.decode(ids[at:]))


def test_the_first_word_after_a_prompt_keeps_its_space() -> None:
    prompt, output = SENTENCEPIECE.encode("Hello"), SENTENCEPIECE.encode("sea", add_special_tokens=False)
    assert IncrementalDetokenizer(SENTENCEPIECE, prompt_token_ids=prompt).push(output) == " sea"
    assert IncrementalDetokenizer(SENTENCEPIECE).push(output) == "sea"


def test_a_character_begun_by_the_prompt_is_completed() -> None:
    ids = [i for b in "🙂".encode() for i in range(BYTE_LEVEL.vocab_size) if BYTE_LEVEL.byte_table[i] == bytes([b])]
    assert len(ids) == 4
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL, prompt_token_ids=ids[:2])
    assert detokenizer.push(ids[2:3]) == ""
    assert detokenizer.push(ids[3:]) == "🙂"


@KINDS
def test_time_a_token_does_not_grow(tokenizer: Tokenizer) -> None:
    """Long streams, skipped specials and bytes that never become a character: the window stays short."""
    loose = next((i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == b"\x82"), 0)
    eos = tokenizer.eos_token_id
    assert eos is not None
    words = tokenizer.encode("the sea is deep, ", add_special_tokens=False)
    for stream in (words * 2_000, [eos] * 20_000, [loose] * 20_000):
        detokenizer = IncrementalDetokenizer(tokenizer)
        start = time.thread_time()
        for token_id in stream:
            detokenizer.push([token_id])
        assert time.thread_time() - start < 20, "20,000 tokens: quadratic work would take minutes"
