"""ResponseStore: earlier answers of the Responses API and their conversations, to go on from and to look up."""

from __future__ import annotations

from collections import OrderedDict

import msgspec

from deployments.http.responses_items import Item
from engine.errors import RequestError

MAX_KEPT = 1000
MAX_KEPT_BYTES = 64 << 20
_json = msgspec.json.Encoder()


class ResponseNotFound(RequestError):
    """A response id that this replica does not hold."""

    http_status = 404
    kind = "not_found_error"


class ResponseStore:
    """Earlier responses and their conversations, in this process; the oldest go when there are too many."""

    def __init__(self, max_kept: int = MAX_KEPT, max_bytes: int = MAX_KEPT_BYTES) -> None:
        self._max_kept, self._max_bytes = max_kept, max_bytes
        self._kept: OrderedDict[tuple[str, str], tuple[Item, list[Item], int]] = OrderedDict()
        """By whose it is, and its id."""
        self._bytes = 0

    def put(self, response: Item, messages: list[Item], owner: str = "") -> None:
        """Keep a response and the conversation it ends, for its owner only."""
        size, key = len(_json.encode([response, messages])), (owner, response["id"])
        if key in self._kept:
            self.delete(response["id"], owner)
        self._kept[key] = (response, messages, size)
        self._bytes += size
        while self._kept and (len(self._kept) > self._max_kept or self._bytes > self._max_bytes):
            self._bytes -= self._kept.popitem(last=False)[1][2]

    def get(self, response_id: str, owner: str = "") -> tuple[Item, list[Item]]:
        """The owner's response of that id, and its conversation. Raises ResponseNotFound."""
        key = (owner, response_id)
        if key not in self._kept:
            raise ResponseNotFound(f"response {response_id!r:.100} is not kept here (any more)", param="response_id")
        self._kept.move_to_end(key)
        response, messages, _ = self._kept[key]
        return response, messages

    def delete(self, response_id: str, owner: str = "") -> None:
        """Forget a response. Raises ResponseNotFound."""
        self.get(response_id, owner)
        self._bytes -= self._kept.pop((owner, response_id))[2]

    def __len__(self) -> int:
        return len(self._kept)
