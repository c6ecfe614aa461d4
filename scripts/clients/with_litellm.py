"""LiteLLM, as OpenAI's, vLLM's and Anthropic's server."""

from __future__ import annotations

import asyncio
import os

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks GitHub for its price list
import litellm

DISTRIBUTION = "litellm"
RAN = (
    "completion whole, streamed and async, by its openai, hosted_vllm, text-completion-openai and anthropic providers; "
    "embedding"
)
PROMPT = "<|bos|><|user|>What is 47 + 38?<|end|><|assistant|>"
SUM = [{"role": "user", "content": "What is 47 + 38?"}]


def check(url: str) -> str:
    """Raises when an answer is not what it must be."""
    at = {"api_key": "none", "temperature": 0, "max_tokens": 30}
    bases = {"openai": f"{url}/v1", "hosted_vllm": f"{url}/v1", "anthropic": url}
    for provider, base in bases.items():
        to = {"model": f"{provider}/tiny", "api_base": base, "messages": SUM, **at}
        assert litellm.completion(**to).choices[0].message.content == "47 + 38 = 85", provider
        pieces = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(**to, stream=True)]
        assert "".join(pieces) == "47 + 38 = 85", provider
        answer = asyncio.run(litellm.acompletion(**to))
        assert answer.choices[0].message.content == "47 + 38 = 85", provider
    text = litellm.text_completion(model="text-completion-openai/tiny", api_base=f"{url}/v1", prompt=PROMPT, **at)
    assert text.choices[0].text == "47 + 38 = 85"
    vectors = litellm.embedding(model="hosted_vllm/tiny", api_base=f"{url}/v1", api_key="none", input=["one", "two"])
    assert len(vectors.data) == 2
    return "all answers right, by each of the four"
