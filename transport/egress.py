"""The cap on what all sessions of an endpoint together send."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Protocol

from prfaas.transport.pacing import TokenBucket


class Waiting(Protocol):
    def wake(self) -> None: ...


class EgressCap:
    """Sessions ask before each chunk; those that must wait are woken one by one, in the order of asking."""

    def __init__(self, rate_bytes_per_s: float) -> None:
        """0 = no cap."""
        self._bucket = TokenBucket(rate_bytes_per_s, time.monotonic()) if rate_bytes_per_s else None
        self._waiting: deque[Waiting] = deque()
        self._turn: Waiting | None = None
        self._timer: asyncio.TimerHandle | None = None

    def may_send(self, session: Waiting) -> bool:
        """True: a chunk may leave now. False: `session.wake()` is called when one may."""
        if self._bucket is None:
            return True
        free = self._bucket.wait_s(time.monotonic()) == 0.0
        if free and (session is self._turn or not self._waiting):
            self._turn = None
            return True
        if session not in self._waiting:
            self._waiting.append(session)
        self._schedule()
        return False

    def sent(self, nbytes: int) -> None:
        if self._bucket is not None:
            self._bucket.take(nbytes)

    def leave(self, session: Waiting) -> None:
        """It is gone."""
        if session in self._waiting:
            self._waiting.remove(session)

    def _schedule(self) -> None:
        if self._timer is None and self._waiting and self._bucket is not None:
            wait_s = self._bucket.wait_s(time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._wake_next)

    def _wake_next(self) -> None:
        # One that has nothing to send any more, or whose lanes are full, must not hold up the others.
        self._timer = None
        if self._bucket is not None and self._waiting and self._bucket.wait_s(time.monotonic()) == 0.0:
            self._turn = self._waiting.popleft()
            self._turn.wake()
        self._schedule()  # a turn while the bucket is empty would be no turn
