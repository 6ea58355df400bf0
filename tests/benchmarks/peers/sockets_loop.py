"""A bare pair on uvloop: BufferedProtocol straight into memory; with `hash`, xxh3 over every chunk on both sides."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from typing import Any

from child import HOST, InMemory, Loop, Memory, Options, main, offsets, tune
from prfaas.services.commands.bare_pair import Receiving, Sending


class SocketsLoop(InMemory):
    def __init__(self, options: Options, memory: Memory) -> None:
        super().__init__(options, memory)
        self._loop = Loop()

    def listen(self) -> dict[str, Any]:
        return {"port": self._loop.run(self._listen())}

    async def _listen(self) -> int:
        def place(offset: int, nbytes: int) -> memoryview:
            return self.memory.view[offset : offset + nbytes]

        def lane() -> Receiving:
            return Receiving(place, self._tune, lambda: None, hashed=self.options["hash"])

        self._server = await asyncio.get_running_loop().create_server(lane, HOST, 0)
        return int(self._server.sockets[0].getsockname()[1])

    def connect(self, receiver: dict[str, Any]) -> None:
        self._lanes = [self._loop.run(self._dial(receiver["port"])) for _ in range(self.options["lanes"])]

    async def _dial(self, port: int) -> Sending:
        def lane() -> Sending:
            return Sending(self._tune, hashed=self.options["hash"])

        return (await asyncio.get_running_loop().create_connection(lane, HOST, port))[1]

    def send(self) -> None:
        self._loop.run(self._send())

    async def _send(self) -> None:
        """All lanes take from the same chunks."""
        chunks = self._chunks()
        await asyncio.gather(*(lane.send(chunks) for lane in self._lanes))

    def _chunks(self) -> Iterator[tuple[int, memoryview]]:
        size = self.options["chunk_bytes"]
        for offset in offsets(self.options):
            yield offset, self.memory.view[offset : offset + size]

    def _tune(self, sock: socket.socket) -> None:
        tune(sock, self.options)


if __name__ == "__main__":
    main(SocketsLoop)
