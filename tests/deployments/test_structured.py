"""Structured outputs, tools and reasoning through the openai client, against the embedded model."""

from __future__ import annotations

import json
import re

import jsonschema
import openai
import pytest
from pydantic import BaseModel

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
ASK = [{"role": "user", "content": "Give me JSON with name Ada and age 36."}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 10},
                "days": {"type": "integer", "maximum": 9, "minimum": 1},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {
    "type": "function",
    "function": {"name": "clock", "parameters": {"type": "object", "additionalProperties": False}},
}


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_json_schema_streamed_and_not(client):
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    arguments = {"model": "tiny", "messages": ASK, "response_format": form, "temperature": 0, "max_tokens": 60}
    whole = client.chat.completions.create(**arguments)
    assert whole.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(whole.choices[0].message.content), SCHEMA)
    pieces = [c.choices[0].delta.content or "" for c in client.chat.completions.create(**arguments, stream=True)]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len(pieces) > 3


def test_parse_into_a_class(client):
    class Person(BaseModel):
        name: str
        age: int

    answer = client.chat.completions.parse(
        model="tiny", messages=ASK, response_format=Person, temperature=0, max_tokens=100
    )
    assert answer.choices[0].message.parsed == Person(name="Ada", age=36)


def test_json_object_with_n(client):
    answer = client.chat.completions.create(
        model="tiny", messages=ASK, response_format={"type": "json_object"}, n=3, temperature=1, seed=5, max_tokens=80
    )
    for choice in answer.choices:
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)
    assert any(choice.finish_reason == "stop" for choice in answer.choices)


@pytest.mark.parametrize(
    ("extra", "pattern"),
    [
        ({"guided_regex": "[0-9]{3}-[a-c]+x"}, "[0-9]{3}-[a-c]+x"),
        ({"guided_choice": ["red", "green"]}, "red|green"),
        ({"structured_outputs": {"choice": ["red", "green"]}}, "red|green"),
        ({"structured_outputs": {"regex": "q{2,4}z"}}, "q{2,4}z"),
        ({"guided_grammar": 'root ::= "a" [0-9] "c"'}, "a[0-9]c"),
        ({"guided_json": {"enum": [7, 8]}}, "7|8"),
    ],
)
def test_extensions_in_both_routes(client, extra, pattern):
    chat = client.chat.completions.create(model="tiny", messages=ASK, max_tokens=30, extra_body=extra, seed=1)
    assert re.fullmatch(pattern, chat.choices[0].message.content)
    text = client.completions.create(model="tiny", prompt="Say", max_tokens=30, extra_body=extra, seed=1)
    assert re.fullmatch(pattern, text.choices[0].text)


@pytest.mark.parametrize(
    ("extra", "param", "said"),
    [
        ({"guided_regex": "(["}, "regex", "unclosed"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "only one"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema", "an object"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "objec"}}}},
            "json_schema",
            "objec",
        ),
        ({"structured_outputs": {"jsn": {}}}, "structured_outputs", "unknown"),
        ({"tools": [{"type": "function"}]}, "tools[0]", "function"),
        ({"tools": [WEATHER], "tool_choice": "sometimes"}, "tool_choice", "get_weather"),
        ({"tool_choice": "required"}, "tool_choice", "tools are needed"),
    ],
)
def test_what_is_wrong_is_said(server, extra, param, said):
    answer = server.http.post("/v1/chat/completions", json={"messages": ASK, "max_tokens": 5, **extra})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert said in answer.json()["error"]["message"]
    assert server.http.get("/health").status_code == 200


def test_required_tools_streamed_and_not(client):
    arguments = {
        "model": "tiny", "messages": ASK, "tools": [WEATHER, CLOCK], "tool_choice": "required", "seed": 3,
        "max_tokens": 120, "parallel_tool_calls": False, "temperature": 1,
    }  # fmt: skip
    whole = client.chat.completions.create(**arguments).choices[0]
    assert whole.finish_reason == "tool_calls"
    assert whole.message.content is None
    (call,) = whole.message.tool_calls
    check_call(call.function.name, call.function.arguments)
    name, text, ids = "", "", []
    for chunk in client.chat.completions.create(**arguments, stream=True):
        for part in chunk.choices[0].delta.tool_calls or []:
            assert part.index == 0
            name += part.function.name or ""
            text += part.function.arguments
            ids += [part.id] if part.id else []
    assert (name, json.loads(text)) == (call.function.name, json.loads(call.function.arguments))
    assert len(ids) == 1


def test_a_named_tool(client):
    choice = {"type": "function", "function": {"name": "get_weather"}}
    answer = client.chat.completions.create(
        model="tiny", messages=ASK, tools=[WEATHER, CLOCK], tool_choice=choice, max_tokens=120, temperature=0
    ).choices[0]
    (call,) = answer.message.tool_calls
    assert call.function.name == "get_weather"
    check_call(call.function.name, call.function.arguments)


def check_call(name, arguments):
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in (WEATHER, CLOCK)}
    jsonschema.validate(json.loads(arguments), schemas[name])


def test_auto_tools_in_the_model_s_own_notation(client):
    """A grammar makes the embedded model say what a model that knows tools would say."""
    said = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>'
    arguments = {
        "model": "tiny", "messages": ASK, "tools": [WEATHER], "max_tokens": 150,
        "extra_body": {"guided_choice": ["Let me look.\n" + said]},
    }  # fmt: skip
    whole = client.chat.completions.create(**arguments).choices[0]
    assert whole.finish_reason == "tool_calls"
    assert whole.message.content == "Let me look.\n"
    assert json.loads(whole.message.tool_calls[0].function.arguments) == {"city": "Oslo", "days": 2}
    chunks = list(client.chat.completions.create(**arguments, stream=True))
    content = "".join(c.choices[0].delta.content or "" for c in chunks)
    parts = [p for c in chunks for p in c.choices[0].delta.tool_calls or []]
    assert content == "Let me look.\n"
    assert json.loads("".join(p.function.arguments for p in parts)) == {"city": "Oslo", "days": 2}
    assert len(parts) > 3
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_reasoning_is_told_apart(client):
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}{# <think> #}"
    )
    extra = {"guided_choice": ["<think>\n4 is even.\n</think>\n\nYes."], "chat_template": template}
    arguments = {"model": "tiny", "messages": ASK, "max_tokens": 80, "extra_body": extra}
    answer = client.chat.completions.create(**arguments)
    message = answer.choices[0].message
    assert (message.reasoning, message.content) == ("4 is even.\n", "Yes.")
    thought = answer.usage.completion_tokens_details.reasoning_tokens
    assert len("<think>\n4 is even.") / 4 < thought < answer.usage.completion_tokens
    chunks = list(client.chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True}))
    assert chunks.pop().usage.completion_tokens_details.reasoning_tokens == thought
    deltas = [c.choices[0].delta for c in chunks]
    assert "".join(getattr(d, "reasoning", None) or "" for d in deltas) == "4 is even.\n"
    assert "".join(d.content or "" for d in deltas) == "Yes."


def test_what_a_grammar_shapes_is_no_reasoning_even_where_the_prompt_opened_it(client):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}<think>\n"
    extra = {"guided_choice": ["Yes."], "chat_template": template}
    answer = client.chat.completions.create(model="tiny", messages=ASK, max_tokens=20, extra_body=extra)
    assert (answer.choices[0].message.content, answer.usage.completion_tokens_details.reasoning_tokens) == ("Yes.", 0)
    extra = {"chat_template": template, "ignore_eos": True}
    answer = client.chat.completions.create(model="tiny", messages=ASK, max_tokens=5, extra_body=extra)
    assert answer.usage.completion_tokens_details.reasoning_tokens == 5


def test_some_of_the_tools(client):
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [CLOCK]}}
    answer = client.chat.completions.create(
        model="tiny", messages=ASK, tools=[WEATHER, CLOCK], tool_choice=choice, max_tokens=60, seed=1
    )
    assert answer.choices[0].message.tool_calls[0].function.name == CLOCK["function"]["name"]


@pytest.mark.parametrize(
    "choice", [{"mode": "auto"}, {"mode": "maybe", "tools": [CLOCK]}, {"mode": "auto", "tools": ["x"]}]
)
def test_a_bad_choice_of_some_tools(server, choice):
    body = {"messages": ASK, "tools": [WEATHER], "tool_choice": {"type": "allowed_tools", "allowed_tools": choice}}
    answer = server.http.post("/v1/chat/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tool_choice")
