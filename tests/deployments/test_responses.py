"""The Responses API through the openai client."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest
from pydantic import BaseModel

ASK = "What is 47 + 38?"
TOOL = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 8}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_create(client):
    response = client.responses.create(model="tiny", input=ASK, temperature=0)
    assert response.output_text == "47 + 38 = 85"
    assert response.status == "completed"
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens


def test_events_come_in_order_and_add_up(client):
    events = list(client.responses.create(model="tiny", input=ASK, temperature=0, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == "47 + 38 = 85"
    assert events[-1].response.output_text == "47 + 38 = 85"


def test_stream_helper_async(server):
    async def main():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            async with client.responses.stream(model="tiny", input=ASK, temperature=0) as stream:
                async for _ in stream:
                    pass
                return (await stream.get_final_response()).output_text

    assert asyncio.run(main()) == "47 + 38 = 85"


def test_going_on_from_an_earlier_response(client):
    first = client.responses.create(model="tiny", input="My name is Anna.", temperature=0)
    second = client.responses.create(
        model="tiny", input="What is my name?", previous_response_id=first.id, temperature=0
    )
    assert "Anna" in second.output_text
    assert client.responses.retrieve(first.id).output_text == first.output_text
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.NotFoundError) as caught:
        client.responses.create(model="tiny", input="x", previous_response_id=first.id)
    assert caught.value.param == "previous_response_id"


def test_not_stored_when_not_wanted(client):
    response = client.responses.create(model="tiny", input=ASK, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)


def test_instructions_items_and_length(client):
    items = [{"role": "user", "content": [{"type": "input_text", "text": "Count from 1 to 40."}]}]
    response = client.responses.create(
        model="tiny", input=items, instructions="Be brief.", temperature=0, max_output_tokens=5
    )
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"


def test_parse(client):
    class Person(BaseModel):
        name: str
        age: int

    ask = "Give me JSON with name Ada and age 36."
    response = client.responses.parse(model="tiny", input=ask, text_format=Person, temperature=0)
    assert response.output_parsed == Person(name="Ada", age=36)


def test_function_calls_and_their_results(client):
    arguments = {"model": "tiny", "input": ASK, "tools": [TOOL], "tool_choice": "required", "temperature": 0}
    response = client.responses.create(**arguments, parallel_tool_calls=False)
    (call,) = response.output
    assert (call.type, call.name) == ("function_call", "get_weather")
    assert set(json.loads(call.arguments)) == {"city"}
    events = list(client.responses.create(**arguments, parallel_tool_calls=False, stream=True))
    deltas = "".join(e.delta for e in events if e.type == "response.function_call_arguments.delta")
    assert json.loads(deltas) == json.loads(call.arguments)
    answer = client.responses.create(
        model="tiny", previous_response_id=response.id,
        input=[{"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}],
    )  # fmt: skip
    assert answer.status in ("completed", "incomplete")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "image"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"background": True}, "background"),
        ({"temperature": -1}, "temperature"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 9999}, "max_output_tokens"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"truncation": "sometimes"}, "truncation"),
    ],
)
def test_what_is_wrong_is_said(server, change, param):
    answer = server.http.post("/v1/responses", json={"input": ASK, **change})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_reasoning_tokens_are_counted(server, client, monkeypatch):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}<think>\n"
    monkeypatch.setattr(server.service.tokenizer, "chat_template", template)
    answer = client.responses.create(model="tiny", input="Hi", max_output_tokens=6)
    assert answer.output[0].type == "reasoning"
    assert answer.usage.output_tokens_details.reasoning_tokens == answer.usage.output_tokens > 0


def test_logprobs_of_the_text(client):
    arguments = {"model": "tiny", "input": ASK, "temperature": 0, "top_logprobs": 2}
    whole = client.responses.create(**arguments)
    (part,) = whole.output[0].content
    assert "".join(entry.token for entry in part.logprobs).startswith(part.text)
    assert all(len(entry.top_logprobs) == 2 and entry.logprob <= 0 for entry in part.logprobs)
    events = list(client.responses.create(**arguments, stream=True))
    told = [entry.token for e in events if e.type == "response.output_text.delta" for entry in e.logprobs or []]
    assert told == [entry.token for entry in part.logprobs][: len(told)] and len(told) > 3
    plain = client.responses.create(model="tiny", input=ASK, temperature=0, include=["message.output_text.logprobs"])
    assert [entry.top_logprobs for entry in plain.output[0].content[0].logprobs] == [[]] * len(part.logprobs)


def test_the_oldest_items_may_be_left_out(client):
    items = [{"role": "user", "content": f"{number} " * 40} for number in range(20)]
    items.append({"role": "user", "content": ASK})
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="tiny", input=items, max_output_tokens=20)
    assert caught.value.param == "input"
    answer = client.responses.create(model="tiny", input=items, max_output_tokens=20, truncation="auto")
    assert 100 < answer.usage.input_tokens <= 236
