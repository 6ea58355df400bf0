"""The async iterator that `prefill` and `decode` return: events in, a cleanup that always ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Generic, TypeVar

from prfaas.transport.waiting import finish_despite_cancel

E = TypeVar("E")


class RequestEvents(Generic[E]):
    """Events come out in the order they were pushed, then the end or the failure. On the loop's thread."""

    def __init__(self, cleanup: Callable[[], Awaitable[None]]) -> None:
        self._cleanup = cleanup
        self._queue: asyncio.Queue[E | Exception | None] = asyncio.Queue()
        self._sealed = False
        self._failed = False
        self._drained = False
        self._closing: asyncio.Task[None] | None = None
        self._on_closed: Callable[[], None] = lambda: None

    def push(self, event: E) -> None:
        if not self._sealed:
            self._queue.put_nowait(event)

    def end(self) -> None:
        self._seal(None)

    def fail(self, error: Exception) -> None:
        """The first failure or end counts."""
        self._seal(error)

    @property
    def sealed(self) -> bool:
        return self._sealed

    @property
    def failed(self) -> bool:
        return self._failed

    def _seal(self, last: Exception | None) -> None:
        if not self._sealed:
            self._sealed = True
            self._failed = last is not None
            self._queue.put_nowait(last)

    def __aiter__(self) -> AsyncIterator[E]:
        return self

    async def __anext__(self) -> E:
        if self._drained or self._closing is not None:
            raise StopAsyncIteration
        item = await self._queue.get()
        if item is None:
            self._drained = True
            raise StopAsyncIteration
        if isinstance(item, Exception):
            self._drained = True
            raise item
        return item

    def on_closed(self, callback: Callable[[], None]) -> None:
        """Called once, when `aclose` has done its work."""
        self._on_closed = callback

    async def aclose(self) -> None:
        """Cancel the request and free what it holds; idempotent. It is carried through, and waited for, even when the
        caller is cancelled meanwhile."""
        if self._closing is None:
            self._seal(None)
            self._closing = asyncio.ensure_future(self._close())
        await finish_despite_cancel(self._closing)

    async def _close(self) -> None:
        try:
            await self._cleanup()
        finally:
            self._on_closed()
