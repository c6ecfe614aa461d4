"""Anthropic's Messages API: requests as pydantic types, answers as msgspec types."""

from __future__ import annotations

import json
from typing import Any, Literal

import msgspec
from pydantic import BaseModel, ConfigDict

from engine.errors import RequestError


class Block(BaseModel):
    """One piece of a message's content."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: str
    text: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[dict[str, Any]] | None = None
    thinking: str | None = None


class InputMessage(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class CountRequest(BaseModel):
    """POST /v1/messages/count_tokens, and what /v1/messages shares with it."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    model: str
    messages: list[InputMessage]
    system: str | list[Block] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    """Its `type` reaches the chat template as `enable_thinking`."""

    def variables(self) -> dict[str, Any]:
        """What the chat template is told."""
        return {} if self.thinking is None else {"enable_thinking": self.thinking.get("type") != "disabled"}

    def chat(self) -> list[dict[str, Any]]:
        """The messages as OpenAI has them. Raises RequestError for content this model cannot read."""
        out: list[dict[str, Any]] = []
        if self.system:
            out.append({"role": "system", "content": _text("system", self.system)})
        for number, message in enumerate(self.messages):
            out += _messages(f"messages[{number}]", message)
        return out

    def openai_tools(self) -> list[dict[str, Any]] | None:
        """The tools as OpenAI has them."""
        if self.tools is None:
            return None
        for number, tool in enumerate(self.tools):
            if tool.get("type") not in (None, "custom"):
                where = f"tools[{number}].type"
                raise RequestError(f"{where}: got {tool['type']!r:.50}, allowed: custom", param=where)
        return [
            {
                "type": "function",
                "function": {
                    "name": tool.get("name"),
                    "description": tool.get("description", ""),
                    "parameters": tool.get("input_schema"),
                },
            }
            for tool in self.tools
        ]

    def openai_tool_choice(self) -> str | dict[str, Any] | None:
        """The tool choice as OpenAI has it. Raises RequestError."""
        kind = (self.tool_choice or {}).get("type")
        if kind is None:
            return None
        if kind == "tool":
            assert self.tool_choice is not None
            return {"type": "function", "function": {"name": self.tool_choice.get("name")}}
        names = {"auto": "auto", "any": "required", "none": "none"}
        if kind not in names:
            raise RequestError(
                f"tool_choice.type: got {kind!r:.50}, allowed: auto, any, tool or none", param="tool_choice.type"
            )
        return names[kind]


class MessagesRequest(CountRequest):
    """POST /v1/messages."""

    max_tokens: int
    stream: bool = False
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    metadata: dict[str, Any] | None = None

    def sampling(self) -> dict[str, Any]:
        """SamplingParams fields that were given."""
        given = {"max_tokens": self.max_tokens, "stop": self.stop_sequences, "temperature": self.temperature}
        given |= {"top_k": self.top_k, "top_p": self.top_p}
        return {name: value for name, value in given.items() if value is not None}


def _messages(where: str, message: InputMessage) -> list[dict[str, Any]]:
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    results: list[dict[str, Any]] = []
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    for number, block in enumerate(message.content):
        place = f"{where}.content[{number}]"
        if block.type == "tool_result":
            content = block.content if isinstance(block.content, str) else _text(place, block.content or [])
            results.append({"role": "tool", "tool_call_id": block.tool_use_id or "", "content": content})
        elif block.type == "tool_use":
            function = {"name": block.name or "", "arguments": json.dumps(block.input or {})}
            calls.append({"id": block.id or "", "type": "function", "function": function})
        elif block.type not in ("thinking", "redacted_thinking"):
            texts.append(_text(place, [block]))
    out: dict[str, Any] = {"role": message.role, "content": "\n".join(texts)}
    if calls:
        out["tool_calls"] = calls
    return [*results, out] if texts or calls else results


def _text(where: str, content: str | list[Block] | list[dict[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for block in content:
        kind = block.get("type") if isinstance(block, dict) else block.type
        text = block.get("text") if isinstance(block, dict) else block.text
        if kind != "text" or not isinstance(text, str):
            raise RequestError(
                f"{where}: got a {kind!r:.50} block, allowed: text; this model reads text alone", param=where
            )
        texts.append(text)
    return "\n".join(texts)


class TextBlock(msgspec.Struct):
    text: str
    type: str = "text"
    citations: None = None


class ThinkingBlock(msgspec.Struct):
    thinking: str
    signature: str = ""
    type: str = "thinking"


class ToolUseBlock(msgspec.Struct):
    id: str
    name: str
    input: dict[str, Any]
    type: str = "tool_use"


class MessageUsage(msgspec.Struct):
    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int = 0
    cache_creation_input_tokens: int = 0


class Message(msgspec.Struct):
    """An answer of /v1/messages."""

    id: str
    model: str
    content: list[TextBlock | ThinkingBlock | ToolUseBlock]
    usage: MessageUsage
    stop_reason: str | None = None
    stop_sequence: str | None = None
    type: str = "message"
    role: str = "assistant"
