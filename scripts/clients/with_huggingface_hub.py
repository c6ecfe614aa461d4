"""huggingface_hub's InferenceClient: TGI's routes and OpenAI's."""

from __future__ import annotations

from huggingface_hub import InferenceClient

DISTRIBUTION = "huggingface_hub"
RAN = "text_generation and chat_completion, each whole and streamed"
PROMPT = "<|bos|><|user|>What is 47 + 38?<|end|><|assistant|>"
SUM = [{"role": "user", "content": "What is 47 + 38?"}]


def check(url: str) -> str:
    """Raises when an answer is not what it must be."""
    client = InferenceClient(url)
    assert client.text_generation(PROMPT, max_new_tokens=20) == "47 + 38 = 85"
    detailed = client.text_generation(PROMPT, max_new_tokens=20, details=True)
    assert detailed.details.generated_tokens == len(detailed.details.tokens)
    events = list(client.text_generation(PROMPT, max_new_tokens=20, stream=True, details=True))
    assert events[-1].generated_text == "47 + 38 = 85"
    answer = client.chat_completion(SUM, max_tokens=20, temperature=0)
    assert answer.choices[0].message.content == "47 + 38 = 85"
    chunks = list(client.chat_completion(SUM, max_tokens=20, temperature=0, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "47 + 38 = 85"
    schema = {"type": "object", "properties": {"answer": {"type": "integer", "maximum": 99}}, "required": ["answer"]}
    form = {"type": "json_schema", "json_schema": {"name": "sum", "schema": schema}}
    brief = [{"role": "system", "content": "Answer in JSON."}, *SUM]
    answer = client.chat_completion(brief, max_tokens=30, temperature=0, response_format=form)
    assert answer.choices[0].message.content == '{"answer": 85}'
    return f"all answers right; {len(events)} and {len(chunks)} events"
