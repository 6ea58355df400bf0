"""ucxx, UCX over TCP: tagged messages, an endpoint a lane, many of them outstanding."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from child import HOST, InMemory, Loop, Memory, Options, main, offsets

OUTSTANDING = 64
"""Messages a lane: more change nothing."""
UCX_OPTIONS = {"TLS": "tcp", "NET_DEVICES": "lo", "TCP_TX_SEG_SIZE": "256k", "TCP_RX_SEG_SIZE": "256k"}
"""The segments as UCX over TCP is fastest; its defaults are 8 KiB and 64 KiB."""


class Ucxx(InMemory):
    def __init__(self, options: Options, memory: Memory) -> None:
        super().__init__(options, memory)
        import libucx

        libucx.load_library()
        import ucxx

        self._ucxx = ucxx
        self._loop = Loop()
        self._loop.run(self._start())

    async def _start(self) -> None:
        self._ucxx.init(options=UCX_OPTIONS, progress_mode="thread", enable_python_future=True)

    def _chunks(self, lane: int) -> list[memoryview]:
        size, lanes = self.options["chunk_bytes"], self.options["lanes"]
        return [self.memory.view[offset : offset + size] for offset in list(offsets(self.options))[lane::lanes]]

    def listen(self) -> dict[str, Any]:
        return {"port": self._loop.run(self._listen())}

    async def _listen(self) -> int:
        self._listener = self._ucxx.create_listener(self._receive)
        return int(self._listener.port)

    async def _receive(self, endpoint: Any) -> None:
        number = bytearray(1)
        await endpoint.recv(number)
        await outstanding(endpoint.recv, self._chunks(number[0]))
        await endpoint.send(bytearray(b"!"))

    def connect(self, receiver: dict[str, Any]) -> None:
        self._loop.run(self._connect(receiver["port"]))

    async def _connect(self, port: int) -> None:
        self._lanes = []
        for lane in range(self.options["lanes"]):
            endpoint = await self._ucxx.create_endpoint(HOST, port)
            await endpoint.send(bytearray([lane]))
            self._lanes.append((endpoint, self._chunks(lane)))

    def send(self) -> None:
        self._loop.run(self._send())

    async def _send(self) -> None:
        await asyncio.gather(*(send_lane(endpoint, chunks) for endpoint, chunks in self._lanes))


async def send_lane(endpoint: Any, chunks: list[memoryview]) -> None:
    await outstanding(endpoint.send, chunks)
    await endpoint.recv(bytearray(1))


async def outstanding(move: Callable[[memoryview], Awaitable[Any]], chunks: list[memoryview]) -> None:
    """Messages match in the order in which both sides begin them."""
    begun: deque[asyncio.Task[Any]] = deque()
    for chunk in chunks:
        if len(begun) == OUTSTANDING:
            await begun.popleft()
        begun.append(asyncio.ensure_future(move(chunk)))
    for task in begun:
        await task


if __name__ == "__main__":
    main(Ucxx)
