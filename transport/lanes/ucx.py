"""Lanes over UCX, between host memories: for RDMA networks. Over TCP plain sockets are faster.

A lane is a TCP connection on which both ends agree (the spine: ucx_wire.py) and a stream of UCX messages that another
thread moves (ucx_thread.py). What is called here runs on the event loop and never waits for UCX: the spine's end is
the lane's end, and the thread lets go of the rest in its own time.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import cast

from prfaas.common.config import TransportConfig
from prfaas.common.errors import ConfigError, PeerError, ProtocolError
from prfaas.common.identity import PeerIdentity
from prfaas.common.log import get_logger
from prfaas.transport.lanes.api import Buffer, LaneHandler, Listener
from prfaas.transport.lanes.tcp import BACKLOG
from prfaas.transport.lanes.ucx_binding import ucx_problem
from prfaas.transport.lanes.ucx_thread import LINGER_S, News, Slot, Stream, UcxThread
from prfaas.transport.lanes.ucx_wire import (
    MAX_SPINE_BYTES,
    MESSAGE_BYTES,
    NONCE_BYTES,
    WINDOW_MESSAGES,
    Greeting,
    check_greeting,
    encode_challenge,
    encode_end,
    encode_greeting,
    take_challenge,
    take_end,
    take_greeting,
)

MAX_STRANGERS = 64
"""Connections that have not greeted yet; one more closes the oldest."""

log = get_logger("transport")


def make_ucx_backend(config: TransportConfig, secret: bytes = b"") -> UcxBackend:
    """Raises ConfigError that says why UCX can't be had here, and the mend. `secret`: the cluster's."""
    problem = ucx_problem()
    if problem is not None:
        raise ConfigError([f"transport.backend = ucx: {problem}"])
    return UcxBackend(config, secret)


class UcxBackend:
    """A `Backend`. Its thread starts with the first listener or lane and ends some time after the last."""

    def __init__(self, config: TransportConfig, secret: bytes) -> None:
        self.secret = secret
        self.deadline_s = config.dead_s
        self.open_timeout_s = config.open_timeout_s
        self.strangers: dict[UcxLane, None] = {}
        """In order of arrival."""
        self._thread: UcxThread | None = None
        self._starting = asyncio.Lock()

    async def listen(self, host: str, port: int, handler: Callable[[], LaneHandler]) -> Listener:
        thread = await self.retain_thread()

        def accept() -> UcxLane:
            if len(self.strangers) >= MAX_STRANGERS:
                next(iter(self.strangers)).refuse("too many UCX lanes have not greeted yet")
            lane = UcxLane(self, thread, handler)
            self.strangers[lane] = None
            return lane

        try:
            loop = asyncio.get_running_loop()
            server = await loop.create_server(accept, host, port, reuse_address=True, backlog=BACKLOG)
        except BaseException:
            thread.release()
            raise
        return _UcxListener(server, thread)

    async def dial(self, host: str, port: int, handler: LaneHandler) -> None:
        thread = await self.retain_thread()
        try:
            opened = asyncio.get_running_loop().create_future()
            _, lane = await asyncio.get_running_loop().create_connection(
                lambda: UcxLane(self, thread, lambda: handler, opened), host, port
            )
            try:
                await opened
            finally:
                if not lane.opened:
                    lane.abort()
        finally:
            thread.release()

    async def retain_thread(self) -> UcxThread:
        """Raises OSError."""
        async with self._starting:
            if self._thread is None or not self._thread.retain():
                made = UcxThread(self.deadline_s)
                # Loading UCX takes a while.
                await asyncio.get_running_loop().run_in_executor(None, made.start)
                self._thread = made
            return self._thread


class _UcxListener:
    def __init__(self, server: asyncio.Server, thread: UcxThread) -> None:
        self._server = server
        self._thread: UcxThread | None = thread
        self.address: tuple[str, int] = server.sockets[0].getsockname()[:2]

    async def aclose(self) -> None:
        self._server.close()
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.release()


class UcxLane(asyncio.Protocol):
    """A `Lane`; as a Protocol it is the spine's. `handler` is asked for when the lane is open. `dialled`: set then, or
    why it could not be opened; None on the side that accepts."""

    peer_identity: PeerIdentity | None = None
    _handler: LaneHandler

    def __init__(
        self,
        backend: UcxBackend,
        thread: UcxThread,
        handler: Callable[[], LaneHandler],
        dialled: asyncio.Future[None] | None = None,
    ) -> None:
        self.opened = False
        self.unsent_bytes = 0
        self._backend = backend
        self._thread = thread
        self._make_handler = handler
        self._dialled = dialled
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self._tag = secrets.randbits(64)
        self._peer_nonce: bytes | None = None
        self._spine = bytearray()
        self._stream: Stream | None = None
        self._unsent: deque[memoryview] = deque()
        self._free: list[Slot] = []
        self._received = 0
        self._peer_sent: int | None = None
        """What its END says: it sends no more."""
        self._closing = False
        self._ended = False
        self._flushed = False
        self._error: Exception | None = None

    # -- the spine

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._thread.retain()
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._timer = self._loop.call_later(self._backend.open_timeout_s, self.refuse, "UCX lane: not open in time")
        if self._dialled is None:
            self._transport.write(encode_challenge(self._nonce))

    def data_received(self, data: bytes) -> None:
        self._spine += data
        try:
            if len(self._spine) > MAX_SPINE_BYTES:
                raise ProtocolError(f"{len(self._spine)} bytes on a UCX lane's spine")
            self._read_spine()
        except PeerError as error:
            log.warning("kv lane closed", reason=str(error), error=type(error).__name__)
            self._fail(ConnectionError(str(error)))

    def _read_spine(self) -> None:
        if self._dialled is not None and self._peer_nonce is None:
            self._peer_nonce = take_challenge(self._spine)
            if self._peer_nonce is None:
                return
            self._greet("dialler", self._peer_nonce)
        if self._stream is None:
            greeting = take_greeting(self._spine)
            if greeting is None:
                return
            self._greeted(greeting)
        self._peer_sent = take_end(self._spine) if self._peer_sent is None else self._peer_sent
        if self._peer_sent is not None:
            if self._spine:
                raise ProtocolError("a UCX lane's spine goes on after END")
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_later(LINGER_S, self.refuse, "UCX lost what was sent before END")
            self._look_if_complete()

    def _greet(self, role: str, peer_nonce: bytes) -> None:
        assert self._transport is not None
        ours = Greeting(self._thread.version, self._thread.address, self._tag, self._nonce)
        self._transport.write(encode_greeting(ours, self._backend.secret, role, peer_nonce))

    def _greeted(self, greeting: Greeting) -> None:
        check_greeting(
            greeting,
            secret=self._backend.secret,
            role="dialler" if self._dialled is None else "acceptor",
            our_nonce=self._nonce,
            our_version=self._thread.version,
        )
        self._backend.strangers.pop(self, None)
        if self._dialled is None:
            self._greet("acceptor", greeting.nonce)
        self._free = [Slot() for _ in range(WINDOW_MESSAGES)]
        self._stream = Stream(greeting.address, greeting.tag, self._tag, self._loop)
        self._stream.listen(self._news)
        self._thread.connect(self._stream)

    def eof_received(self) -> bool:
        # After END there may be messages on their way.
        return self._peer_sent is not None

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._ended = True
        self._backend.strangers.pop(self, None)
        if self._timer is not None:
            self._timer.cancel()
        self._forget_unsent()
        if self._stream is not None:
            self._stream.listen(None)
            self._thread.drop(self._stream, linger=self._flushed)
        self._thread.release()
        error = self._error or exc
        if error is None and not self._closing and not self._complete:
            error = ConnectionResetError("the peer's end of the UCX lane is gone")
        if self.opened:
            self._handler.lost(error)
        elif self._dialled is not None and not self._dialled.done():
            self._dialled.set_exception(error if isinstance(error, OSError) else ConnectionError(str(error)))

    def refuse(self, reason: str) -> None:
        self._fail(TimeoutError(reason))

    def _fail(self, error: Exception) -> None:
        if self._error is None:
            self._error = error
        self.abort()

    # -- what the thread tells

    def _news(self, news: News) -> None:
        kind, value = news
        if self._ended:
            return
        if kind == "data":
            self._deliver(cast(Slot, value))
        elif kind == "sent":
            self._free.append(cast(Slot, value))
            self._fill(told=True)
        elif kind == "up":
            self._up()
        elif kind == "flushed":
            self._end(cast(int, value))
        else:
            self._fail(cast(Exception, value))

    def _up(self) -> None:
        """The first message has come, so UCX has a way in this direction; the peer finds out about the other."""
        assert self._timer is not None
        self._timer.cancel()
        self._timer = self._loop.call_later(self._backend.deadline_s, self._watch_thread)
        self.opened = True
        self._handler = self._make_handler()
        self._handler.connected(self)
        if self._dialled is not None and not self._dialled.done():
            self._dialled.set_result(None)

    def _watch_thread(self) -> None:
        """UCX might never return from a call: then its lanes are lost, and the loop goes on."""
        self._timer = self._loop.call_later(self._backend.deadline_s, self._watch_thread)
        if time.monotonic() - self._thread.turned_s > self._backend.deadline_s:
            self._fail(TimeoutError(f"UCX has not returned from a call for {self._backend.deadline_s:g} s"))

    def _deliver(self, slot: Slot) -> None:
        self._received += 1
        start = 0
        while start < slot.size and not self._ended and not self._closing:
            target = self._handler.next_buffer()
            n = min(len(target), slot.size - start)
            target[:n] = slot.payload[start : start + n]
            start += n
            self._handler.advance(n)
        assert self._stream is not None
        self._thread.give_back(self._stream, [slot])
        self._look_if_complete()

    @property
    def _complete(self) -> bool:
        return self._peer_sent is not None and self._received >= self._peer_sent

    def _look_if_complete(self) -> None:
        if self._complete and self._transport is not None:
            self._transport.close()

    def _end(self, messages: int) -> None:
        self._flushed = True
        if self._transport is not None:
            self._transport.write(encode_end(messages))
            self._transport.close()

    # -- Lane

    @property
    def closing(self) -> bool:
        return self._ended or self._closing

    def write(self, buffers: Sequence[Buffer]) -> None:
        if self._ended or self._closing or self._stream is None:
            return
        for buffer in buffers:
            view = memoryview(buffer).cast("B")
            if len(view):
                self._unsent.append(view)
                self.unsent_bytes += len(view)
        self._fill(told=False)

    def _fill(self, *, told: bool) -> None:
        """Into free slots, as much as fits. told: `writable` is due when that takes the last of it."""
        had_unsent = bool(self._unsent)
        while self._unsent and self._free:
            slot = self._free.pop()
            slot.size = 0
            while self._unsent and slot.size < MESSAGE_BYTES:
                source = self._unsent[0]
                n = min(len(source), MESSAGE_BYTES - slot.size)
                slot.payload[slot.size : slot.size + n] = source[:n]
                slot.size += n
                if n == len(source):
                    self._unsent.popleft()
                else:
                    self._unsent[0] = source[n:]
            self.unsent_bytes -= slot.size
            assert self._stream is not None
            self._thread.send(self._stream, slot)
        if self._unsent or not had_unsent:
            return
        if self._closing:
            self._flush()
        elif told:
            self._handler.writable()

    def sample(self) -> None:
        return None

    def close(self) -> None:
        if self._closing or self._ended:
            return
        self._closing = True
        if not self.opened:
            self.abort()
        elif not self._unsent:
            self._flush()

    def _flush(self) -> None:
        assert self._stream is not None
        self._thread.flush(self._stream)

    def abort(self) -> None:
        self._closing = self._ended = True
        self._forget_unsent()
        if self._transport is not None:
            self._transport.abort()

    def _forget_unsent(self) -> None:
        self._unsent.clear()
        self.unsent_bytes = 0
