"""HeldRequest: what an engine's loop keeps of a request it has accepted."""

from __future__ import annotations

from typing import Any

import msgspec

from engine.request import Request
from engine.step import pack, unpack


class HeldRequest(msgspec.Struct):
    """Who waits for a request, for which of its samples, and what they have had."""

    client: Any
    request: Request
    unfinished: set[int]
    tokens: list[list[int]]
    """Output tokens of every sample."""
    searched: int = 0
    """Tokens that its beam search had got to when the ranks failed last."""

    @classmethod
    def of(cls, client: Any, request: Request) -> HeldRequest:
        """A request just accepted from `client`; what it resumes, it has had."""
        indices = range(request.params.num_sequences)
        tokens = [unpack(request.resume[i]).tolist() if i < len(request.resume) else [] for i in indices]
        return cls(client, request, set(indices), tokens)

    def resumed(self) -> Request:
        """The request as it stands now."""
        return msgspec.structs.replace(self.request, resume=tuple(map(pack, self.tokens)))
