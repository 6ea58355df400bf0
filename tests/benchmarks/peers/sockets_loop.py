"""A bare pair on uvloop: BufferedProtocol straight into memory; with `hash`, xxh3 over every chunk on both sides."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterator
from typing import Any, cast

import xxhash
from child import HOST, InMemory, Loop, Memory, Options, main, offsets, tune

HEADER = struct.Struct("<QQ")
"""offset, nbytes; nothing = the lane's end."""


class Receiving(asyncio.BufferedProtocol):
    def __init__(self, options: Options, memory: Memory) -> None:
        self._options = options
        self._memory = memory
        self._header = memoryview(bytearray(HEADER.size))
        self._target = self._header
        self._filled = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        tune(transport.get_extra_info("socket"), self._options)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._target[self._filled :] if self._filled else self._target

    def buffer_updated(self, nbytes: int) -> None:
        self._filled += nbytes
        if self._filled < len(self._target):
            return
        self._filled = 0
        if self._target is self._header:
            offset, nbytes = HEADER.unpack(self._header)
            if nbytes == 0:
                self._transport.write(b"!")
            else:
                self._target = self._memory.view[offset : offset + nbytes]
        else:
            if self._options["hash"]:
                xxhash.xxh3_64_intdigest(self._target)
            self._target = self._header


class Sending(asyncio.Protocol):
    def __init__(self, options: Options, memory: Memory) -> None:
        self._options = options
        self._memory = memory
        self._writable = asyncio.Event()
        self._writable.set()
        self._answered = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=0, low=0)
        tune(transport.get_extra_info("socket"), self._options)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        self._answered.set()

    async def send(self, chunks: Iterator[int]) -> None:
        """All lanes take from the same `chunks`."""
        size = self._options["chunk_bytes"]
        for offset in chunks:
            chunk = self._memory.view[offset : offset + size]
            if self._options["hash"]:
                xxhash.xxh3_64_intdigest(chunk)
            self._transport.writelines((HEADER.pack(offset, size), chunk))
            await self._writable.wait()
        self._transport.write(HEADER.pack(0, 0))
        await self._answered.wait()


class SocketsLoop(InMemory):
    def __init__(self, options: Options, memory: Memory) -> None:
        super().__init__(options, memory)
        self._loop = Loop()

    def listen(self) -> dict[str, Any]:
        return {"port": self._loop.run(self._listen())}

    async def _listen(self) -> int:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: Receiving(self.options, self.memory), HOST, 0)
        return int(self._server.sockets[0].getsockname()[1])

    def connect(self, receiver: dict[str, Any]) -> None:
        self._lanes = [self._loop.run(self._dial(receiver["port"])) for _ in range(self.options["lanes"])]

    async def _dial(self, port: int) -> Sending:
        loop = asyncio.get_running_loop()
        return (await loop.create_connection(lambda: Sending(self.options, self.memory), HOST, port))[1]

    def send(self) -> None:
        self._loop.run(self._send())

    async def _send(self) -> None:
        chunks = offsets(self.options)
        await asyncio.gather(*(lane.send(chunks) for lane in self._lanes))


if __name__ == "__main__":
    main(SocketsLoop)
