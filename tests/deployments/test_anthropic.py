"""The Messages API through the anthropic client."""

from __future__ import annotations

import anthropic
import pytest

ASK = [{"role": "user", "content": "What is 47 + 38?"}]
TOOL = {
    "name": "get_weather",
    "description": "The weather of a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 8}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def client(server):
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def test_message(client):
    message = client.messages.create(model="tiny", max_tokens=30, messages=ASK)
    assert message.content[0].text == "47 + 38 = 85"
    assert message.stop_reason == "end_turn"
    assert message.usage.input_tokens > 5
    assert message.usage.output_tokens > 5


def test_stream_adds_up(client):
    with client.messages.stream(model="tiny", max_tokens=30, messages=ASK) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == final.content[0].text == "47 + 38 = 85"
    assert final.stop_reason == "end_turn"
    assert final.usage.output_tokens > 5


def test_system_and_blocks_and_stop_sequences(client):
    message = client.messages.create(
        model="tiny", max_tokens=60, system=[{"type": "text", "text": "Be brief."}],
        messages=[{"role": "user", "content": [{"type": "text", "text": "Count from 1 to 9."}]}],
        stop_sequences=[", 4"],
    )  # fmt: skip
    assert message.stop_reason == "stop_sequence"
    assert message.stop_sequence == ", 4"
    assert message.content[0].text.endswith("2, 3")


def test_sampling_parameters_of_older_clients(server):
    body = {"model": "tiny", "max_tokens": 30, "messages": ASK, "temperature": 0.01, "top_k": 1, "top_p": 0.5}
    answer = server.http.post("/v1/messages", json=body).json()
    assert answer["content"][0]["text"] == "47 + 38 = 85"


def test_length(client):
    message = client.messages.create(model="tiny", max_tokens=2, messages=ASK)
    assert message.stop_reason == "max_tokens"


def test_a_tool_that_must_be_used_streamed_and_not(client):
    arguments = {
        "model": "tiny", "max_tokens": 120, "messages": ASK, "tools": [TOOL],
        "tool_choice": {"type": "tool", "name": "get_weather"},
    }  # fmt: skip
    whole = client.messages.create(**arguments)
    assert whole.stop_reason == "tool_use"
    (block,) = whole.content
    assert (block.type, block.name) == ("tool_use", "get_weather")
    assert set(block.input) == {"city"}
    with client.messages.stream(**arguments) as stream:
        final = stream.get_final_message()
    assert final.content[0].input == block.input
    assert final.stop_reason == "tool_use"


def test_count_tokens(client):
    counted = client.messages.count_tokens(model="tiny", messages=ASK).input_tokens
    message = client.messages.create(model="tiny", max_tokens=1, messages=ASK)
    assert counted == message.usage.input_tokens


def test_async(server):
    import asyncio

    async def main():
        async with anthropic.AsyncAnthropic(base_url=server.url, api_key="none") as client:
            calls = [client.messages.create(model="tiny", max_tokens=20, messages=ASK) for _ in range(5)]
            return await asyncio.gather(*calls)

    assert {m.content[0].text for m in asyncio.run(main())} == {"47 + 38 = 85"}


@pytest.mark.parametrize(
    ("change", "status", "kind"),
    [
        ({"model": "nothing"}, 404, "not_found_error"),
        ({"max_tokens": 0}, 400, "invalid_request_error"),
        ({"messages": []}, 400, "invalid_request_error"),
        ({"temperature": -1}, 400, "invalid_request_error"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, 400, "invalid_request_error"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "invalid_request_error"),
        ({"tools": [TOOL], "tool_choice": {"type": "maybe"}}, 400, "invalid_request_error"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, 400, "invalid_request_error"),
    ],
)
def test_errors_in_its_shape(server, change, status, kind):
    body = {"model": "tiny", "max_tokens": 5, "messages": ASK, **change}
    answer = server.http.post("/v1/messages", json=body)
    assert answer.status_code == status
    assert answer.json()["type"] == "error"
    assert answer.json()["error"]["type"] == kind


def test_thinking_reaches_the_template(server, client, monkeypatch):
    template = "{{ 'on' if enable_thinking is defined and enable_thinking else 'off off off' }}"
    monkeypatch.setattr(server.service.tokenizer, "chat_template", template)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
    off = client.messages.count_tokens(**body).input_tokens
    on = client.messages.count_tokens(**body, thinking={"type": "enabled", "budget_tokens": 1024}).input_tokens
    assert on < off
