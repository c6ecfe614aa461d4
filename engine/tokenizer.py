"""Tokenizer: text to token ids and back, chat templates, and what a model's folder says about sampling."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from engine import chat_template as chat
from engine.config import EngineConfig
from engine.detokenizer import IncrementalDetokenizer
from engine.errors import ConfigError, RequestError
from engine.imports import transformers
from engine.sampling_params import SamplingParams
from engine.spelling import Spelling, find_spelling

__all__ = ["IncrementalDetokenizer", "Tokenizer", "default_sampling", "prepare_params", "prepare_prompt"]


class Tokenizer:
    """A Hugging Face tokenizer with the few operations the engine needs. Safe to share between threads."""

    def __init__(self, hf: Any, chat_template: str | None = None) -> None:
        """Wrap a transformers tokenizer; `chat_template` (the text) replaces its own."""
        self.hf = hf
        self.chat_template: str | None = chat_template
        self._backend = getattr(hf, "backend_tokenizer", None)

    @classmethod
    def load(cls, config: EngineConfig) -> Tokenizer:
        """The tokenizer of config.tokenizer (None: the model's). Raises ConfigError or PackageConflict."""
        key = "tokenizer" if config.tokenizer is not None else "model"
        name = config.tokenizer or config.model
        template = chat.read_template(config.chat_template) if config.chat_template is not None else None
        try:
            hf = transformers().AutoTokenizer.from_pretrained(
                name, revision=config.revision, trust_remote_code=config.trust_remote_code
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(key, name, f"no tokenizer could be loaded from it: {reason:.500}") from error
        if template is not None:
            chat.check_template(hf, template, str(config.chat_template)[:100])
        tokenizer = cls(hf, template)
        tokenizer.decode(tokenizer.encode("ready"))  # what is made on first use is made now, on one thread
        tokenizer.token_bytes(0)
        return tokenizer

    # Vocabulary

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id it knows; a model's may be larger."""
        return max(self.hf.get_vocab().values(), default=-1) + 1

    @property
    def template_text(self) -> str | None:
        """The chat template in use; of several the default one."""
        template = self.chat_template if self.chat_template is not None else self.hf.chat_template
        return template.get("default") if isinstance(template, dict) else template

    @property
    def eos_token_id(self) -> int | None:
        return _optional_id(self.hf.eos_token_id)

    @property
    def bos_token_id(self) -> int | None:
        return _optional_id(self.hf.bos_token_id)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that `skip_special_tokens` leaves out of texts."""
        ids = set(self.hf.all_special_ids)
        added = getattr(self.hf, "added_tokens_decoder", {})
        return frozenset(ids | {i for i, token in added.items() if getattr(token, "special", False)})

    @cached_property
    def spelling(self) -> Spelling | None:
        """How tokens spell bytes; None when a token's text depends on its neighbours in other ways."""
        if self._backend is None or self._backend.decoder is None:
            return None
        return find_spelling(json.loads(self._backend.decoder.__getstate__()))

    @cached_property
    def byte_table(self) -> list[bytes]:
        """The bytes of every token id, with a `spelling`. Specials stand for their own text."""
        assert self.spelling is not None
        table = [b""] * self.vocab_size
        for token, token_id in self.hf.get_vocab().items():
            table[token_id] = self.spelling.bytes_of(token)
        return table

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token alone; a piece of a character for some. Empty for an id outside the vocabulary."""
        if not 0 <= token_id < self.vocab_size:
            return b""
        if self.spelling is not None:
            return self.byte_table[token_id]
        token: str | None = self.hf.convert_ids_to_tokens(token_id)
        if token is not None and "▁" in token:  # sentencepiece's mark of a space, which decoding alone would strip
            return token.replace("▁", " ").encode()
        return self.decode_raw([token_id]).encode()

    def token_text(self, token_id: int) -> str:
        """The text of one token alone, U+FFFD for a piece of a character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    # Text to ids and back

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. A begin-of-sequence token that the text already spells is not added again."""
        ids: list[int] = self.hf.encode(text, add_special_tokens=add_special_tokens, verbose=False)
        bos = self.bos_token_id
        if add_special_tokens and bos is not None and ids[:2] == [bos, bos] and text.startswith(self.hf.bos_token):
            del ids[0]
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`; nothing is tidied up."""
        if skip_special_tokens:
            token_ids = [i for i in token_ids if i not in self.special_ids]
        return self.decode_raw(token_ids)

    def decode_raw(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids`, specials included."""
        if self._backend is not None:
            text: str = self._backend.decode(token_ids, skip_special_tokens=False)
            return text
        text = self.hf.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    # Chats

    def render_chat(
        self,
        messages: chat.Messages,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        **variables: Any,
    ) -> str:
        """The prompt text of a chat. `chat_template` replaces the configured one; `variables` reach the template.

        Raises RequestError naming the message, or the template's line, at fault.
        """
        return chat.render(
            self.hf,
            messages,
            chat_template=chat_template if chat_template is not None else self.chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            documents=documents,
            variables=variables,
        )

    def apply_chat_template(self, messages: chat.Messages, **arguments: Any) -> list[int]:
        """Token ids of a chat's prompt; arguments are those of `render_chat`. Specials come from the template alone."""
        return self.encode(self.render_chat(messages, **arguments), add_special_tokens=False)


def prepare_params(params: SamplingParams, tokenizer: Tokenizer | None, vocab_size: int) -> SamplingParams:
    """`params` ready for the engine: bad_words as token ids, every token id checked against the model's vocabulary.

    Raises RequestError naming the field, what came and the allowed range.
    """
    for field in ("logit_bias", "allowed_token_ids", "stop_token_ids"):
        _check_ids(field, getattr(params, field) or (), vocab_size)
    if tokenizer is None and (params.stop or params.bad_words):
        field = "stop" if params.stop else "bad_words"
        raise RequestError(f"{field}: this engine has no tokenizer", param=field)
    if not params.bad_words or tokenizer is None:
        return params
    sequences = dict.fromkeys(params.bad_words_token_ids)
    for word in params.bad_words:
        # A word reads differently inside a line (with its space) and at the beginning of one.
        for text in (word, " " + word.lstrip()):
            sequences[tuple(tokenizer.encode(text, add_special_tokens=False))] = None
    sequences.pop((), None)
    return params.replace(bad_words_token_ids=tuple(sequences))


def prepare_prompt(
    prompt: str | Sequence[int], params: SamplingParams, tokenizer: Tokenizer | None, vocab_size: int
) -> list[int]:
    """The prompt's token ids: encoded when it is text, checked, and cut to its last `truncate_prompt_tokens`.

    Raises RequestError (param "prompt") for an empty prompt or an id outside the model's vocabulary.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise RequestError("prompt: this engine has no tokenizer; give token ids", param="prompt")
        ids = tokenizer.encode(prompt)
    else:
        ids = list(prompt)
        if others := [i for i in ids if type(i) is not int]:
            raise RequestError(f"prompt: got {others[0]!r:.100} among token ids, allowed: integers", param="prompt")
        _check_ids("prompt", ids, vocab_size)
    if not ids:
        raise RequestError("prompt: empty; at least one token is needed", param="prompt")
    return ids[-params.truncate_prompt_tokens :] if params.truncate_prompt_tokens is not None else ids


def _check_ids(field: str, ids: Iterable[int], vocab_size: int) -> None:
    for token_id in ids:
        if not 0 <= token_id < vocab_size:
            raise RequestError(
                f"{field}: token id {token_id} is outside the vocabulary, allowed: 0 to {vocab_size - 1}", param=field
            )


_DEFAULTS = {  # generation_config.json → SamplingParams
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def default_sampling(config: EngineConfig) -> dict[str, Any]:
    """The SamplingParams fields that the model's generation_config.json sets, for requests that leave them out.

    `do_sample: false` is temperature 0. Empty without such a file. Raises ConfigError (key model) for a broken one.
    """
    path = _model_file(config, "generation_config.json")
    if path is None:
        return {}
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
        found = {ours: given[theirs] for theirs, ours in _DEFAULTS.items() if given.get(theirs) is not None}
        if given.get("do_sample") is False:
            found["temperature"] = 0.0
        SamplingParams(**found)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError("model", str(path), f"not a usable generation_config.json: {error}") from None
    return found


def _model_file(config: EngineConfig, name: str) -> Path | None:
    folder = Path(config.model)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    cached = transformers().utils.cached_file(
        config.model,
        name,
        revision=config.revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return Path(cached) if cached else None


def _optional_id(value: Any) -> int | None:
    return value if isinstance(value, int) else None
