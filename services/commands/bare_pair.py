"""A bare pair of protocols on an event loop: what TCP (or TLS) does with the same chunks at best. Benchmarks, here and
under tests/benchmarks, measure the transport against it.

A chunk is a header of 16 bytes and its bytes, from memory into memory; with `hashed`, both sides take xxh3 of it.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable, Iterable
from typing import cast

import xxhash

HEADER = struct.Struct("<QQ")
"""offset, nbytes; nothing = the lane's end."""
Tune = Callable[[socket.socket], None]


class Receiving(asyncio.BufferedProtocol):
    """`place(offset, nbytes)` says where a chunk goes; at its end the lane is answered and `ended` called."""

    def __init__(
        self, place: Callable[[int, int], memoryview], tune: Tune, ended: Callable[[], None], *, hashed: bool
    ) -> None:
        self._place = place
        self._tune = tune
        self._ended = ended
        self._hashed = hashed
        self._header = memoryview(bytearray(HEADER.size))
        self._target = self._header
        self._filled = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._tune(transport.get_extra_info("socket"))

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._target[self._filled :] if self._filled else self._target

    def buffer_updated(self, nbytes: int) -> None:
        self._filled += nbytes
        if self._filled < len(self._target):
            return
        self._filled = 0
        if self._target is self._header:
            offset, nbytes = HEADER.unpack(self._header)
            if nbytes:
                self._target = self._place(offset, nbytes)
            else:
                self._transport.write(b"!")
                self._ended()
        else:
            if self._hashed:
                xxhash.xxh3_64_intdigest(self._target)
            self._target = self._header


class Sending(asyncio.Protocol):
    """`unbuffered`: a chunk waits until the one before has left. uvloop's TLS transport pauses at that, and doesn't
    resume."""

    def __init__(self, tune: Tune, *, hashed: bool, unbuffered: bool = True) -> None:
        self._tune = tune
        self._hashed = hashed
        self._unbuffered = unbuffered
        self._writable = asyncio.Event()
        self._writable.set()
        self._answered = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self._unbuffered:
            self._transport.set_write_buffer_limits(high=0, low=0)
        self._tune(transport.get_extra_info("socket"))

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        self._answered.set()

    async def send(self, chunks: Iterable[tuple[int, memoryview]]) -> None:
        """(offset, bytes) of each; several lanes may take from the same iterator. Returns when all have arrived."""
        for offset, chunk in chunks:
            if self._hashed:
                xxhash.xxh3_64_intdigest(chunk)
            self._transport.writelines((HEADER.pack(offset, len(chunk)), chunk))
            await self._writable.wait()
        self._transport.write(HEADER.pack(0, 0))
        await self._answered.wait()
        self._transport.close()
