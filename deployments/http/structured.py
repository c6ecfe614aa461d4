"""What a request's fields say of its answer's form: grammars, tools, reasoning."""

from __future__ import annotations

import json
from typing import Any

from deployments.http.openai_types import ChatCompletionRequest, GenerationRequest
from deployments.parsing.answer import AnswerForm, ToolMode, calls_schema, speaks, thinks
from deployments.parsing.reasoning import count_reasoning
from deployments.service import ModelService
from engine.detokenizer import IncrementalDetokenizer
from engine.errors import RequestError
from engine.grammar import Grammar
from engine.output import RequestOutput
from engine.sampling_params import SamplingParams

_GUIDED = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
_KINDS: dict[str, Any] = {"json": "json_schema"}


def grammar_of(body: GenerationRequest) -> Grammar | None:
    """The grammar that a request asks for in any of the ways clients know. Raises RequestError for more than one."""
    found: list[tuple[str, Grammar]] = []
    if body.response_format is not None and (grammar := _response_format(body.response_format)) is not None:
        found.append(("response_format", grammar))
    given = {f"guided_{kind}": (kind, getattr(body, f"guided_{kind}")) for kind in _GUIDED[:4]}
    outputs = body.structured_outputs or {}
    if unknown := sorted(set(outputs) - set(_GUIDED) - _HINTS):
        raise RequestError(
            f"structured_outputs.{unknown[0]}: unknown; allowed: {', '.join(_GUIDED)}", param="structured_outputs"
        )
    given |= {f"structured_outputs.{kind}": (kind, outputs.get(kind)) for kind in _GUIDED}
    for field, (kind, value) in given.items():
        if value is not None and value is not False:
            found.append((field, _grammar(field, kind, value)))
    if len(found) > 1:
        names = ", ".join(field for field, _ in found)
        raise RequestError(f"{names}: only one of them may be given", param=found[1][0])
    return found[0][1] if found else None


_HINTS = {"disable_fallback", "disable_any_whitespace", "disable_additional_properties", "whitespace_pattern"}
"""How other servers' backends go about it; the outputs here match the schema whatever they say."""


def _grammar(field: str, kind: str, value: Any) -> Grammar:
    if kind == "json_object":
        return Grammar("json_object")
    if isinstance(value, str) and kind != "choice":
        return Grammar(_KINDS.get(kind, kind), value)
    if kind in ("regex", "grammar"):
        raise RequestError(f"{field}: got {value!r:.100}, allowed: a string", param=field)
    return Grammar(_KINDS.get(kind, kind), json.dumps(value))


def _response_format(given: dict[str, Any]) -> Grammar | None:
    kind = given.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return Grammar("json_object")
    if kind == "json_schema":
        inner = given.get("json_schema")
        schema = inner.get("schema") if isinstance(inner, dict) else None
        if not isinstance(schema, dict):
            raise RequestError(
                f"response_format.json_schema.schema: got {schema!r:.100}, allowed: a JSON schema (an object)",
                param="response_format.json_schema.schema",
            )
        return Grammar("json_schema", json.dumps(schema))
    if kind == "structural_tag":
        return Grammar("structural_tag", json.dumps(given))
    raise RequestError(
        f"response_format.type: got {kind!r:.50}, allowed: text, json_object, json_schema or structural_tag",
        param="response_format.type",
    )


def tools_of(body: ChatCompletionRequest) -> tuple[ToolMode, list[dict[str, Any]]]:
    """How tools are used, and the functions that may be called. Raises RequestError naming the field at fault."""
    functions = [_function(f"tools[{i}]", tool) for i, tool in enumerate(body.tools or [])]
    choice = body.tool_choice if body.tool_choice is not None else ("auto" if functions else "none")
    if choice == "none":
        return "none", functions
    if not functions:
        raise RequestError(
            f"tool_choice: got {choice!r:.50}, for which tools are needed; allowed without: none", param="tool_choice"
        )
    if choice == "auto":
        return "auto", functions
    if choice == "required":
        return "required", functions
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        return _allowed_tools(choice.get("allowed_tools", choice), functions)
    name = choice.get("function", choice).get("name") if isinstance(choice, dict) else None
    chosen = [function for function in functions if function["name"] == name]
    if not chosen:
        names = ", ".join(repr(function["name"]) for function in functions)
        raise RequestError(
            f"tool_choice: got {choice!r:.100}, allowed: none, auto, required or one of the functions {names}",
            param="tool_choice",
        )
    return "named", chosen[:1]


def _allowed_tools(choice: Any, functions: list[dict[str, Any]]) -> tuple[ToolMode, list[dict[str, Any]]]:
    """OpenAI's choice of some of the tools. Raises RequestError."""
    tools = choice.get("tools") if isinstance(choice, dict) else None
    if not isinstance(tools, list) or choice.get("mode") not in ("auto", "required"):
        raise RequestError(
            f'tool_choice.allowed_tools: got {choice!r:.100}, allowed: {{"mode": "auto" or "required", "tools": […]}}',
            param="tool_choice",
        )
    names = [tool.get("function", tool).get("name") if isinstance(tool, dict) else None for tool in tools]
    chosen = [function for function in functions if function["name"] in names]
    if not chosen:
        given = ", ".join(repr(function["name"]) for function in functions)
        raise RequestError(
            f"tool_choice.allowed_tools.tools: got {names!r:.100}, allowed: some of {given}", param="tool_choice"
        )
    return choice["mode"], chosen


def _function(where: str, tool: Any) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, dict) and tool.get("type", "function") == "function" else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RequestError(
            f'{where}: got {tool!r:.100}, allowed: {{"type": "function", "function": {{"name": …}}}}', param=where
        )
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise RequestError(
            f"{where}.function.parameters: got {parameters!r:.100}, allowed: a JSON schema (an object)",
            param=f"{where}.function.parameters",
        )
    return function


def form_of(
    service: ModelService, mode: ToolMode, ids: list[int], params: SamplingParams, template: str | None = None
) -> AnswerForm:
    """How the answers of this chat, whose prompt's token ids are `ids`, are to be read.

    What a grammar shapes is the answer, even where the prompt has opened the reasoning.
    """
    text = template or service.tokenizer.template_text
    prompt = service.tokenizer.decode_raw(ids[-16:]) if params.grammar is None else ""
    return AnswerForm(reasoning=thinks(text), prompt=prompt, tools=mode, tool_format=speaks(text))


def reasoning_tokens(service: ModelService, form: AnswerForm, result: RequestOutput) -> int:
    """How many tokens of all samples are reasoning."""
    if not form.reasoning:
        return 0
    count = 0
    for output in result.outputs:
        text = IncrementalDetokenizer(service.tokenizer, prompt_token_ids=result.prompt_token_ids)
        count += count_reasoning(output.token_ids, lambda i, text=text: text.push((i,)), prompt=form.prompt)  # type: ignore[misc]
    return count


def forced_calls(functions: list[dict[str, Any]], *, parallel: bool) -> Grammar:
    """The grammar of an answer that must be calls of `functions`."""
    return Grammar("json_schema", calls_schema(functions, parallel=parallel))
