"""ItemWriter: the items of a Responses answer (messages, function calls, reasoning), and the events of their growth."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from deployments.http.openai_replies import TokenLogprob
from deployments.parsing.answer import AnswerDelta

Item = dict[str, Any]


class ItemWriter:
    """The items of an answer as they grow, and the events that tell of it."""

    def __init__(self) -> None:
        self.items: list[Item] = []
        self._kind = ""
        self._pending: list[TokenLogprob] = []
        """Of tokens whose text has not come yet."""

    def write(self, part: AnswerDelta, logprobs: Sequence[TokenLogprob] = ()) -> list[Item]:
        """Add what a piece of text brought, and its tokens' log-probabilities if asked for; the events of it."""
        events: list[Item] = []
        self._pending = [] if part.reasoning and not part.content else [*self._pending, *logprobs]
        if part.reasoning:
            events += self._open("reasoning", _reasoning_item)
            events += self._add_text(part.reasoning, "response.reasoning_text.delta")
        if part.content and not (self._kind.startswith("call") and not part.content.strip()):
            events += self._open("message", _message_item)
            pending, self._pending = self._pending, []
            self.items[-1]["content"][0]["logprobs"] += pending
            events += self._add_text(part.content, "response.output_text.delta", logprobs=pending)
        for call in part.calls:
            if call.id is not None and call.name is not None:
                fields = {"call_id": call.id, "name": call.name}
                events += self._open(f"call {call.index}", lambda fields=fields: _call_item(**fields))
            if call.arguments:
                self.items[-1]["arguments"] += call.arguments
                events.append(self._at("response.function_call_arguments.delta", delta=call.arguments))
        return events

    def close(self) -> list[Item]:
        """End the item that is open; an answer without any has one empty message."""
        events = self._open("message", _message_item) if not self.items else []
        return events + self._end()

    def _open(self, kind: str, make: Any) -> list[Item]:
        if kind == self._kind:
            return []
        events = self._end() if self.items else []
        self._kind = kind
        item = make()
        self.items.append(item)
        shown = {**item, "content": []} if "content" in item else dict(item)
        events.append({"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": shown})
        if "content" in item:
            part = dict(item["content"][0])
            events.append(self._at("response.content_part.added", content_index=0, part=part))
        return events

    def _add_text(self, text: str, kind: str, **more: Any) -> list[Item]:
        self.items[-1]["content"][0]["text"] += text
        return [self._at(kind, content_index=0, delta=text, **more)]

    def _end(self) -> list[Item]:
        item = self.items[-1]
        item["status"] = "completed"
        events: list[Item] = []
        if item["type"] == "function_call":
            whole = {"arguments": item["arguments"], "name": item["name"]}
            events.append(self._at("response.function_call_arguments.done", **whole))
        else:
            part = item["content"][0]
            kind = "output_text" if item["type"] == "message" else "reasoning_text"
            more: Item = {"logprobs": part["logprobs"]} if kind == "output_text" else {}
            events.append(self._at(f"response.{kind}.done", content_index=0, text=part["text"], **more))
            events.append(self._at("response.content_part.done", content_index=0, part=dict(part)))
        events.append({"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": dict(item)})
        return events

    def _at(self, kind: str, **fields: Any) -> Item:
        return {"type": kind, "item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, **fields}


def _message_item() -> Item:
    part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    return {
        "type": "message",
        "id": f"msg_{secrets.token_hex(12)}",
        "status": "in_progress",
        "role": "assistant",
        "content": [part],
    }


def _reasoning_item() -> Item:
    part = {"type": "reasoning_text", "text": ""}
    return {
        "type": "reasoning",
        "id": f"rs_{secrets.token_hex(12)}",
        "status": "in_progress",
        "summary": [],
        "content": [part],
    }


def _call_item(call_id: str, name: str) -> Item:
    return {
        "type": "function_call",
        "id": f"fc_{secrets.token_hex(12)}",
        "call_id": call_id,
        "name": name,
        "arguments": "",
        "status": "in_progress",
    }


def as_messages(items: list[Item]) -> list[Item]:
    """Items as the chat messages that a later response goes on from; reasoning is not told again."""
    messages: list[Item] = []
    for item in items:
        if item["type"] == "message":
            messages.append({"role": "assistant", "content": item["content"][0]["text"]})
        elif item["type"] == "function_call":
            function = {"name": item["name"], "arguments": item["arguments"]}
            call = {"id": item["call_id"], "type": "function", "function": function}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
    return messages
