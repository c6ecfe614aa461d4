"""The one error tree. Everything Manta raises on purpose is a MantaError.

Each class says whose fault it is and what a server answers: `http_status`, and `kind`, OpenAI's `error.type`.
"""

from __future__ import annotations

from typing import Any


class MantaError(Exception):
    """Base of every error Manta raises on purpose."""

    http_status = 500
    kind = "internal_server_error"

    def __reduce__(self) -> Any:
        # Keyword-only constructors and extra attributes survive pickling between Ray processes.
        return _rebuild, (type(self), self.args, self.__dict__.copy())


def _rebuild(cls: type[MantaError], args: tuple[Any, ...], state: dict[str, Any]) -> MantaError:
    error = cls.__new__(cls)
    Exception.__init__(error, *args)
    error.__dict__.update(state)
    return error


class ConfigError(MantaError, ValueError):
    """A configuration that cannot be served: names the key, what came and what is allowed."""

    def __init__(self, key: str, got: object, allowed: str) -> None:
        self.key, self.got, self.allowed = key, got, allowed
        shown = repr(got)
        super().__init__(f"{key}: {shown if len(shown) <= 200 else shown[:200] + '…'}: {allowed}")

    def under(self, prefix: str) -> ConfigError:
        """The same error with its key below `prefix` (a file name, a section)."""
        return ConfigError(f"{prefix}{self.key}", self.got, self.allowed)


class PackageConflict(MantaError, ImportError):
    """An installed package that cannot live beside Manta; the message names it and what to do."""


class ModelLoadError(MantaError):
    """A model folder that cannot be loaded: missing, left-over or mis-shaped weights, by name."""


class RequestError(MantaError, ValueError):
    """A request that cannot be run as asked. `param` is the field at fault, in the caller's terms."""

    http_status = 400
    kind = "invalid_request_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        self.param, self.code = param, code
        super().__init__(message)


class PromptTooLong(RequestError):
    """The prompt, or prompt plus max_tokens, can never fit under a limit that the message names."""

    def __init__(self, message: str, *, param: str | None = "prompt") -> None:
        super().__init__(message, param=param, code="context_length_exceeded")


class ModelNotFound(RequestError):
    """A model name this server does not serve."""

    http_status = 404
    kind = "not_found_error"


class EngineOverloaded(MantaError):
    """The bounded queue is full; `retry_after_s` is when to come back."""

    http_status = 429
    kind = "rate_limit_error"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class EngineUnavailable(MantaError):
    """No engine can take the request now (starting, recovering or stopped)."""

    http_status = 503
    kind = "service_unavailable_error"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class ResourcesMissing(EngineUnavailable):
    """The engine cannot come back before the cluster has what it needs: a node or a GPU is gone."""


class DeadlineExceeded(MantaError):
    """A request that was not finished in the time it had; what it had drawn is dropped."""

    http_status = 504
    kind = "timeout_error"


class RequestFailed(MantaError):
    """An accepted request that could not be finished; the message says why."""


class ExecutorDied(MantaError):
    """A rank died, hung or raised in a step; `ranks` names the ones known to be at fault."""

    def __init__(self, message: str, *, ranks: tuple[int, ...] = ()) -> None:
        self.ranks = ranks
        super().__init__(message)
