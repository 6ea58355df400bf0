"""A bare pair of blocking sockets, a thread a lane on both sides; with `hash`, xxh3 over every chunk on both sides."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

import xxhash
from child import HOST, InMemory, main, offsets, tune

HEADER = struct.Struct("<QQ")
"""offset, nbytes; nothing = the lane's end."""


class SocketsThreads(InMemory):
    def listen(self) -> dict[str, Any]:
        self._listener = socket.create_server((HOST, 0))
        threading.Thread(target=self._accept, daemon=True).start()
        return {"port": self._listener.getsockname()[1]}

    def _accept(self) -> None:
        while True:
            lane, _ = self._listener.accept()
            tune(lane, self.options)
            threading.Thread(target=self._receive, args=(lane,), daemon=True).start()

    def _receive(self, lane: socket.socket) -> None:
        header = bytearray(HEADER.size)
        while lane.recv_into(header, 0, socket.MSG_WAITALL) == HEADER.size:
            offset, nbytes = HEADER.unpack(header)
            if nbytes == 0:
                lane.sendall(b"!")
                return
            chunk = self.memory.view[offset : offset + nbytes]
            filled = 0
            while filled < nbytes:
                came = lane.recv_into(chunk[filled:], 0, socket.MSG_WAITALL)
                if came == 0:
                    return
                filled += came
            if self.options["hash"]:
                xxhash.xxh3_64_intdigest(chunk)

    def connect(self, receiver: dict[str, Any]) -> None:
        self._lanes = [socket.create_connection((HOST, receiver["port"])) for _ in range(self.options["lanes"])]
        for lane in self._lanes:
            tune(lane, self.options)

    def send(self) -> None:
        chunks = offsets(self.options)
        lock = threading.Lock()
        threads = [threading.Thread(target=self._send, args=(lane, chunks, lock)) for lane in self._lanes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _send(self, lane: socket.socket, chunks: Iterator[int], lock: threading.Lock) -> None:
        size = self.options["chunk_bytes"]
        while True:
            with lock:
                offset = next(chunks, None)
            if offset is None:
                break
            chunk = self.memory.view[offset : offset + size]
            if self.options["hash"]:
                xxhash.xxh3_64_intdigest(chunk)
            lane.sendall(HEADER.pack(offset, size), socket.MSG_MORE)
            lane.sendall(chunk)
        lane.sendall(HEADER.pack(0, 0))
        lane.recv(1)


if __name__ == "__main__":
    main(SocketsThreads)
