"""Lanes inside one process and one event loop: for tests, and for two nodes in one process.

They behave like a network in what matters: bytes arrive later, in pieces, and the writer is told when all have left.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Sequence

from prfaas.transport.lanes.api import Buffer, LaneHandler, Listener

PIECE_BYTES = 256 << 10
"""Delivered in one turn of the loop, about what a socket buffer gives."""


class MemoryNetwork:
    """A `Backend`. Endpoints that share one network can reach one another; ports are made up."""

    def __init__(self) -> None:
        self._listeners: dict[tuple[str, int], Callable[[], LaneHandler]] = {}
        self._ports = itertools.count(1)

    async def listen(self, host: str, port: int, handler: Callable[[], LaneHandler]) -> Listener:
        address = (host, port or next(self._ports))
        if address in self._listeners:
            raise OSError(f"{host}:{port} is in use")
        self._listeners[address] = handler
        return _MemoryListener(self._listeners, address)

    async def dial(self, host: str, port: int, handler: LaneHandler) -> None:
        accept = self._listeners.get((host, port))
        if accept is None:
            raise ConnectionRefusedError(f"nobody listens at {host}:{port}")
        theirs = accept()
        near, far = MemoryLane(handler), MemoryLane(theirs)
        near.peer, far.peer = far, near
        theirs.connected(far)
        handler.connected(near)


class _MemoryListener:
    def __init__(self, listeners: dict[tuple[str, int], Callable[[], LaneHandler]], address: tuple[str, int]) -> None:
        self._listeners = listeners
        self.address = address

    async def aclose(self) -> None:
        self._listeners.pop(self.address, None)


class MemoryLane:
    peer: MemoryLane
    peer_identity = None

    def __init__(self, handler: LaneHandler) -> None:
        self._handler = handler
        self._loop = asyncio.get_running_loop()
        self._unsent: deque[memoryview] = deque()
        self._scheduled = False
        self._lost = False
        self.closing = False
        self.unsent_bytes = 0

    def write(self, buffers: Sequence[Buffer]) -> None:
        if self._lost or self.closing:
            return
        for buffer in buffers:
            view = memoryview(buffer).cast("B")
            self._unsent.append(view)
            self.unsent_bytes += len(view)
        self._schedule()

    def sample(self) -> None:
        return None

    def close(self) -> None:
        self.closing = True
        self._schedule()

    def abort(self) -> None:
        self._unsent.clear()
        self.unsent_bytes = 0
        self.close()

    def _schedule(self) -> None:
        if not self._scheduled and not self._lost:
            self._scheduled = True
            self._loop.call_soon(self._deliver)

    def _deliver(self) -> None:
        self._scheduled = False
        budget = PIECE_BYTES
        while self._unsent and budget and not self._lost:
            budget -= self._deliver_piece(budget)
        if self._lost:
            return
        if self._unsent:
            self._schedule()
        elif self.closing:
            self._end()
            self.peer._end()
        elif budget < PIECE_BYTES:
            self._handler.writable()

    def _deliver_piece(self, budget: int) -> int:
        source = self._unsent[0]
        if self.peer._lost:
            n = min(len(source), budget)
        else:
            target = self.peer._handler.next_buffer()
            n = min(len(source), len(target), budget)
            target[:n] = source[:n]
        # Before `advance`: it may close this very lane, which clears the queue.
        self.unsent_bytes -= n
        if n == len(source):
            self._unsent.popleft()
        else:
            self._unsent[0] = source[n:]
        if not self.peer._lost:
            self.peer._handler.advance(n)
        return n

    def _end(self) -> None:
        if not self._lost:
            self._lost = self.closing = True
            self._unsent.clear()
            self.unsent_bytes = 0
            self._loop.call_soon(self._handler.lost, None)
