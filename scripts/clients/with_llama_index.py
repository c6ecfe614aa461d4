"""LlamaIndex's OpenAILike."""

from __future__ import annotations

import asyncio

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

DISTRIBUTION = "llama-index-llms-openai-like"
RAN = "complete, stream_complete, chat, stream_chat, achat"
PROMPT = "<|bos|><|user|>What is 47 + 38?<|end|><|assistant|>"


def check(url: str) -> str:
    """Raises when an answer is not what it must be."""
    common = {"model": "tiny", "api_base": f"{url}/v1", "api_key": "none", "temperature": 0.0, "max_tokens": 30}
    plain = OpenAILike(**common, is_chat_model=False)
    assert plain.complete(PROMPT).text == "47 + 38 = 85"
    assert list(plain.stream_complete(PROMPT))[-1].text == "47 + 38 = 85"
    chat = OpenAILike(**common, is_chat_model=True)
    asked = [ChatMessage(role="user", content="What is 47 + 38?")]
    assert chat.chat(asked).message.content == "47 + 38 = 85"
    pieces = list(chat.stream_chat(asked))
    assert pieces[-1].message.content == "47 + 38 = 85"
    assert asyncio.run(chat.achat(asked)).message.content == "47 + 38 = 85"
    return f"all answers right; {len(pieces)} pieces streamed"
