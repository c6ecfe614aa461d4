"""Caller: who asks, and how long they will wait. ApiKeys: who may."""

from __future__ import annotations

import hashlib
import hmac
import math
import os
from dataclasses import dataclass
from pathlib import Path

from engine.errors import ConfigError, RequestError

KEYS_VARIABLE = "MANTA_API_KEYS"
MAX_TENANT_CHARS = 128


@dataclass
class Caller:
    """One call's tenant and deadline, as far as they are known: the body may still tell."""

    tenant: str = ""
    timeout_s: float | None = None
    trusted: bool = False
    """The tenant is the holder of an API key, whatever the call says of itself."""

    def name(self, tenant: str | None) -> None:
        """Take a tenant that the call names, unless its key has named one."""
        if tenant and not self.trusted:
            self.tenant = tenant[:MAX_TENANT_CHARS]

    def wait(self, value: object, field: str) -> None:
        """Take the seconds that the call may last. Raises RequestError naming the field."""
        try:
            seconds = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            seconds = math.nan
        if not 0 < seconds < math.inf:
            raise RequestError(f"{field}: got {value!r:.100}, allowed: seconds, above 0", param=field)
        self.timeout_s = seconds


class ApiKeys:
    """Named keys. None at all: everybody may."""

    def __init__(self, keys: dict[str, str]) -> None:
        """keys: name to key."""
        self._digests = [(name, _digest(key)) for name, key in keys.items()]

    def __len__(self) -> int:
        return len(self._digests)

    @classmethod
    def load(cls, path: str | None) -> ApiKeys:
        """Keys of the file at `path`, one a line, and of the variable MANTA_API_KEYS, between commas.

        Each is NAME=KEY or a key alone; lines that begin with # are passed over. Raises ConfigError.
        """
        entries: list[str] = []
        if path is not None:
            try:
                entries += Path(path).expanduser().read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError("api_keys_file", path, f"a readable text file: {error}") from None
        entries += os.environ.get(KEYS_VARIABLE, "").split(",")
        keys: dict[str, str] = {}
        for entry in map(str.strip, entries):
            if not entry or entry.startswith("#"):
                continue
            name, _, key = entry.rpartition("=") if not entry.endswith("=") else ("", "", entry)
            name, key = name.strip(), key.strip()
            keys[name or f"key-{_digest(key).hex()[:8]}"] = key
        if path is not None and not keys:
            raise ConfigError("api_keys_file", path, "a file with at least one key")
        return cls(keys)

    def holder(self, given: str) -> str | None:
        """Whose key this is. Takes the same time for every key, right or wrong."""
        digest, found = _digest(given), None
        for name, right in self._digests:
            if hmac.compare_digest(digest, right):
                found = name
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
