"""AnswerParser: one sample's text, as it streams, into reasoning, words and tool calls."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from deployments.parsing.reasoning import CLOSE, OPEN, ReasoningSplitter
from deployments.parsing.tool_calls import (
    MistralParser,
    Parsed,
    ToolCallDelta,
    ToolCallParser,
    ToolFormat,
    detect_format,
    make_parser,
)

ToolMode = Literal["none", "auto", "required", "named"]


@dataclass(frozen=True)
class AnswerForm:
    """What a sample's text may be made of."""

    reasoning: bool = False
    prompt: str = ""
    """The rendered prompt: it may have opened the reasoning."""
    tools: ToolMode = "none"
    tool_format: ToolFormat = "hermes"


@dataclass
class AnswerDelta:
    """What a piece of text added."""

    reasoning: str
    content: str
    calls: list[ToolCallDelta]


class AnswerParser:
    """Feeds on one sample's text. Under "required" and "named" the text is a JSON list of calls, by its grammar."""

    def __init__(self, form: AnswerForm) -> None:
        self._splitter = ReasoningSplitter(prompt=form.prompt) if form.reasoning else None
        self._tools: ToolCallParser | None = None
        if form.tools == "auto":
            self._tools = make_parser(form.tool_format)
        elif form.tools != "none":
            self._tools = MistralParser()
            self._tools.push(MistralParser.TAG)
        self._named = form.tools == "named"

    def push(self, text: str, *, last: bool = False) -> AnswerDelta:
        """What `text` adds; with `last`, what was held back too."""
        reasoning, content = "", text
        if self._splitter is not None:
            reasoning, content = self._splitter.push(text)
            if last:
                more, rest = self._splitter.finish()
                reasoning, content = reasoning + more, content + rest
        if self._tools is None:
            return AnswerDelta(reasoning, content, [])
        parsed = self._tools.push(content) if content else Parsed()
        if last:
            rest_parsed = self._tools.finish()
            parsed = Parsed(parsed.content + rest_parsed.content, parsed.calls + rest_parsed.calls)
        return AnswerDelta(reasoning, parsed.content, parsed.calls)

    def finish_reason(self, reason: str | None) -> str | None:
        """The reason a client is told: a sample that stopped by calling tools says so, unless it was told which."""
        called = self._tools is not None and self._tools.num_calls > 0 and not self._named
        return "tool_calls" if called and reason == "stop" else reason


def thinks(chat_template: str | None) -> bool:
    """Whether a model's template speaks of reasoning."""
    return chat_template is not None and (OPEN in chat_template or CLOSE in chat_template)


def speaks(chat_template: str | None) -> ToolFormat:
    """In which notation a model calls tools."""
    return detect_format(chat_template)


def calls_schema(tools: Sequence[dict[str, Any]], *, parallel: bool) -> str:
    """The JSON schema (text) of a list of calls of `tools`, given as {"name", "parameters"} objects."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool["name"]}, "arguments": tool.get("parameters") or {"type": "object"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    # Definitions that a tool's own schema refers to stand at its root: "#/$defs/…" must find them at the list's.
    definitions = {k: v for tool in tools for k, v in ((tool.get("parameters") or {}).get("$defs") or {}).items()}
    schema: dict[str, Any] = {
        "type": "array",
        "minItems": 1,
        "items": calls[0] if len(calls) == 1 else {"anyOf": calls},
    }
    if not parallel:
        schema["maxItems"] = 1
    if definitions:
        schema["$defs"] = definitions
    return json.dumps(schema)
