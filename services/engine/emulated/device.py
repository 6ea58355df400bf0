"""The emulated accelerator: one thing at a time, each for as long as its profile says."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

# A timer fires a little late. Work that follows at once starts where the last was to end, so that the lateness of
# thousands of steps does not add up; after a longer pause the clock starts anew.
_CATCH_UP_S = 0.02


class Device:
    """Turns go to waiting prefill steps and decode steps alternately, first come first served within each."""

    def __init__(self, time_scale: float) -> None:
        self._time_scale = time_scale
        self._busy = False
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {"prefill": deque(), "decode": deque()}
        self._ready_s = 0.0

    @asynccontextmanager
    async def turn(self, kind: str) -> AsyncIterator[None]:
        """The device is this caller's alone for the block. `kind`: prefill | decode."""
        if self._busy:
            ticket = asyncio.get_running_loop().create_future()
            self._waiting[kind].append(ticket)
            try:
                await ticket
            except asyncio.CancelledError:
                if not ticket.cancelled():
                    self._pass_on(kind)  # it was our turn already
                raise
        self._busy = True
        now = time.monotonic()
        if now - self._ready_s > _CATCH_UP_S:
            self._ready_s = now
        try:
            yield
        finally:
            self._pass_on(kind)

    async def work(self, seconds: float) -> None:
        """Be busy for `seconds` of the profile's time."""
        self._ready_s += seconds * self._time_scale
        await asyncio.sleep(max(0.0, self._ready_s - time.monotonic()))

    def _pass_on(self, kind: str) -> None:
        other = "decode" if kind == "prefill" else "prefill"
        for queue in (self._waiting[other], self._waiting[kind]):
            while queue:
                ticket = queue.popleft()
                if not ticket.done():  # done = its caller was cancelled
                    ticket.set_result(None)
                    return
        self._busy = False
