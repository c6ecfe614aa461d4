"""Limits: what an engine can run at all, and how long it lets a sample get."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from engine.config import EngineConfig
from engine.errors import PromptTooLong, RequestError
from engine.request import Request
from engine.step import unpack


class Limits:
    """The limits that a configuration, a vocabulary and a cache set together. `config` is resolved."""

    def __init__(self, config: EngineConfig, vocab_size: int, num_blocks: int, block_size: int) -> None:
        self._config, self._vocab_size = config, vocab_size
        self._num_blocks, self._block_size = num_blocks, block_size

    def check(self, request: Request) -> None:
        """Raise PromptTooLong, naming the limit, for what can never fit, and RequestError for what cannot be run."""
        params, count = request.params, request.num_prompt_tokens
        if not count:
            raise RequestError("prompt: it has no tokens, at least one is needed", param="prompt")
        self._check_tokens("prompt", unpack(request.prompt))
        if len(request.resume) > params.num_sequences:
            message = f"resume: {len(request.resume)} samples, the request has {params.num_sequences}"
            raise RequestError(message, param="resume")
        for tokens in request.resume:
            self._check_tokens("resume", unpack(tokens))
        for field in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            if ids := getattr(params, field):
                self._check_tokens(field, np.array(list(ids), np.int64))
        self._check_length(count, embeds=request.pooling is not None)

    def length(self, request: Request) -> int:
        """Prompt and output tokens at which its samples end: max_tokens, the context, the cache.

        The last token needs no slot in the cache: it is drawn, but not computed.
        """
        slots = self._num_blocks * self._block_size
        if request.pooling is not None:
            return min(request.num_prompt_tokens, slots) + 1
        limit = min(self._config.model_len, slots + 1)
        asked = request.params.max_tokens
        return limit if asked is None else min(limit, request.num_prompt_tokens + asked)

    def _check_length(self, count: int, *, embeds: bool) -> None:
        config, slots = self._config, self._num_blocks * self._block_size
        room = config.model_len if embeds else config.model_len - 1
        if count > room:
            what = f"max_model_len ({config.model_len}) leaves room for {room}"
        elif count > slots:
            what = f"the KV cache ({self._num_blocks} blocks of {self._block_size}) holds {slots}"
        elif count > config.max_num_batched_tokens and not config.enable_chunked_prefill:
            most = config.max_num_batched_tokens
            what = f"max_num_batched_tokens ({most}) limits a step, and enable_chunked_prefill is off"
        else:
            return
        raise PromptTooLong(f"prompt: {count} tokens are too many: {what}")

    def _check_tokens(self, field: str, ids: npt.NDArray[Any]) -> None:
        wrong = ids[(ids < 0) | (ids >= self._vocab_size)]
        if wrong.size:
            message = f"{field}: token id {int(wrong[0])} is outside the vocabulary, 0 to {self._vocab_size - 1}"
            raise RequestError(message, param=field)
