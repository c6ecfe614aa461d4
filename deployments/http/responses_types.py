"""OpenAI's Responses API: the request as a pydantic type, and what its items say as chat messages."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from deployments.http.openai_types import ChatCompletionRequest
from engine.errors import RequestError

_TEXT_PARTS = ("input_text", "output_text", "text")


class ResponsesRequest(BaseModel):
    """POST /v1/responses."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    model: str | None = None
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    background: bool | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    include: list[str] | None = None
    """message.output_text.logprobs is heeded."""
    text: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    """auto: the oldest items are left out where the context cannot hold all."""
    user: str | None = None
    safety_identifier: str | None = None
    """What OpenAI has in the place of `user`. Without API keys: the tenant, for fair shares."""

    @property
    def wants_logprobs(self) -> bool:
        return self.top_logprobs is not None or "message.output_text.logprobs" in (self.include or ())

    def messages(self) -> list[dict[str, Any]]:
        """The input's items as chat messages. Raises RequestError naming the item at fault."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        out: list[dict[str, Any]] = []
        for number, item in enumerate(self.input):
            out += _item(f"input[{number}]", item)
        if not out:
            raise RequestError("input: at least one item is needed", param="input")
        return out

    def chat(self, messages: list[dict[str, Any]]) -> ChatCompletionRequest:
        """The same request of the chat route, of which this one is another dress."""
        form = (self.text or {}).get("format")
        if form is not None and form.get("type") == "json_schema":
            form = {"type": "json_schema", "json_schema": {"name": form.get("name"), "schema": form.get("schema")}}
        tools = None if self.tools is None else [_tool(f"tools[{i}]", tool) for i, tool in enumerate(self.tools)]
        choice = self.tool_choice
        if isinstance(choice, dict):
            choice = {"type": "function", "function": {"name": choice.get("name")}}
        return ChatCompletionRequest(
            model=self.model,
            messages=messages,
            max_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            response_format=form,
            tools=tools,
            tool_choice=choice if tools or choice not in ("auto", "none") else None,
            logprobs=self.wants_logprobs or None,
            top_logprobs=self.top_logprobs,
            parallel_tool_calls=self.parallel_tool_calls,
            reasoning_effort=(self.reasoning or {}).get("effort"),
        )


def _item(where: str, item: dict[str, Any]) -> list[dict[str, Any]]:
    kind = item.get("type", "message")
    if kind == "message":
        return [{"role": item.get("role"), "content": _content(f"{where}.content", item.get("content"))}]
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments") or "{}"}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        return [{"role": "assistant", "content": "", "tool_calls": [call]}]
    if kind == "function_call_output":
        content = _content(f"{where}.output", item.get("output"))
        return [{"role": "tool", "tool_call_id": item.get("call_id"), "content": content}]
    if kind == "reasoning":
        return []
    raise RequestError(
        f"{where}.type: got {kind!r:.50}, allowed: message, function_call, function_call_output or reasoning",
        param=f"{where}.type",
    )


def _content(where: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for part in content if isinstance(content, list) else [content]:
        text = part.get("text") if isinstance(part, dict) and part.get("type") in _TEXT_PARTS else None
        if not isinstance(text, str):
            raise RequestError(f"{where}: got {part!r:.100}, allowed: a text or a list of text parts", param=where)
        texts.append(text)
    return "\n".join(texts)


def _tool(where: str, tool: dict[str, Any]) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise RequestError(f"{where}.type: got {tool.get('type')!r:.50}, allowed: function", param=f"{where}.type")
    return {"type": "function", "function": {k: v for k, v in tool.items() if k not in ("type", "strict")}}
