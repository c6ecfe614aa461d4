"""The shapes in which prompts are given: text, token ids, or a dict of either; one or many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.errors import RequestError

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, or {"prompt": text} or {"prompt_token_ids": ids}, with "cache_salt" if wanted."""

_ALLOWED = "a string, a list of token ids, or a dict with 'prompt' or 'prompt_token_ids'"


def prompt_list(
    prompts: Prompt | Sequence[Prompt] | None,
    prompt_token_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
) -> list[Prompt]:
    """One prompt or many, given either way, as a list. Raises RequestError when none or both are given."""
    if prompt_token_ids is not None:
        many = prompt_list(prompt_token_ids)
        if prompts is None:
            return many
        texts = prompt_list(prompts)
        if len(texts) != len(many):
            raise RequestError(
                f"prompt_token_ids: {len(many)} given for {len(texts)} prompts; one for each", param="prompt_token_ids"
            )
        return [{"prompt": text, "prompt_token_ids": ids} for text, ids in zip(texts, many)]
    if prompts is None:
        raise RequestError("prompts: give prompts or prompt_token_ids", param="prompts")
    if isinstance(prompts, str | Mapping):
        return [prompts]
    prompts = _as_list(prompts, "prompts")
    if prompts and isinstance(prompts[0], int):
        return [prompts]
    return prompts


def split_prompt(prompt: Prompt) -> tuple[str | None, list[int] | None, str]:
    """(text, token ids, cache salt) of one prompt; text or ids may be None, not both. Raises RequestError."""
    if isinstance(prompt, str):
        return prompt, None, ""
    if not isinstance(prompt, Mapping):
        return None, _as_list(prompt, "prompts"), ""
    text, ids, salt = prompt.get("prompt"), prompt.get("prompt_token_ids"), prompt.get("cache_salt")
    if (text is None and ids is None) or not isinstance(text, str | None) or not isinstance(salt, str | None):
        raise RequestError(f"prompts: got {dict(prompt)!r:.200}, allowed: {_ALLOWED}", param="prompts")
    return text, None if ids is None else _as_list(ids, "prompt_token_ids"), salt or ""


def _as_list(value: Any, field: str) -> list[Any]:
    """A list, a tuple, or what numpy and torch call an array."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise RequestError(f"{field}: got {value!r:.200}, allowed: {_ALLOWED}", param=field)
    return list(value)
