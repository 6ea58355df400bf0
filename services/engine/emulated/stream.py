"""An iterator of events whose producer is a task of its own: it runs from the start, not from the first `anext`."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from prfaas.transport.waiting import finish_despite_cancel

E = TypeVar("E")


class TaskStream(Generic[E]):
    """`run(emit)` produces, `clean_up()` follows it whatever happened, even when it was cancelled before its first
    step. `aclose` cancels `run` and returns when `clean_up` has; it finishes that even when its caller is cancelled."""

    def __init__(
        self, run: Callable[[Callable[[E], None]], Awaitable[None]], clean_up: Callable[[], Awaitable[None]]
    ) -> None:
        self._run = run
        self._clean_up = clean_up
        self._events: deque[E] = deque()
        self._news = asyncio.Event()
        self._stopped = False
        self._work: asyncio.Future[None] | None = None
        self._failure: Exception | None = None
        self._supervisor = asyncio.create_task(self._supervise())

    def __aiter__(self) -> TaskStream[E]:
        return self

    async def __anext__(self) -> E:
        while not self._events:
            if self._supervisor.done():
                failure, self._failure = self._failure, None
                raise failure or StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        return self._events.popleft()

    def on_end(self, callback: Callable[[], None]) -> None:
        """Called once when all is over, `clean_up` included."""
        self._supervisor.add_done_callback(lambda _: callback())

    def fail(self, error: Exception) -> None:
        """Stop `run` at once; the iterator raises `error` after the events so far. The first of several counts."""
        if self._work is None or not self._work.done():
            self._failure = self._failure or error
            self._stop()

    async def aclose(self) -> None:
        self._stop()
        await finish_despite_cancel(self._supervisor)

    def _stop(self) -> None:
        self._stopped = True
        if self._work is not None:
            self._work.cancel()

    def _emit(self, event: E) -> None:
        self._events.append(event)
        self._news.set()

    async def _supervise(self) -> None:
        try:
            if not self._stopped:
                self._work = asyncio.ensure_future(self._run(self._emit))
                await asyncio.wait([self._work])
                error = None if self._work.cancelled() else self._work.exception()
                if isinstance(error, Exception):
                    self._failure = self._failure or error
        finally:
            await self._clean_up()
            # The reader looks at `done()`, which is true only after this coroutine has returned.
            asyncio.get_running_loop().call_soon(self._news.set)
