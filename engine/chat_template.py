"""Chat messages to the prompt that a model was trained on."""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.errors import ConfigError, RequestError

logger = logging.getLogger(__name__)

Messages = Sequence[Mapping[str, Any]]

# Arguments of transformers' apply_chat_template that are not template variables.
_NOT_VARIABLES = {
    "conversation",
    "max_length",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "tokenize",
    "tokenizer_kwargs",
    "truncation",
}


def read_template(source: str) -> str:
    """The text of a template given as a file or literally. Raises ConfigError (key chat_template)."""
    literal = any(mark in source for mark in ("{{", "{%", "\n"))
    if literal:
        return source
    try:
        return Path(source).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "chat_template", source, f"neither a readable file ({error}) nor a template (no '{{{{' or '{{%')"
        ) from None


def check_template(tokenizer: Any, template: str, source: str) -> None:
    """Compile `template`. Raises ConfigError (key chat_template), with the line, when it is no Jinja template.

    A template that compiles and yet refuses a one-message chat is only logged: some want a system message.
    """
    import jinja2

    try:
        _render(tokenizer, [{"role": "user", "content": "Hello"}], chat_template=template, add_generation_prompt=True)
    except (jinja2.TemplateSyntaxError, jinja2.TemplateAssertionError) as error:
        raise ConfigError("chat_template", source, f"line {error.lineno}: {error.message}") from None
    except Exception as error:
        logger.warning("chat_template %s does not render a single user message: %s", source, _describe(error))


def render(
    tokenizer: Any,
    messages: Messages,
    *,
    chat_template: str | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The prompt text of `messages`, rendered in Jinja's sandbox by the (transformers) tokenizer.

    `chat_template` None takes the tokenizer's own. `variables` reach the template by name and may override its special
    tokens. Raises RequestError naming the message, or the template's line, at fault.
    """
    reserved = _NOT_VARIABLES.intersection(variables or ())
    if reserved:
        raise RequestError(
            f"chat_template_kwargs: got {sorted(reserved)}, allowed: any but {sorted(_NOT_VARIABLES)}",
            param="chat_template_kwargs",
        )
    if continue_final_message and add_generation_prompt:
        raise RequestError(
            "continue_final_message and add_generation_prompt exclude each other", param="continue_final_message"
        )
    arguments = {
        "chat_template": chat_template,
        "add_generation_prompt": add_generation_prompt,
        "continue_final_message": continue_final_message,
        "tools": list(tools) if tools else None,
        "documents": list(documents) if documents else None,
    }
    conversation = normalize(messages)
    if chat_template is None and not tokenizer.chat_template:
        raise RequestError("this model has no chat template; set chat_template to one", param="messages")
    try:
        return _render(tokenizer, conversation, **{**(variables or {}), **arguments})
    except Exception as error:
        raise RequestError(f"chat template: {_describe(error)}", param="messages") from error


def normalize(messages: Messages) -> list[dict[str, Any]]:
    """Messages as templates expect them: text parts joined by a line break, tool calls' arguments as objects.

    Raises RequestError naming the message at fault. The given messages are left as they are.
    """
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise RequestError(
            f"messages: got {messages!r:.100}, allowed: a list with at least one message", param="messages"
        )
    return [_normalize_one(f"messages[{i}]", message) for i, message in enumerate(messages)]


def _normalize_one(where: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f"{where}: got {message!r:.100}, allowed: an object", param=where)
    if not isinstance(message.get("role"), str) or not message["role"]:
        raise RequestError(
            f"{where}.role: got {message.get('role')!r:.100}, allowed: a string that is not empty",
            param=f"{where}.role",
        )
    out = dict(message)
    if out["role"] == "function":  # what a tool was called before there were several in one message
        out["role"] = "tool"
    out["content"] = _content(f"{where}.content", message.get("content"), bool(message.get("tool_calls")))
    if message.get("tool_calls"):
        if not isinstance(message["tool_calls"], list):
            raise RequestError(
                f"{where}.tool_calls: got {message['tool_calls']!r:.100}, allowed: a list", param=f"{where}.tool_calls"
            )
        out["tool_calls"] = [_tool_call(f"{where}.tool_calls[{i}]", c) for i, c in enumerate(message["tool_calls"])]
    return out


def _content(where: str, content: Any, optional: bool) -> str | None:
    if isinstance(content, str):
        return content
    if content is None:
        if optional:
            return None
        raise RequestError(f"{where}: got null, allowed: a string or a list of parts", param=where)
    if not isinstance(content, Sequence):
        raise RequestError(f"{where}: got {content!r:.100}, allowed: a string or a list of parts", param=where)
    texts = []
    for i, part in enumerate(content):
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
        if isinstance(part, Mapping) and part.get("type", "text") not in ("text", "input_text", "output_text"):
            raise RequestError(f"{where}[{i}].type: got {part['type']!r:.100}, allowed: 'text'", param=where)
        if not isinstance(text, str):
            raise RequestError(f"{where}[{i}].text: got {text!r:.100}, allowed: a string", param=where)
        texts.append(text)
    return "\n".join(texts)


def _tool_call(where: str, call: Any) -> Any:
    """Clients send a call's arguments as a JSON string; templates print them with `tojson`."""
    if not isinstance(call, Mapping) or not isinstance(call.get("function"), Mapping):
        raise RequestError(f"{where}: got {call!r:.100}, allowed: an object with a function", param=where)
    arguments = call["function"].get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments else {}
        except ValueError as error:
            raise RequestError(f"{where}.function.arguments: not JSON: {error}", param=where) from None
    return {**call, "function": {**call["function"], "arguments": arguments}}


def _render(tokenizer: Any, conversation: list[dict[str, Any]], **arguments: Any) -> str:
    text: str = tokenizer.apply_chat_template(conversation, tokenize=False, **arguments)
    return text


def _describe(error: Exception) -> str:
    """What went wrong, with the template's line when it is known."""
    line = getattr(error, "lineno", None)
    if line is None:
        frames = traceback.extract_tb(error.__traceback__)
        line = next((f.lineno for f in reversed(frames) if f.filename in ("<template>", "<unknown>")), None)
    return f"line {line}: {error}" if line is not None else str(error)
