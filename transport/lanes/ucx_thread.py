"""The one thread that calls UCX, and the streams of messages that it keeps for lanes.

UCX has no deadline of its own: a peer that was stopped or cut off leaves sends and receives open for minutes. So no
call of it is made on an event loop, every stream has a deadline, a stream that missed it is never used again, and the
buffers of its requests are kept until UCX has reported each of them done.

    node's loop  --  connect, send, flush, drop, give_back  -->  this thread   (a queue and an eventfd)
    node's loop  <--  news, bounded by the window           --   this thread   (a queue and call_soon_threadsafe)

Memory: messages are built in and read from slots, which belong to one side at a time: free (loop) -> outbox -> UCX ->
free; posted (UCX) -> news -> loop -> posted. Engine memory is never given to UCX, so nothing of it is read or written
after a lane's `lost`, whatever UCX still has in flight.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import select
import signal
import threading
import time
from collections import deque
from collections.abc import Callable

from prfaas.common.errors import ProtocolError
from prfaas.common.log import get_logger
from prfaas.transport.lanes.ucx_binding import Endpoint, Request, Tag, Worker, open_worker
from prfaas.transport.lanes.ucx_wire import (
    BEAT,
    DATA,
    HEADER_BYTES,
    MESSAGE_BYTES,
    WINDOW_MESSAGES,
    parse_header,
    put_header,
)

SPARE_RECEIVES = 2
"""Beyond the window: for BEATs, which come at any time."""
LINGER_S = 2.0
"""How long a stream that was closed in order may take until the peer has consumed everything."""
MAX_WAIT_S = 0.5
"""Longest sleep of the thread: deadlines are looked at so often. An event or a command wakes it at once."""
UNUSED_S = 5.0
"""A thread without streams and listeners ends after so long."""
START_S = 20.0
EXIT_S = 3.0
"""How long the process waits at its end for the thread, and then for what UCX does at exit."""

log = get_logger("transport")


class Slot:
    """Room for one message."""

    __slots__ = ("memory", "payload", "size")

    def __init__(self, payload_bytes: int = MESSAGE_BYTES) -> None:
        self.memory = memoryview(bytearray(HEADER_BYTES + payload_bytes))
        self.payload = self.memory[HEADER_BYTES:]
        self.size = 0
        """Of the payload that it holds."""


News = tuple[str, object]
"""("up", None) once, first; ("data", Slot); ("sent", Slot): free again; ("flushed", messages sent);
("failed", Exception) once, last."""


class Stream:
    """One lane's messages in both directions. The loop's side uses `hear`; the rest is the thread's."""

    def __init__(self, address: bytes, tag_out: Tag, tag_in: Tag, loop: asyncio.AbstractEventLoop) -> None:
        self.address = address
        self.tag_out = tag_out
        self.tag_in = tag_in
        self.outbox: deque[Slot] = deque()
        self.flushing = False
        self.endpoint: Endpoint | None = None
        self.sending: deque[tuple[Request, Slot, float]] = deque()
        self.receiving: deque[tuple[Request, Slot]] = deque()
        self.sent = 0
        self.peer_consumed = 0
        self.consumed = 0
        self.told = 0
        self.heard_s = self.said_s = 0.0
        self.up = False
        self.drop_at_s: float | None = None
        """Dropped by its lane: it goes when all was consumed, at the latest then."""
        self._loop = loop
        self._news: deque[News] = deque()
        self._scheduled = False
        self._listener: Callable[[News], None] | None = None

    def listen(self, listener: Callable[[News], None] | None) -> None:
        """Loop: who hears the news from now on."""
        self._listener = listener

    def tell(self, kind: str, value: object = None) -> None:
        """Thread."""
        self._news.append((kind, value))
        if not self._scheduled:
            self._scheduled = True
            try:
                self._loop.call_soon_threadsafe(self._hear)
            except RuntimeError:  # closed, and its lanes with it
                self.drop_at_s = 0.0

    def _hear(self) -> None:
        self._scheduled = False
        while self._news:
            news = self._news.popleft()
            if self._listener is not None:
                self._listener(news)


class UcxThread:
    """Made and started by `UcxBackend`. Methods are any thread's unless said."""

    def __init__(self, deadline_s: float) -> None:
        self.version = (0, 0)
        self.address = b""
        self.turned_s = time.monotonic()
        """When it last came round: a lane whose thread does not is lost."""
        self._deadline_s = deadline_s
        self._beat_s = min(1.0, deadline_s / 4)
        self._lock = threading.Lock()
        self._users = 1
        self._unused_since_s = 0.0
        self._stopping = False
        self._ended = False
        self._commands: deque[tuple[Callable[..., None], tuple[object, ...]]] = deque()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._signalled = False
        self._streams: list[Stream] = []
        self._kept: list[tuple[Endpoint, list[tuple[Request, Slot]]]] = []
        """What UCX still uses of streams that are gone."""
        self._problem: Exception | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kv-ucx", daemon=True)

    # -- any thread

    def start(self) -> None:
        """Blocks while UCX loads. Raises OSError."""
        self._thread.start()
        if not self._started.wait(START_S):
            raise OSError(f"UCX has not started within {START_S:g} s")
        if self._problem is not None:
            raise OSError(f"UCX can't be used: {self._problem}") from self._problem
        atexit.register(self._at_exit)

    def retain(self) -> bool:
        """One more user; False when the thread has ended or is about to."""
        with self._lock:
            if self._ended or self._stopping:
                return False
            self._users += 1
            return True

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            self._unused_since_s = time.monotonic()

    def connect(self, stream: Stream) -> None:
        self._do(self._connect, stream)

    def send(self, stream: Stream, slot: Slot) -> None:
        """`slot.size` bytes of payload. The slot comes back as news."""
        stream.outbox.append(slot)
        self._wake()

    def flush(self, stream: Stream) -> None:
        """News "flushed" when all that was sent has left."""
        self._do(self._flush, stream)

    def give_back(self, stream: Stream, slots: list[Slot]) -> None:
        """Consumed: the peer may send as many more."""
        self._do(self._consumed, stream, slots)

    def drop(self, stream: Stream, *, linger: bool) -> None:
        """The lane is gone. linger: the peer may still consume what was sent."""
        self._do(self._drop, stream, linger)

    def _do(self, command: Callable[..., None], *arguments: object) -> None:
        self._commands.append((command, arguments))
        self._wake()

    def _wake(self) -> None:
        if not self._signalled:
            self._signalled = True
            with contextlib.suppress(OSError):  # ended
                os.eventfd_write(self._wake_fd, 1)

    # -- the thread

    def _run(self) -> None:
        try:
            worker = open_worker()
            self.version, self.address = worker.version, worker.address
        except Exception as error:
            self._problem = error
            self._ended = True
            return
        finally:
            self._started.set()
        self._worker = worker
        try:
            self._serve(worker)
        except Exception as error:
            log.error("the UCX thread failed; its lanes are lost", error=f"{type(error).__name__}: {error}")
            self._ended = True
            for stream in self._streams:
                stream.tell("failed", OSError(f"the UCX thread failed: {error}"))
            return  # what UCX has in flight stays in memory with this object, which atexit holds
        self._kept.clear()
        del worker, self._worker
        atexit.unregister(self._at_exit)
        os.close(self._wake_fd)

    def _serve(self, worker: Worker) -> None:
        poller = select.epoll()
        poller.register(worker.event_fd, select.EPOLLIN)
        poller.register(self._wake_fd, select.EPOLLIN)
        with contextlib.closing(poller):
            while not self._over():
                worker.progress()
                now = self.turned_s = time.monotonic()
                busy = self._take_commands()
                for stream in list(self._streams):
                    busy |= self._turn(stream, now)
                self._sweep()
                if not busy and worker.arm():
                    poller.poll(0 if self._signalled else self._wait_s())

    def _wait_s(self) -> float:
        return min(MAX_WAIT_S, self._beat_s) if self._streams or self._kept else MAX_WAIT_S

    def _over(self) -> bool:
        with self._lock:
            unused = self._users == 0 and time.monotonic() - self._unused_since_s > UNUSED_S
            self._ended = (unused or self._stopping) and not (self._commands or self._streams or self._kept)
        return self._ended

    def _take_commands(self) -> bool:
        if not self._signalled:
            return False
        # First: a command that comes from now on signals anew.
        self._signalled = False
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)
        while self._commands:
            command, arguments = self._commands.popleft()
            command(*arguments)
        return True

    def _sweep(self) -> None:
        """Let go of what UCX has reported done."""
        if self._kept:
            self._kept = [
                (e, open_) for e, requests in self._kept if (open_ := [r for r in requests if not r[0].done()])
            ]

    # -- commands

    def _connect(self, stream: Stream) -> None:
        now = time.monotonic()
        stream.heard_s = stream.said_s = now
        self._streams.append(stream)
        try:
            stream.endpoint = self._worker.connect(stream.address)
            for _ in range(WINDOW_MESSAGES + SPARE_RECEIVES):
                self._post(stream, Slot())
            self._beat(stream, now)
        except Exception as error:
            self._fail(stream, error)

    def _flush(self, stream: Stream) -> None:
        stream.flushing = True

    def _consumed(self, stream: Stream, slots: list[Slot]) -> None:
        if stream.endpoint is None:
            return
        stream.consumed += len(slots)
        try:
            for slot in slots:
                self._post(stream, slot)
        except Exception as error:
            self._fail(stream, error)

    def _drop(self, stream: Stream, linger: bool) -> None:
        if stream.drop_at_s is None or not linger:
            stream.drop_at_s = time.monotonic() + (LINGER_S if linger else 0.0)

    # -- streams

    def _turn(self, stream: Stream, now: float) -> bool:
        """Look at what is done, send what may be sent. True: something happened."""
        try:
            busy = self._take_sent(stream) | self._take_received(stream, now) | self._send_next(stream, now)
            if stream.flushing and not stream.outbox and not stream.sending:
                stream.flushing = False
                stream.tell("flushed", stream.sent)
            if now - stream.said_s >= self._beat_s or stream.consumed - stream.told >= WINDOW_MESSAGES // 2:
                self._beat(stream, now)
            self._check_deadlines(stream, now)
        except Exception as error:
            self._fail(stream, error)
            return True
        if stream.drop_at_s is not None and (now >= stream.drop_at_s or stream.sent == stream.peer_consumed):
            self._dispose(stream)
        return busy

    def _take_sent(self, stream: Stream) -> bool:
        busy = False
        while stream.sending and stream.sending[0][0].done():
            request, slot, _ = stream.sending.popleft()
            request.check()
            if len(slot.payload):
                stream.tell("sent", slot)
            busy = True
        return busy

    def _take_received(self, stream: Stream, now: float) -> bool:
        """In the order in which they were posted, which is the order of the peer's sends."""
        busy = False
        while stream.receiving and stream.receiving[0][0].done():
            request, slot = stream.receiving.popleft()
            request.check()
            busy = True
            header = parse_header(slot.memory)
            stream.heard_s = now
            stream.peer_consumed = max(stream.peer_consumed, header.consumed)
            if stream.peer_consumed > stream.sent:
                raise ProtocolError(f"the peer has consumed {stream.peer_consumed} messages of {stream.sent}")
            if not stream.up:
                stream.up = True
                stream.tell("up")
            if header.kind == DATA:
                slot.size = header.payload_bytes
                stream.tell("data", slot)
            else:
                self._post(stream, slot)
        if not stream.receiving:
            raise ProtocolError("the peer sends more than the window allows")
        return busy

    def _send_next(self, stream: Stream, now: float) -> bool:
        busy = False
        while stream.outbox and stream.sent - stream.peer_consumed < WINDOW_MESSAGES:
            slot = stream.outbox.popleft()
            stream.sent += 1
            self._submit(stream, slot, slot.size, DATA, now)
            busy = True
        return busy

    def _beat(self, stream: Stream, now: float) -> None:
        self._submit(stream, Slot(0), 0, BEAT, now)

    def _submit(self, stream: Stream, slot: Slot, size: int, kind: int, now: float) -> None:
        assert stream.endpoint is not None
        put_header(slot.memory, size, kind, stream.consumed)
        stream.told = stream.consumed
        stream.said_s = now
        stream.sending.append((stream.endpoint.send(slot.memory[: HEADER_BYTES + size], stream.tag_out), slot, now))

    def _post(self, stream: Stream, slot: Slot) -> None:
        assert stream.endpoint is not None
        stream.receiving.append((stream.endpoint.receive(slot.memory, stream.tag_in), slot))

    def _check_deadlines(self, stream: Stream, now: float) -> None:
        if now - stream.heard_s > self._deadline_s:
            raise TimeoutError(f"nothing has come from the peer over UCX for {self._deadline_s:g} s")
        if stream.sending and now - stream.sending[0][2] > self._deadline_s:
            raise TimeoutError(f"UCX has not sent a message within {self._deadline_s:g} s")
        if stream.endpoint is not None and not stream.endpoint.alive:
            raise ConnectionResetError("UCX: the connection to the peer is gone")

    def _fail(self, stream: Stream, error: Exception) -> None:
        if isinstance(error, OSError | ProtocolError):
            stream.tell("failed", error)
        else:
            stream.tell("failed", OSError(f"UCX: {type(error).__name__}: {error}"))
        self._dispose(stream)

    def _dispose(self, stream: Stream) -> None:
        """Close the endpoint for good; keep what UCX may still read or write."""
        if stream in self._streams:
            self._streams.remove(stream)
        endpoint, stream.endpoint = stream.endpoint, None
        if endpoint is None:
            return
        try:
            endpoint.close()
        except Exception as error:
            log.warning("a UCX endpoint did not close", error=str(error))
        requests = [(request, slot) for request, slot, _ in stream.sending] + list(stream.receiving)
        self._kept.append((endpoint, requests))
        stream.sending.clear()
        stream.receiving.clear()
        stream.outbox.clear()

    # -- the end of the process

    def _at_exit(self) -> None:
        """Main thread. Close what is open, but never wait longer than UCX deserves: if its own clean-up hangs
        afterwards, an alarm ends the process."""
        with self._lock:
            self._stopping = True
        for stream in list(self._streams):
            self._do(self._drop, stream, True)
        self._wake()
        self._thread.join(EXIT_S)
        if not self._ended or self._thread.is_alive():
            log.error("the UCX thread does not end; leaving it behind", waited_s=EXIT_S)
            with contextlib.suppress(ValueError):  # not the main thread
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.setitimer(signal.ITIMER_REAL, EXIT_S)
