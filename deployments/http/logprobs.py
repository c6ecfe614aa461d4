"""Log-probabilities in OpenAI's two shapes."""

from __future__ import annotations

from collections.abc import Sequence

from deployments.http.openai_replies import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob
from engine.output import Logprob
from engine.tokenizer import Tokenizer

Entries = Sequence[dict[int, Logprob] | None]
"""One dict a token: the token itself first, then the most likely ones. None: a prompt's first token."""


def chat_logprobs(entries: Entries, top: int, tokenizer: Tokenizer) -> ChatLogprobs:
    """Entries as a chat's `logprobs`, each with its `top` most likely tokens."""
    content = []
    for entry in entries:
        assert entry is not None
        token_id, drawn = next(iter(entry.items()))
        best = [TopLogprob(*_named(i, p, tokenizer)) for i, p in _best(entry, top)]
        content.append(TokenLogprob(*_named(token_id, drawn, tokenizer), best))
    return ChatLogprobs(content)


def completion_logprobs(
    entries: Entries, token_ids: Sequence[int], top: int, tokenizer: Tokenizer, *, offset: int
) -> CompletionLogprobs:
    """Entries as a completion's `logprobs`; `offset` is where the first token begins in the text, in characters."""
    out = CompletionLogprobs()
    for token_id, entry in zip(token_ids, entries):
        token = tokenizer.token_text(token_id)
        out.tokens.append(token)
        out.text_offset.append(offset)
        offset += len(token)
        if entry is None:
            out.token_logprobs.append(None)
            out.top_logprobs.append(None)
            continue
        out.token_logprobs.append(entry[token_id].logprob)
        best = {tokenizer.token_text(i): p.logprob for i, p in _best(entry, top)}
        out.top_logprobs.append(best if top else None)
    return out


def _best(entry: dict[int, Logprob], top: int) -> list[tuple[int, Logprob]]:
    """The `top` most likely tokens of an entry, best first; the drawn token only if it is one of them."""
    ranked = [(i, p) for i, p in entry.items() if p.rank is not None and p.rank <= top]
    return sorted(ranked, key=lambda pair: pair[1].rank or 0)


def _named(token_id: int, entry: Logprob, tokenizer: Tokenizer) -> tuple[str, float, list[int]]:
    spelled = tokenizer.token_bytes(token_id)
    return spelled.decode("utf-8", "replace"), max(entry.logprob, -9999.0), list(spelled)
