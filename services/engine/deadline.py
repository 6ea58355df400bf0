"""A request's time, counted on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Deadline:
    """Fails a request after its timeout."""

    def __init__(self, timeout_s: float | None, fail: Callable[[Exception], None]) -> None:
        error = TimeoutError(f"the request took longer than {timeout_s} s")
        loop = asyncio.get_running_loop()
        self._handle = None if timeout_s is None else loop.call_later(max(0.0, timeout_s), fail, error)
        self._now = loop.time

    @property
    def remaining_s(self) -> float | None:
        return None if self._handle is None else max(0.0, self._handle.when() - self._now())

    def cancel(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
