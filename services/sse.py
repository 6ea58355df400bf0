"""Server-sent events from a node: one write for all that is ready, pings when it is quiet."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any, Self

from aiohttp import web
from prfaas.services.messages import to_json
from prfaas.services.web import describe_error

PING = b": ping\n\n"


class SseResponse:
    """`async with` it: the headers leave at its start, the end of the body at its end. `send` never waits: a task of
    its own writes, so that events which are ready together leave together, and a comment never comes inside an event.

    When the client is gone, aiohttp cancels the handler; what was not written is dropped.
    """

    def __init__(self, request: web.Request, ping_s: float) -> None:
        self._request = request
        self._ping_s = ping_s
        self._pending: list[bytes] = []
        self._news = asyncio.Event()
        self._quiet = True
        self._ended = False
        self.response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )

    async def __aenter__(self) -> Self:
        await self.response.prepare(self._request)
        self._loop = asyncio.get_running_loop()
        self._writer = self._loop.create_task(self._write())
        self._timer = self._loop.call_later(self._ping_s, self._ping)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if kind is None:
            self._ended = True
            self._news.set()
        else:
            self._writer.cancel()
        await asyncio.wait([self._writer])
        if not self._writer.cancelled():
            trouble = self._writer.exception()
            # A connection that broke means a client that left: nobody is there to be told.
            if kind is None and trouble is not None and not isinstance(trouble, ConnectionError):
                raise trouble

    def send(self, event: bytes) -> None:
        """`event`: whole events, each with the empty line that ends it."""
        if event:
            self._quiet = False
            self._pending.append(event)
            self._news.set()

    def send_event(self, name: str, body: Any) -> None:
        """One named event whose data is the JSON of `body`."""
        self.send(b"event: %b\ndata: %b\n\n" % (name.encode(), to_json(body)))

    def send_error(self, error: Exception, request_id: str) -> str:
        """The `error` event, which is the last one. Returns the code in it."""
        body = describe_error(error, request_id)[1]
        self.send_event("error", body)
        return body.error.code or "error"

    async def _write(self) -> None:
        while not (self._ended and not self._pending):
            await self._news.wait()
            self._news.clear()
            data = b"".join(self._pending)
            self._pending.clear()
            if data:
                await self.response.write(data)

    def _ping(self) -> None:
        if self._quiet:
            self.send(PING)
        self._quiet = True
        self._timer = self._loop.call_later(self._ping_s, self._ping)
