"""EngineLink: what is said while there is an engine, while another is started, and when none comes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cluster.messages import DriverHealth
from deployments.engine_link import EngineLink
from engine.errors import EngineUnavailable, ResourcesMissing
from engine.request import Request


class Client:
    """An engine that notes what it is asked."""

    def __init__(self, *, silent: bool = False) -> None:
        self.silent, self.aborted = silent, list[tuple[str, int | None]]()

    def submit(self, request: Request) -> None:
        """Not asked here."""

    def abort(self, request_id: str, index: int | None = None) -> None:
        self.aborted.append((request_id, index))

    async def stats(self) -> dict[str, Any]:
        return {}

    async def picture(self) -> dict[str, Any]:
        return {}

    async def health(self) -> DriverHealth:
        if self.silent:
            raise EngineUnavailable("no answer")
        return DriverHealth("ready")


def state(link: EngineLink) -> tuple[str, str, str]:
    health = asyncio.run(link.health())
    return health.state, health.reason, health.waiting_for


def test_an_engine_comes_goes_and_is_given_up() -> None:
    link, client = EngineLink(), Client()
    assert state(link) == ("recovering", "the engine is started again", "")
    link.abort("nobody")  # there is none that would compute it
    link.attach(client)
    assert link.engine() is client and state(link)[0] == "ready"
    link.abort("r", 1)
    assert client.aborted == [("r", 1)]
    link.detach()
    with pytest.raises(EngineUnavailable, match="being started again"):
        link.engine()
    link.detach("it burns")
    link.detach()  # a late word of the same loss does not hide the reason
    with pytest.raises(EngineUnavailable, match="it burns"):
        link.engine()
    assert state(link) == ("failed", "it burns", "")
    link.attach(client)
    assert state(link)[0] == "ready"


def test_what_the_cluster_lacks_is_told() -> None:
    link = EngineLink()
    link.missing = "1 GPU"
    with pytest.raises(ResourcesMissing, match="1 GPU") as caught:
        link.engine()
    assert caught.value.retry_after_s > 0
    assert state(link)[::2] == ("recovering", "1 GPU")


def test_an_engine_that_does_not_answer_has_failed() -> None:
    link = EngineLink()
    link.attach(Client(silent=True))
    assert state(link) == ("failed", "no answer", "")


@pytest.mark.parametrize("reason", ["", "it burns"])
def test_an_engine_that_is_lost_while_it_is_asked(reason: str) -> None:
    """What is true by then is said: another is started, or none can be."""
    link = EngineLink()

    class Dying(Client):
        async def health(self) -> DriverHealth:
            link.detach(reason)
            raise EngineUnavailable("the driver is gone")

    link.attach(Dying())
    assert state(link) == (("failed", reason, "") if reason else ("recovering", "the engine is started again", ""))


def test_an_engine_that_is_replaced_while_it_is_asked() -> None:
    link = EngineLink()

    class Replaced(Client):
        async def health(self) -> DriverHealth:
            link.attach(Client())
            raise EngineUnavailable("closed")

    link.attach(Replaced())
    assert state(link)[0] == "ready"
