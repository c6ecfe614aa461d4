"""EngineLink: the engine that a service's requests go to, or why there is none."""

from __future__ import annotations

from typing import Any, Protocol

from cluster.messages import DriverHealth
from cluster.recovery import RETRY_AFTER_S
from engine.errors import EngineUnavailable, ResourcesMissing
from engine.request import Request


class EngineClient(Protocol):
    """What the service needs of an engine that runs somewhere else. Outputs arrive at `ModelService.deliver`."""

    def submit(self, request: Request) -> None:
        """Hand a request over. A refusal comes as outputs with finish_reason "error". Raises EngineUnavailable."""
        ...

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End a request, or one sample of it, and free its blocks. No effect when it is unknown."""
        ...

    async def stats(self) -> dict[str, Any]:
        """The engine's counters and gauges now, by name. Raises EngineUnavailable."""
        ...

    async def picture(self) -> dict[str, Any]:
        """What every block and request is doing; see engine.picture. Raises EngineUnavailable."""
        ...

    async def health(self) -> DriverHealth:
        """What the engine knows of itself. Raises EngineUnavailable when it does not answer."""
        ...


class EngineLink:
    """The engine there is now, shared by all who see the service."""

    def __init__(self) -> None:
        self._client: EngineClient | None = None
        self._failure = ""
        """Why there is no engine, when none could be brought back."""
        self.missing = ""
        """What the cluster must get before there can be one."""

    def attach(self, client: EngineClient) -> None:
        """There is an engine from now on."""
        self._client, self._failure, self.missing = client, "", ""

    def detach(self, failure: str = "") -> None:
        """There is none from now on; `failure`: and none could be brought back."""
        self._client, self._failure = None, failure or self._failure

    def engine(self) -> EngineClient:
        """The engine. Raises EngineUnavailable, or ResourcesMissing when the cluster lacks something for it."""
        if self.missing:
            raise ResourcesMissing(self.missing, retry_after_s=RETRY_AFTER_S)
        if self._client is None:
            raise EngineUnavailable(self._failure or "the engine is not running; it is being started again")
        return self._client

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End a request, or one sample of it, if there is an engine to compute it."""
        if self._client is not None:
            self._client.abort(request_id, index)

    async def health(self) -> DriverHealth:
        """What the engine knows of itself; "failed" when it does not answer or could not be brought back."""
        client = self._client
        if client is None:
            return DriverHealth(
                "failed" if self._failure else "recovering",
                self._failure or "the engine is started again",
                waiting_for=self.missing,
            )
        try:
            return await client.health()
        except EngineUnavailable as error:
            if self._client is not client:  # it was lost while it was asked, and that is known by now
                return await self.health()
            return DriverHealth("failed", str(error))
