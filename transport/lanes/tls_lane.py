"""Lanes over TLS: what `tcp` does when it is given certificates."""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable, Sequence

from prfaas.common.errors import PeerRefusedError
from prfaas.common.identity import KV_ROLES, NOBODY
from prfaas.transport.lanes.api import Buffer, LaneHandler, Listener
from prfaas.transport.lanes.connecting import way_to
from prfaas.transport.lanes.tcp import TcpLane, Tuning
from prfaas.transport.lanes.tls_listener import CLOSE_NOTIFY_S, HANDSHAKE_S, TlsListener
from prfaas.transport.tls import Tls, peer_identity, tls_problem

WRITE_BYTES = 128 << 10
"""Encrypted and handed over at once: the ciphertext is still in the processor's cache when the kernel copies it. It is
also what the loop may hold unseen below the TLS layer, beyond `unsent_bytes`."""


async def listen_tls(
    tls: Tls, tuning: Tuning, host: str, port: int, handler: Callable[[], LaneHandler], backlog: int
) -> Listener:
    """Raises OSError."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = found[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError:
        sock.close()
        raise
    return _Listener(TlsListener(sock, tls.server, lambda: TlsLane(handler, tuning), backlog=backlog))


class _Listener:
    def __init__(self, listener: TlsListener) -> None:
        self._listener = listener
        self.address = listener.address

    async def aclose(self) -> None:
        self._listener.close()


async def dial_tls(tls: Tls, tuning: Tuning, host: str, port: int, handler: LaneHandler) -> None:
    """Raises OSError; PeerRefusedError when the handshake fails: the certificates, or no TLS on the other side."""
    way = await way_to(host, port)
    try:
        await asyncio.get_running_loop().create_connection(
            lambda: TlsLane(lambda: handler, tuning),
            **way,
            server_hostname=host,
            ssl=tls.client(roles=KV_ROLES),
            ssl_handshake_timeout=HANDSHAKE_S,
            ssl_shutdown_timeout=CLOSE_NOTIFY_S,
        )
    except OSError as error:
        problem = tls_problem(error)
        if problem is None:
            raise
        raise PeerRefusedError(problem) from error


class TlsLane(TcpLane):
    """Bytes are encrypted when they are written to the transport, and no more of them are than it can hand over."""

    def __init__(self, handler: Callable[[], LaneHandler], tuning: Tuning) -> None:
        super().__init__(handler, tuning)
        self._backlog: deque[memoryview] = deque()
        self._backlog_bytes = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.peer_identity = peer_identity(transport.get_extra_info("peercert")) or NOBODY
        super().connection_made(transport)

    def _pause_at_once(self, transport: asyncio.Transport) -> None:
        # uvloop's TLS transport pauses from `high` bytes on, asyncio's above it; 1 byte alone is never unsent.
        transport.set_write_buffer_limits(high=1, low=0)

    def resume_writing(self) -> None:
        if self._backlog and self._transport is not None:
            self._write_on(self._transport)
            if self.unsent_bytes:
                return
        if not self._closing:
            self._handler.writable()

    def connection_lost(self, exc: Exception | None) -> None:
        self._drop()
        # TLS 1.3: a client learns only now that the server did not take its certificate.
        problem = tls_problem(exc)
        super().connection_lost(PeerRefusedError(problem) if problem is not None else exc)

    def write(self, buffers: Sequence[Buffer]) -> None:
        transport = self._transport
        if transport is None or self.closing:
            return
        for buffer in buffers:
            view = memoryview(buffer).cast("B")
            self._backlog.append(view)
            self._backlog_bytes += len(view)
        self._write_on(transport)

    def _write_on(self, transport: asyncio.Transport) -> None:
        while self._backlog and transport.get_write_buffer_size() == 0:
            transport.writelines(self._take())
        if self._closing and not self._backlog:
            transport.close()

    def _take(self) -> list[memoryview]:
        """The next WRITE_BYTES."""
        taken, room = [], WRITE_BYTES
        while self._backlog and room:
            view = self._backlog.popleft()
            if len(view) > room:
                self._backlog.appendleft(view[room:])
                view = view[:room]
            taken.append(view)
            room -= len(view)
        self._backlog_bytes -= WRITE_BYTES - room
        return taken

    @property
    def unsent_bytes(self) -> int:
        return self._backlog_bytes + super().unsent_bytes

    def close(self) -> None:
        self._closing = True  # TLS has a word of its own for the end, and reads on until it has the other side's
        if not self._backlog and self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        self._drop()
        super().abort()

    def _drop(self) -> None:
        self._backlog.clear()
        self._backlog_bytes = 0
