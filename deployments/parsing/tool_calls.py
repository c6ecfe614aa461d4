"""Tool calls in the models' own notations, recognised while they stream and told as OpenAI tells them.

hermes    <tool_call>{"name": "f", "arguments": {…}}</tool_call>, any number (Hermes, Qwen 2.5 and 3)
llama3    {"name": "f", "parameters": {…}}, alone, after <|python_tag|>, or divided by ";" (Llama 3.1 to 3.3)
mistral   [TOOL_CALLS][{"name": "f", "arguments": {…}}, …], or [TOOL_CALLS]f[ARGS]{…}
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from typing import Literal, Protocol

from deployments.parsing.markers import MarkerScanner

ToolFormat = Literal["hermes", "llama3", "mistral"]


@dataclass
class ToolCallDelta:
    """A piece of one call: the first has its id and name, later ones only more of the arguments' JSON text."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass
class Parsed:
    """What a piece of text added: words for the reader, and pieces of calls."""

    content: str = ""
    calls: list[ToolCallDelta] = field(default_factory=list)


class ToolCallParser(Protocol):
    """Feeds on one sample's text as it streams."""

    num_calls: int

    def push(self, text: str) -> Parsed:
        """What a piece of text adds; the beginning of a marker or of a call is held back until it is whole."""
        ...

    def finish(self) -> Parsed:
        """What was held back: the text has ended."""
        ...


def make_parser(tool_format: ToolFormat) -> ToolCallParser:
    """A fresh parser of one sample."""
    parsers: dict[str, type[ToolCallParser]] = {
        "hermes": HermesParser,
        "llama3": Llama3Parser,
        "mistral": MistralParser,
    }
    return parsers[tool_format]()


def detect_format(chat_template: str | None) -> ToolFormat:
    """Which notation a model speaks, from the words of its chat template; Hermes' where nothing tells."""
    template = chat_template or ""
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "<tool_call>" not in template and ("<|python_tag|>" in template or '"parameters"' in template):
        return "llama3"
    return "hermes"


def new_call_id() -> str:
    """An id that no other call has, as OpenAI spells them."""
    return f"call_{secrets.token_hex(12)}"


class CallScanner:
    """Reads one call object, `{"name": …, "arguments": …}`, a character at a time.

    The arguments' text is passed on as it comes; the name is known before (and where a model writes it after the
    arguments, these wait for it). `done` once the object's last brace was read.
    """

    def __init__(self, *, name: str | None = None) -> None:
        """With `name`, what is read is the arguments object alone."""
        self.name = name
        self.done = False
        self.bad = False
        self._bare = name is not None
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._key = ""
        self._token = ""  # the string or scalar being read at depth 1
        self._reading_value = self._bare
        self._arguments: list[str] = []

    def feed(self, char: str) -> None:
        """Take one character. After `done` or `bad` none may come."""
        if self._bare:
            self._feed_value(char, floor=0)
            self.done = self._depth == 0 and bool(self._arguments) and not self._in_string
            return
        if self._depth == 0:
            if char == "{":
                self._depth = 1
            elif not char.isspace():
                self.bad = True
            return
        if self._reading_value:
            if self._depth == 1 and not self._in_string and char in ",}":
                self._end_value()
            else:
                self._feed_value(char, floor=1)
                return
        if self._in_string:
            self._track_string(char)
            self._token += char
            return
        if char == '"':
            self._in_string, self._token = True, char
        elif char == ":":
            self._key = _string(self._token)
            self._reading_value, self._token = True, ""
        elif char == "}":
            self._depth = 0
            self.done = True

    def take_arguments(self) -> str:
        """The arguments' text since the last call of this, once the name is known."""
        if self.name is None:
            return ""
        text = "".join(self._arguments)
        self._arguments = [""] if self._bare and self._arguments else []
        return text

    def _feed_value(self, char: str, *, floor: int) -> None:
        is_arguments = self._bare or self._key in ("arguments", "parameters")
        if self._in_string:
            self._track_string(char)
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
        if is_arguments:
            if self._arguments or self._token or not char.isspace():
                self._arguments.append(char)
                self._token = "…"  # marks that the value has begun, so that inner white space is kept
        else:
            self._token += char
        assert self._depth >= floor or self.bad or self._bare

    def _end_value(self) -> None:
        if self._key == "name":
            self.name = _string(self._token.strip())
        self._reading_value, self._token, self._key = False, "", ""

    def _track_string(self, char: str) -> None:
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char == '"':
            self._in_string = False


def _string(token: str) -> str:
    try:
        value = json.loads(token)
    except ValueError:
        return token.strip('"')
    return value if isinstance(value, str) else token


class _Calls:
    """Numbers the calls of one sample and turns scanners into deltas."""

    def __init__(self) -> None:
        self.num_calls = 0
        self._scanner: CallScanner | None = None
        self._raw = ""  # the text of the call being read: given back as content if it turns out to be none
        self._told = False

    def _begin(self, name: str | None = None) -> None:
        self._scanner, self._raw, self._told = CallScanner(name=name), "", False

    def _read_call(self, text: str, out: Parsed) -> str:
        """Feed the call being read; returns the text behind its end. A malformed one comes back as content."""
        assert self._scanner is not None
        for at, char in enumerate(text):
            self._raw += char
            self._scanner.feed(char)
            if self._scanner.bad:
                out.content += self._raw
                self._scanner = None
                return text[at + 1 :]
            if self._scanner.done:
                self._tell(out)
                if not self._told:
                    out.content += self._raw  # an object without a name is no call
                self._scanner = None
                return text[at + 1 :]
        self._tell(out)
        return ""

    def _tell(self, out: Parsed) -> None:
        assert self._scanner is not None
        if self._scanner.name is None:
            return
        arguments = self._scanner.take_arguments()
        if not self._told:
            self._told = True
            self.num_calls += 1
            arguments = arguments or ("{}" if self._scanner.done else "")
            out.calls.append(ToolCallDelta(self.num_calls - 1, new_call_id(), self._scanner.name, arguments))
        elif arguments:
            out.calls.append(ToolCallDelta(self.num_calls - 1, arguments=arguments))

    def _abandon(self, out: Parsed) -> None:
        """The stream ended inside a call: one not yet told of was only text."""
        if self._scanner is not None and not self._told:
            out.content += self._raw
        self._scanner = None


class HermesParser(_Calls):
    """<tool_call> … </tool_call>, with words before and between."""

    OPEN, CLOSE = "<tool_call>", "</tool_call>"

    def __init__(self) -> None:
        super().__init__()
        self._text = MarkerScanner()
        self._closing = False

    def push(self, text: str) -> Parsed:
        out = Parsed()
        self._text.push(text)
        while True:
            if self._scanner is not None:
                self._text.push_front(self._read_call(self._text.rest(), out))
                if self._scanner is not None:
                    return out
                self._closing = True
            piece, marker = self._text.until(*((self.CLOSE, self.OPEN) if self._closing else (self.OPEN,)))
            if self.num_calls and not piece.strip():
                piece = ""  # the line breaks between calls
            out.content += piece
            if marker is None:
                return out
            self._closing = False
            if marker == self.OPEN:
                self._begin()

    def finish(self) -> Parsed:
        out = Parsed()
        self._abandon(out)
        out.content += self._text.rest()
        return out


class Llama3Parser(_Calls):
    """The whole answer is calls, or none of it is: the first character that is no white space tells."""

    TAG = "<|python_tag|>"

    def __init__(self) -> None:
        super().__init__()
        self._start: str | None = ""  # what came before it was clear which; None afterwards
        self._plain = False

    def push(self, text: str) -> Parsed:
        out = Parsed()
        if self._start is not None:
            self._start += text
            head = self._start.lstrip()
            if not head or (len(head) < len(self.TAG) and self.TAG.startswith(head)):
                return out
            text = head[len(self.TAG) :] if head.startswith(self.TAG) else head
            self._plain = not text.lstrip().startswith("{") and not head.startswith(self.TAG)
            if self._plain:
                text = self._start
            self._start = None
        if self._plain:
            out.content += text
            return out
        while text:
            if self._scanner is None:
                stripped = text.lstrip(" \n\r\t;")
                if not stripped:
                    return out
                if stripped[0] != "{":
                    self._plain = True
                    out.content += stripped if self.num_calls else text
                    return out
                text = stripped
                self._begin()
            text = self._read_call(text, out)
        return out

    def finish(self) -> Parsed:
        out = Parsed(content=self._start or "")
        self._start = None
        self._abandon(out)
        return out


class MistralParser(_Calls):
    """[TOOL_CALLS] and a list of calls, or name[ARGS]object as the newer models write."""

    TAG, ARGS = "[TOOL_CALLS]", "[ARGS]"

    def __init__(self) -> None:
        super().__init__()
        self._text = MarkerScanner()
        self._mode: Literal["text", "open", "list", "name"] = "text"
        self._name = ""

    def push(self, text: str) -> Parsed:
        out = Parsed()
        self._text.push(text)
        while True:
            if self._scanner is not None:
                self._text.push_front(self._read_call(self._text.rest(), out))
                if self._scanner is not None:
                    return out
                self._mode = "list" if self._mode == "list" else "text"
            if self._mode == "text":
                piece, marker = self._text.until(self.TAG)
                out.content += piece
                if marker is None:
                    return out
                self._mode = "open"
            rest = self._text.rest().lstrip()
            if not rest:
                return out
            if self._mode == "open":
                self._mode, rest = ("list", rest[1:]) if rest[0] == "[" else ("name", rest)
            self._text.push_front(rest)
            if self._mode == "list":
                rest = self._text.rest().lstrip(" \n\r\t,")
                if rest.startswith("]"):
                    self._mode, rest = "text", rest[1:]
                elif rest:
                    self._begin()
                else:
                    return out
                self._text.push_front(rest)
            elif self._mode == "name":
                piece, marker = self._text.until(self.ARGS)
                self._name += piece
                if marker is None:
                    return out
                self._begin(self._name.strip())
                self._name = ""

    def finish(self) -> Parsed:
        out = Parsed()
        self._abandon(out)
        out.content += self._name + self._text.rest()
        return out
