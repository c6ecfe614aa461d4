"""Generation: one request on its way, seen by who waits for it. Batch: the generations of one call, one a prompt."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable

from engine.errors import DeadlineExceeded, MantaError
from engine.output import OutputDelta, RequestOutput
from engine.request import Request


class Generation:
    """One request: an async iterator over batches of deltas, each all that came since the last.

    Leaving its `async with` block before the end aborts the request.
    """

    def __init__(self, request: Request, on_release: Callable[[Generation], None]) -> None:
        """on_release is called once, when whoever waits is done with it."""
        self.request = request
        self.result: RequestOutput | None = None
        """Set when every sample is done."""
        self.created_s = time.monotonic()
        self.first_token_s: float | None = None
        self._on_release: Callable[[Generation], None] | None = on_release
        self._ready: list[OutputDelta] = []
        self._error: MantaError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._deadline: asyncio.TimerHandle | None = None

    @property
    def request_id(self) -> str:
        return self.request.request_id

    async def __aenter__(self) -> Generation:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.release()

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> list[OutputDelta]:
        """The next batch, never empty. Raises what ended the request when it was no proper end."""
        while not self._ready:
            if self._error is not None:
                raise self._error
            if self.result is not None:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        ready, self._ready = self._ready, []
        return ready

    async def finish(self) -> RequestOutput:
        """The whole result, once every sample is done. Raises what ended the request when it was no proper end."""
        async for _ in self:
            pass
        assert self.result is not None
        return self.result

    def push(self, delta: OutputDelta) -> None:
        """Add what one sample gained."""
        if self.first_token_s is None:
            self.first_token_s = time.monotonic()
        self._ready.append(delta)
        self._wake()

    def end(self, result: RequestOutput) -> None:
        """Every sample is done."""
        self.result = result
        self._wake()

    def fail(self, error: MantaError) -> None:
        """End with an error, unless it has ended."""
        if self.result is None and self._error is None:
            self._error = error
            self._wake()

    def expire_after(self, timeout_s: float) -> None:
        """Abort it and fail with DeadlineExceeded when it is not done by then, whether anybody reads it or not."""
        self._deadline = asyncio.get_running_loop().call_later(timeout_s, self._expire, timeout_s)

    def _expire(self, timeout_s: float) -> None:
        self.fail(DeadlineExceeded(f"the request was not finished within {timeout_s:g} s"))
        self.release()

    def release(self) -> None:
        """Whoever waited is done with it: abort what still runs. Idempotent."""
        if self._deadline is not None:
            self._deadline.cancel()
        if self._on_release is not None:
            on_release, self._on_release = self._on_release, None
            on_release(self)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Batch:
    """Generations that run together. Leaving its `async with` block aborts those that still run."""

    def __init__(self, generations: Iterable[Generation] = ()) -> None:
        self.generations = list(generations)

    def add(self, generation: Generation) -> None:
        """Let one more belong to the batch, as its last."""
        self.generations.append(generation)

    async def __aenter__(self) -> Batch:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.release()

    def release(self) -> None:
        """Abort what still runs. Idempotent."""
        for generation in self.generations:
            generation.release()

    async def results(self) -> list[RequestOutput]:
        """Every whole result, in the order of the prompts. Raises what ended one that failed."""
        return [await generation.finish() for generation in self.generations]

    async def updates(self) -> AsyncIterator[tuple[int, list[OutputDelta]]]:
        """(which generation, its new deltas), as they come. Raises what ended one that failed."""
        if len(self.generations) == 1:
            async for deltas in self.generations[0]:
                yield 0, deltas
            return
        queue: asyncio.Queue[tuple[int, list[OutputDelta]] | BaseException | None] = asyncio.Queue()

        async def pump(number: int, generation: Generation) -> None:
            try:
                async for deltas in generation:
                    queue.put_nowait((number, deltas))
                queue.put_nowait(None)
            except Exception as error:
                queue.put_nowait(error)

        pumps = [asyncio.create_task(pump(i, g)) for i, g in enumerate(self.generations)]
        try:
            running = len(pumps)
            while running:
                item = await queue.get()
                if item is None:
                    running -= 1
                elif isinstance(item, BaseException):
                    raise item
                else:
                    yield item
        finally:
            for task in pumps:
                task.cancel()

    @property
    def num_prompt_tokens(self) -> int:
        """Of all prompts together."""
        return sum(g.request.num_prompt_tokens for g in self.generations)
