"""Accepting connections over TLS, each with the certificates that are good at that moment.

Not the loop's own `create_server(ssl=...)`: that keeps one context for ever, and tells nobody that a handshake failed.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from collections.abc import Callable
from typing import cast

from prfaas.common.log import get_logger
from prfaas.transport.tls import accepted_socket, tls_problem

HANDSHAKE_S = 10.0
CLOSE_NOTIFY_S = 1.0
"""How long a closing connection waits for the other side's goodbye."""
MAX_HANDSHAKES = 1024
"""In progress; one more ends the oldest: strangers that say nothing must not keep out those who do."""
ACCEPT_AGAIN_S = 0.1
MAX_TROUBLES = 1000
HUNG_UP = "the other side ended the TLS handshake; if it is of this cluster, its own log says why"
MAX_ACCEPTS = 64
"""In one turn of the loop."""
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

log = get_logger("tls")


class TlsListener:
    """On a bound, non-blocking socket, which it owns. `context` is asked for each connection; `protocol()` is called
    when its handshake begins, and the protocol's `connection_made` when that has succeeded."""

    def __init__(
        self,
        sock: socket.socket,
        context: Callable[[], ssl.SSLContext],
        protocol: Callable[[], asyncio.BaseProtocol],
        *,
        backlog: int,
    ) -> None:
        self._sock = sock
        self._context = context
        self._protocol = protocol
        self._loop = asyncio.get_running_loop()
        self._handshakes: dict[asyncio.Task[None], None] = {}
        self._troubles: set[tuple[str, str]] = set()
        self._again: asyncio.TimerHandle | None = None
        self._closed = False
        sock.setblocking(False)
        sock.listen(backlog)
        self._loop.add_reader(sock.fileno(), self._accept)

    @property
    def address(self) -> tuple[str, int]:
        return cast("tuple[str, int]", self._sock.getsockname()[:2])

    def close(self) -> None:
        """Accept no more, and end handshakes that are in progress; connections go on. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._again is not None:
            self._again.cancel()
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()
        for task in self._handshakes:
            task.cancel()

    def _accept(self) -> None:
        for _ in range(MAX_ACCEPTS):
            try:
                connection, address = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    raise
                # The listener stays readable: look away, or the loop spins.
                self._loop.remove_reader(self._sock.fileno())
                self._again = self._loop.call_later(ACCEPT_AGAIN_S, self._accept_again)
                return
            if len(self._handshakes) >= MAX_HANDSHAKES:
                next(iter(self._handshakes)).cancel()
            connection.setblocking(False)
            task = self._loop.create_task(self._shake_hands(connection, str(address[0])))
            self._handshakes[task] = None
            task.add_done_callback(self._handshakes.pop)

    def _accept_again(self) -> None:
        if not self._closed:
            self._loop.add_reader(self._sock.fileno(), self._accept)

    async def _shake_hands(self, connection: socket.socket, host: str) -> None:
        accepted_socket.set(connection)
        try:
            await self._loop.connect_accepted_socket(
                self._protocol,
                connection,
                ssl=self._context(),
                ssl_handshake_timeout=HANDSHAKE_S,
                ssl_shutdown_timeout=CLOSE_NOTIFY_S,
            )
        except OSError as error:  # the loop has closed the connection
            self._complain(host, tls_problem(error) or HUNG_UP)

    def _complain(self, host: str, problem: str) -> None:
        """Each reason once a host: a node tries again every two seconds."""
        if (host, problem) in self._troubles:
            return
        if len(self._troubles) >= MAX_TROUBLES:
            self._troubles.clear()
        self._troubles.add((host, problem))
        log.warning("connection refused", peer=host, reason=problem)
