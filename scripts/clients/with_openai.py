"""The openai package: sync, async, streams, tools, structured answers, responses, embeddings."""

from __future__ import annotations

import asyncio

from openai import AsyncOpenAI, BadRequestError, OpenAI
from pydantic import BaseModel

DISTRIBUTION = "openai"
RAN = "sync and async chats, streams, completions, tools, parse, responses, embeddings, an error"
SUM = [{"role": "user", "content": "What is 47 + 38?"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "maximum": 99}, "b": {"type": "integer", "maximum": 99}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}


class Person(BaseModel):
    name: str
    age: int
    city: str


def check(url: str) -> str:
    """Raises when an answer is not what it must be."""
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    assert "tiny" in [model.id for model in client.models.list()]
    _chats(client)
    _tools(client)
    _structured(client)
    _responses(client)
    _embeddings(client)
    right = asyncio.run(_many(url))
    return f"all answers right; {right} of 20 concurrent async streams right"


def _chats(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=SUM, temperature=0, logprobs=True, top_logprobs=2, max_completion_tokens=30
    )
    assert answer.choices[0].message.content == "47 + 38 = 85"
    assert len(answer.choices[0].logprobs.content) >= answer.usage.completion_tokens - 1
    options = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(model="tiny", messages=SUM, temperature=0, stream=True, stream_options=options)
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "47 + 38 = 85"
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens
    prompts = ["The capital of", "The sun"]
    samples = client.completions.create(model="tiny", prompt=prompts, n=2, max_tokens=5, temperature=1)
    assert [choice.index for choice in samples.choices] == [0, 1, 2, 3]
    wrong = None
    try:
        client.chat.completions.create(model="tiny", messages=SUM, temperature=-1)
    except BadRequestError as error:
        wrong = error.param
    assert wrong == "temperature"


def _tools(client: OpenAI) -> None:
    named = {"type": "function", "function": {"name": "add"}}
    for choice in ("required", named):
        answer = client.chat.completions.create(
            model="tiny", messages=SUM, tools=[TOOL], tool_choice=choice, parallel_tool_calls=False, temperature=0
        )
        call = answer.choices[0].message.tool_calls[0].function
        assert call.name == "add"
        assert '"a"' in call.arguments
    with client.chat.completions.stream(
        model="tiny", messages=SUM, tools=[{**TOOL, "function": {**TOOL["function"], "strict": True}}],
        tool_choice=named, parallel_tool_calls=False, temperature=0,
    ) as stream:  # fmt: skip
        final = stream.get_final_completion()
    assert set(final.choices[0].message.tool_calls[0].function.parsed_arguments) == {"a", "b"}


def _structured(client: OpenAI) -> None:
    asked = [{"role": "user", "content": "Give me a JSON object with name Anna, age 31 and city Rome."}]
    answer = client.chat.completions.parse(model="tiny", messages=asked, response_format=Person, temperature=0)
    assert answer.choices[0].message.parsed == Person(name="Anna", age=31, city="Rome")
    parsed = client.responses.parse(model="tiny", input=asked, text_format=Person, temperature=0)
    assert parsed.output_parsed == Person(name="Anna", age=31, city="Rome")


def _responses(client: OpenAI) -> None:
    first = client.responses.create(model="tiny", input="My name is Anna.", temperature=0)
    second = client.responses.create(
        model="tiny", input="What is my name?", previous_response_id=first.id, temperature=0
    )
    assert "Anna" in second.output_text
    with client.responses.stream(model="tiny", input="What is 47 + 38?", temperature=0) as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().output_text == "47 + 38 = 85"
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"


def _embeddings(client: OpenAI) -> None:
    texts = ["The sun is hot.", "The sun is very hot.", "4 + 5 = 9"]
    vectors = [item.embedding for item in client.embeddings.create(model="tiny", input=texts).data]
    near, far = (sum(x * y for x, y in zip(vectors[0], other, strict=True)) for other in vectors[1:])
    assert -1.001 < far < near < 1.001, (near, far)
    cut = client.embeddings.create(model="tiny", input=[[5, 6, 7]], dimensions=16, encoding_format="float")
    assert len(cut.data[0].embedding) == 16
    assert cut.usage.prompt_tokens == 3


async def _many(url: str) -> int:
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:

        async def ask(a: int) -> bool:
            asked = [{"role": "user", "content": f"What is {a} + 38?"}]
            stream = await client.chat.completions.create(model="tiny", messages=asked, temperature=0, stream=True)
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            return text == f"{a} + 38 = {a + 38}"

        right = sum(await asyncio.gather(*(ask(a) for a in range(40, 60))))
    assert right >= 19
    return right
