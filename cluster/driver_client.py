"""DriverClient: a Serve replica's end of its driver's socket, on the replica's event loop."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from typing import Any, Literal

import msgspec

from cluster.framing import READ_BYTES, FrameBuffer, FrameError, Ticket, frame, prepare
from cluster.messages import (
    Abort,
    Ask,
    DriverFacts,
    DriverHealth,
    Outputs,
    Submit,
    ToClient,
    ToDriver,
    Welcome,
    decode_for_client,
    encode,
)
from engine.errors import EngineUnavailable
from engine.request import Request, SequenceOutput

logger = logging.getLogger(__name__)

MAX_UNSENT_BYTES = 256 << 20


class DriverClient:
    """Sends requests to a driver and hands back their outputs, one list a step.

    All methods belong to the event loop that `connect` ran on. When the driver or the socket ends, `on_disconnect` is
    called once with the reason, and every request not finished by then has to be submitted elsewhere.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        on_outputs: Callable[[list[SequenceOutput]], None],
        on_disconnect: Callable[[str], None] | None,
    ) -> None:
        """Use `connect`."""
        self.facts: DriverFacts | None = None
        self._reader, self._writer = reader, writer
        self._on_outputs, self._on_disconnect = on_outputs, on_disconnect
        self._numbers = itertools.count()
        self._asked: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._welcome: asyncio.Future[DriverFacts] = asyncio.get_running_loop().create_future()
        self._ended: str | None = None
        self._task = asyncio.create_task(self._read())

    @classmethod
    async def connect(
        cls,
        driver: Any,
        *,
        on_outputs: Callable[[list[SequenceOutput]], None],
        on_disconnect: Callable[[str], None] | None = None,
        timeout_s: float = 30.0,
    ) -> DriverClient:
        """Connect to a driver: the actor handle that `start_driver` gave, or a Ticket.

        `on_outputs` gets one list for every step that brought something; it runs on the event loop and must be quick.
        Raises EngineUnavailable when the driver cannot be reached in time.
        """
        try:
            async with asyncio.timeout(timeout_s):
                ticket = driver if isinstance(driver, Ticket) else await _ticket_of(driver)
                reader, writer = await _open(ticket)
                client = cls(reader, writer, on_outputs, on_disconnect)
                await client._welcome
                return client
        except EngineUnavailable:
            raise
        except Exception as error:
            raise EngineUnavailable(f"the driver cannot be reached: {type(error).__name__}: {error}") from error

    @property
    def closed(self) -> bool:
        """The connection is over, whoever ended it."""
        return self._ended is not None

    def submit(self, request: Request) -> None:
        """Send a request. A refusal comes as outputs with finish_reason "error" (see messages.error_of).

        Raises EngineUnavailable when the driver is gone.
        """
        self._send(Submit(request))

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Forget a request, or one of its samples. Unknown and finished ones are ignored; no output acknowledges it."""
        if not self.closed:
            self._send(Abort(request_id, index))

    async def stats(self, timeout_s: float = 5.0) -> dict[str, Any]:
        """The engine's counters and gauges, by name, as of its last step."""
        return await self._ask("stats", timeout_s)

    async def picture(self, timeout_s: float = 5.0) -> dict[str, Any]:
        """What every block and request is doing; see engine.picture."""
        return await self._ask("picture", timeout_s)

    async def health(self, timeout_s: float = 2.0) -> DriverHealth:
        """What the driver knows of itself. Raises EngineUnavailable when it does not answer in time."""
        return msgspec.convert(await self._ask("health", timeout_s), DriverHealth)

    async def close(self) -> None:
        """Leave; the driver aborts what this client has running. Does not call `on_disconnect`."""
        self._on_disconnect = None
        self._end("closed")
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def _send(self, message: ToDriver) -> None:
        if self._ended is not None:
            raise EngineUnavailable(f"the driver is gone: {self._ended}")
        self._writer.write(frame(encode(message)))
        if self._writer.transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            self._end("the driver does not read")

    async def _ask(self, topic: Literal["stats", "health", "picture"], timeout_s: float) -> dict[str, Any]:
        number = next(self._numbers)
        self._send(Ask(number, topic))
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._asked[number] = future
        try:
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError:
            raise EngineUnavailable(f"the driver did not tell its {topic} in {timeout_s:g} s") from None
        finally:
            self._asked.pop(number, None)

    async def _read(self) -> None:
        buffer = FrameBuffer()
        reason = "end of stream"
        try:
            while data := await self._reader.read(READ_BYTES):
                buffer.feed(data)
                while (payload := buffer.take()) is not None:
                    self._receive(decode_for_client(payload))
        except asyncio.CancelledError:
            raise
        except (OSError, FrameError, msgspec.MsgspecError) as error:
            reason = f"{type(error).__name__}: {error}"
        except Exception as error:
            logger.exception("the driver's messages could not be handled")
            reason = f"{type(error).__name__}: {error}"
        finally:
            self._end(reason)

    def _receive(self, message: ToClient) -> None:
        if isinstance(message, Outputs):
            self._on_outputs(message.outputs)
        elif isinstance(message, Welcome):
            self.facts = message.facts
            if not self._welcome.done():
                self._welcome.set_result(message.facts)
        else:
            future = self._asked.get(message.number)
            if future is not None and not future.done():
                future.set_result(message.body)

    def _end(self, reason: str) -> None:
        if self._ended is not None:
            return
        self._ended = reason
        self._writer.close()
        gone = EngineUnavailable(f"the driver is gone: {reason}")
        waiting: list[asyncio.Future[Any]] = [self._welcome, *self._asked.values()]
        for future in waiting:
            if not future.done():
                future.set_exception(gone)
                future.exception()  # read here: nobody may be left to read it
        if self._on_disconnect is not None:
            self._on_disconnect(reason)


async def _ticket_of(driver: Any) -> Ticket:
    """Ask a driver actor where to connect; a Unix socket on its own node, TCP from another."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    ticket: Ticket = await driver.ticket.remote(here)
    return ticket


async def _open(ticket: Ticket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    kind, _, place = ticket.address.partition(":")
    if kind == "unix":
        reader, writer = await asyncio.open_unix_connection(place, limit=READ_BYTES)
    else:
        host, _, port = place.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=READ_BYTES)
        prepare(writer.get_extra_info("socket"))
    writer.write(frame(ticket.token + msgspec.msgpack.encode("client")))
    return reader, writer
