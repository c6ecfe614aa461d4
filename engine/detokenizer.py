"""IncrementalDetokenizer: token ids in, whole characters out."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.tokenizer import Tokenizer

PRIMING_TOKENS = 6
"""Prompt tokens that can still change how the first output token reads."""
_MAX_BYTES_OF_A_CHARACTER = 4


class IncrementalDetokenizer:
    """Turns one growing token sequence into text, never half a character, in O(1) amortised a token.

    The texts of all `push` calls and of `finish`, joined, are what decoding the sequence at once gives; bytes that are
    no UTF-8 become U+FFFD, one for each maximal piece. The tokens of `prompt_token_ids` came before: a word after them
    keeps its leading space, a character they began is completed. Special tokens give no text with
    `skip_special_tokens`; ids outside the vocabulary never do.
    """

    __slots__ = ("_decoder",)

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, prompt_token_ids: Sequence[int] = ()
    ) -> None:
        make = _WindowDecoder if tokenizer.spelling is None else _ByteDecoder
        self._decoder: _ByteDecoder | _WindowDecoder = make(tokenizer, skip_special_tokens)
        if prompt_token_ids:
            self._decoder.prime(prompt_token_ids[-PRIMING_TOKENS:])

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that became certain with these tokens; may be empty."""
        return self._decoder.push(token_ids)

    def finish(self) -> str:
        """What was held back: a character that never became whole, as U+FFFD. Call once, after the last push."""
        return self._decoder.finish()


class _ByteDecoder:
    """Each token is some bytes, and the text is those bytes read as UTF-8."""

    __slots__ = ("_decode", "_skipped", "_strips", "_table")

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        assert tokenizer.spelling is not None
        self._table = tokenizer.byte_table
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._strips = tokenizer.spelling.strips_first_space

    def prime(self, token_ids: Sequence[int]) -> None:
        self.push(token_ids)

    def push(self, token_ids: Sequence[int]) -> str:
        table, skipped = self._table, self._skipped
        end = len(table)
        text = self._decode(b"".join([table[i] for i in token_ids if i not in skipped and 0 <= i < end]))
        if self._strips and text:
            self._strips = False
            return text.removeprefix(" ")
        return text

    def finish(self) -> str:
        return self._decode(b"", True)


class _WindowDecoder:
    """For other vocabularies: decode a short window with and without its newest tokens, and emit the difference.

    window[:read] gave text that was emitted; it stays as the context in which window[read:] is decoded.
    """

    __slots__ = ("_context", "_read", "_skipped", "_tokenizer", "_window")

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._window: list[int] = []
        self._read = 0
        self._context = ""
        """The text of window[:read]."""

    def prime(self, token_ids: Sequence[int]) -> None:
        self._window = [i for i in token_ids if i not in self._skipped]
        self._read = len(self._window)
        self._context = self._tokenizer.decode_raw(self._window)

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join([self._push_one(i) for i in token_ids if i not in self._skipped])

    def _push_one(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._pending()
        # Text that ends in U+FFFD may be the beginning of a character, but of no more tokens than it can have bytes.
        if not text or (text[-1] == "\ufffd" and len(self._window) - self._read < _MAX_BYTES_OF_A_CHARACTER):
            return ""
        self._window = self._window[self._read :]
        self._read = len(self._window)
        self._context = self._tokenizer.decode_raw(self._window)
        return text

    def _pending(self) -> str:
        """The text of window[read:], in the context of the tokens before it."""
        text = self._tokenizer.decode_raw(self._window)
        if text.startswith(self._context):
            return text[len(self._context) :]
        # The new token changed how those before it read; what was emitted stays.
        return self._tokenizer.decode_raw(self._window[self._read :])

    def finish(self) -> str:
        text = self._pending() if len(self._window) > self._read else ""
        self._window, self._read, self._context = [], 0, ""
        return text
