"""The anthropic package: messages whole, streamed and with tools."""

from __future__ import annotations

from anthropic import Anthropic

DISTRIBUTION = "anthropic"
RAN = "messages: create, stream, a tool named and its result, count_tokens"
SUM = [{"role": "user", "content": "What is 47 + 38?"}]
GREEDY = {"extra_body": {"temperature": 0}}
TOOL = {
    "name": "add",
    "description": "Adds two numbers",
    "input_schema": {
        "type": "object",
        "properties": {"a": {"type": "integer", "maximum": 99}, "b": {"type": "integer", "maximum": 99}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
}


def check(url: str) -> str:
    """Raises when an answer is not what it must be."""
    client = Anthropic(base_url=url, api_key="none")
    made = client.messages.create(model="tiny", max_tokens=40, messages=SUM, **GREEDY)
    assert made.content[0].text == "47 + 38 = 85"
    assert made.stop_reason == "end_turn"
    with client.messages.stream(model="tiny", max_tokens=40, messages=SUM, **GREEDY) as stream:
        pieces = list(stream.text_stream)
        assert stream.get_final_message().usage.output_tokens == made.usage.output_tokens
    assert "".join(pieces) == "47 + 38 = 85"
    named = {"type": "tool", "name": "add", "disable_parallel_tool_use": True}
    called = client.messages.create(
        model="tiny", max_tokens=80, messages=SUM, tools=[TOOL], tool_choice=named, **GREEDY
    )
    call = called.content[0]
    assert called.stop_reason == "tool_use"
    assert call.name == "add"
    assert set(call.input) == {"a", "b"}
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "85"}]}
    turns = [*SUM, {"role": "assistant", "content": [call.model_dump()]}, result]
    assert client.messages.create(model="tiny", max_tokens=20, messages=turns, tools=[TOOL], **GREEDY).content
    counted = client.messages.count_tokens(model="tiny", messages=SUM).input_tokens
    assert counted == made.usage.input_tokens
    return f"all answers right; {len(pieces)} pieces of text streamed"
