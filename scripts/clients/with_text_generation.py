"""Text Generation Inference's own client."""

from __future__ import annotations

import asyncio

from text_generation import AsyncClient, Client

DISTRIBUTION = "text-generation"
RAN = "generate, generate_stream, best_of, details, watermark, async"
PROMPT = "<|bos|><|user|>What is 47 + 38?<|end|><|assistant|>"


def check(url: str) -> str:
    """Raises when an answer is not what it must be."""
    client = Client(url)
    joke = client.generate("Funniest joke ever:", max_new_tokens=17, temperature=0.95)
    assert 0 < joke.details.generated_tokens <= 17
    whole = client.generate(PROMPT, max_new_tokens=20, decoder_input_details=True)
    assert whole.generated_text == "47 + 38 = 85"
    assert len(whole.details.prefill) > 5
    events = list(client.generate_stream(PROMPT, max_new_tokens=20))
    assert events[-1].generated_text == "47 + 38 = 85"
    assert len(events) == whole.details.generated_tokens
    best = client.generate("Tell me", max_new_tokens=6, do_sample=True, best_of=3)
    assert len(best.details.best_of_sequences) == 2
    marked = client.generate("Tell me", max_new_tokens=6, do_sample=True, watermark=True)
    assert 0 < marked.details.generated_tokens <= 6

    async def ask() -> str:
        return (await AsyncClient(url).generate(PROMPT, max_new_tokens=20)).generated_text

    async def many() -> list[str]:
        return list(await asyncio.gather(*(ask() for _ in range(8))))

    assert asyncio.run(many()) == ["47 + 38 = 85"] * 8
    return f"{len(events)} events, one a token; 8 of 8 concurrent answers right"
