"""LangChain's ChatOpenAI and OpenAIEmbeddings."""

from __future__ import annotations

import asyncio

from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field

DISTRIBUTION = "langchain-openai"
RAN = "invoke, stream, abatch, with_structured_output, bind_tools with tool_choice, the Responses API, embeddings"


class Person(BaseModel):
    """A person."""

    name: str
    age: int
    city: str


class Add(BaseModel):
    """Adds two numbers."""

    a: int = Field(le=99)
    b: int = Field(le=99)


def check(url: str) -> str:
    """Raises when an answer is not what it must be."""
    model = ChatOpenAI(base_url=f"{url}/v1", api_key="none", model="tiny", temperature=0)
    answer = model.invoke("What is 47 + 38?")
    assert answer.content == "47 + 38 = 85"
    assert answer.usage_metadata["output_tokens"] > 0
    pieces = [piece.content for piece in model.stream("What is 47 + 38?")]
    assert "".join(pieces) == "47 + 38 = 85"
    batch = asyncio.run(model.abatch([f"What is {a} + 38?" for a in range(40, 48)]))
    right = sum(m.content == f"{a} + 38 = {a + 38}" for a, m in zip(range(40, 48), batch, strict=True))
    assert right == 8
    asked = "Give me a JSON object with name Anna, age 31 and city Rome."
    for method in ("json_schema", "function_calling"):
        found = model.with_structured_output(Person, method=method).invoke(asked)
        assert isinstance(found, Person)
        assert method != "json_schema" or found == Person(name="Anna", age=31, city="Rome")
    calls = model.bind_tools([Add], tool_choice="Add").invoke("What is 47 + 38?").tool_calls
    assert calls[0]["name"] == "Add"
    assert {"a", "b"} <= set(calls[0]["args"])
    responses = ChatOpenAI(
        base_url=f"{url}/v1", api_key="none", model="tiny", temperature=0, use_responses_api=True
    ).invoke("What is 47 + 38?")
    assert responses.text == "47 + 38 = 85"
    embeddings = OpenAIEmbeddings(
        base_url=f"{url}/v1", api_key="none", model="tiny", check_embedding_ctx_length=False
    )  # else it counts tokens with OpenAI's own tokenizer
    vectors = embeddings.embed_documents(["one", "two"])
    assert len(vectors) == 2
    assert len(vectors[0]) == len(embeddings.embed_query("one"))
    return f"all answers right; {right} of 8 in a batch; {len(pieces)} pieces streamed"
