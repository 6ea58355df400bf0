"""An emulated WAN that needs no privileges: a TCP proxy with a rate, a delay and a bounded bottleneck queue.

    python -m prfaas.services.wan.proxy --rate-mbit 500 --delay-ms 20 \
        --forward 127.0.0.1:0=127.0.0.1:9001 --backward 127.0.0.1:0=127.0.0.1:8000

A WAN joins side A with side B. `--forward LISTEN=TARGET` is for clients on side A, `--backward` for clients on side B;
both may be given many times. All connections share one bottleneck in each direction, as on a real line. The first line
on stdout is `READY {"ports": [...]}`, one port for each forward and then each backward, in the order given.

What a byte goes through, in one direction:

    source socket --recv--> ring of its connection --(waits its turn: rate, shared)--> (delay) --send--> destination

- The *rate* is of payload. Bytes take turns of about a millisecond each, connections in round robin.
- The *bottleneck queue* bounds what has been read and not yet been transmitted; beyond it sources are not read, so
  that TCP's own flow control holds the senders back. In flight are at most rate × delay + queue.
- The *handshake* is delayed too: the target is dialled one delay after the accept, the client's first bytes enter the
  line two delays after it and the target's three, as if SYN and SYN-ACK had travelled.
- FIN and RST travel behind the bytes before them. A target that can't be dialled is a RST to the client.
- The rate of a running line can be changed: `--rate-file` is read again at SIGHUP. What is on the line already arrives
  as it would have; a connection that was made when the line was slow has a ring for that rate.
- Each connection takes two descriptors. When there are none left, clients wait to be accepted.

What it can't show: loss and congestion windows (TCP ends at the proxy on both sides), and a client's `connect` returns
at once. Instants are good to about a millisecond, the resolution of the event loop's timers.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import json
import mmap
import os
import resource
import signal
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import uvloop
from prfaas.common.config import parse_address

TURN_S = 0.001
"""A connection that has its turn on the line sends what the line takes in so long, between these bounds."""
MIN_TURN_BYTES = 4096
MAX_TURN_BYTES = 1 << 18
# Timers tick in whole milliseconds: what is due within half of one is due now.
DUE_SLACK_S = 0.0005
MIN_RING_BYTES = 1 << 18
MIN_RECEIVE_BUFFER_BYTES = 1 << 18

ACCEPT_AGAIN_S = 0.1
"""Pause of a listener that could not accept for want of descriptors or memory; its clients wait in the kernel."""
EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

END_OF_STREAM = 0
RESET = -1


# -- pure -------------------------------------------------------------------------------------------------------------


class Bottleneck:
    """The line in one direction: when bytes that are ready at some instant will have crossed it."""

    def __init__(self, bytes_per_s: float, delay_s: float, queue_bytes: float) -> None:
        self.bytes_per_s = bytes_per_s
        self.delay_s = delay_s
        self.queue_s = queue_bytes / bytes_per_s
        self.free_s = 0.0
        """When the last byte accepted so far will have been put on the line."""

    def change(self, bytes_per_s: float, queue_bytes: float) -> None:
        """The rate from now on; what was accepted arrives when it would have."""
        self.bytes_per_s = bytes_per_s
        self.queue_s = queue_bytes / bytes_per_s

    def enter(self, ready_s: float, size: int) -> float:
        """Accept `size` bytes that were ready since `ready_s`; returns when the last of them arrives."""
        self.free_s = max(self.free_s, ready_s) + size / self.bytes_per_s
        return self.free_s + self.delay_s

    def room_at(self) -> float:
        """From when on the queue has room."""
        return self.free_s - self.queue_s


class Ring:
    """A byte queue of fixed size in one piece of memory, that is only touched as far as it is used."""

    def __init__(self, size: int) -> None:
        self._memory = memoryview(mmap.mmap(-1, size))
        self._size = size
        self._start = 0
        self.used = 0

    def free(self, limit: int) -> memoryview:
        """Contiguous free space, at most `limit` bytes; empty when full. `filled` says how much was written."""
        end = (self._start + self.used) % self._size
        room = min(limit, self._size - self.used, self._size - end)
        return self._memory[end : end + room]

    def filled(self, count: int) -> None:
        self.used += count

    def head(self, limit: int) -> memoryview:
        """The oldest bytes, contiguous, at most `limit`. `drop` says how many are done with."""
        return self._memory[self._start : self._start + min(limit, self.used, self._size - self._start)]

    def drop(self, count: int) -> None:
        self._start = (self._start + count) % self._size
        self.used -= count


@dataclass(frozen=True, slots=True)
class WanSettings:
    bytes_per_s: float
    delay_s: float
    queue_s: float

    @property
    def turn_bytes(self) -> int:
        """How much one connection may put on the line before the next has its turn."""
        return int(min(max(self.bytes_per_s * TURN_S, MIN_TURN_BYTES), MAX_TURN_BYTES))

    @property
    def queue_bytes(self) -> float:
        return max(self.bytes_per_s * self.queue_s, 2 * self.turn_bytes)

    @property
    def ring_bytes(self) -> int:
        """Room for all that one connection can have in flight, and for timers that come late."""
        in_flight = self.bytes_per_s * self.delay_s + self.queue_bytes
        return max(int(1.25 * in_flight) + 2 * self.turn_bytes, MIN_RING_BYTES)

    @property
    def receive_buffer_bytes(self) -> int:
        """Of accepted sockets. Small: bytes in it have "left" for the sender, but are not on the line yet."""
        return max(4 * self.turn_bytes, MIN_RECEIVE_BUFFER_BYTES)


# -- the shell --------------------------------------------------------------------------------------------------------


class Half:
    """One direction of one connection: source → ring → destination."""

    def __init__(self, line: Line, ring_bytes: int, source: socket.socket, destination: socket.socket) -> None:
        self.line = line
        self.ring = Ring(ring_bytes)
        self.source = source
        self.destination = destination
        self.opposite: Half
        self.due_bytes = 0
        """Bytes at the head of the ring that have arrived and may be sent."""
        self.end: int | None = None
        """END_OF_STREAM or RESET, once it has arrived behind the bytes."""
        self.done = False
        self.ring_full = False
        self.reading = True
        """Until the source has ended."""
        self.writing = False

    def source_ended(self, how: int) -> None:
        if self.reading:
            self.reading = False
            self.line.loop.remove_reader(self.source)
            self.line.enter(self, how, time.monotonic())
        if how == RESET and not self.opposite.done:
            self.opposite.finish()

    def send_due(self) -> None:
        """Send what has arrived, as far as the destination takes it."""
        while self.due_bytes and not self.done:
            try:
                sent = self.destination.send(self.ring.head(self.due_bytes))
            except (BlockingIOError, InterruptedError):
                self._set_writing(True)
                return
            except OSError:
                # The destination is gone: nothing more can be delivered, and the source learns it over the line.
                self.opposite.source_ended(RESET)
                self.finish()
                return
            self.ring.drop(sent)
            self.due_bytes -= sent
            if self.ring_full:
                self.ring_full = False
                self.line.wait_for_turn(self)
        self._set_writing(False)
        if self.end is not None:
            self.finish()

    def finish(self) -> None:
        """Close what this half writes to; the connection is closed when both halves are finished."""
        if self.done:
            return
        self.done = True
        self._set_writing(False)
        if self.end == RESET:
            self._reset(self.destination)
            self.opposite.finish()
        elif self.end == END_OF_STREAM:
            with contextlib.suppress(OSError):
                self.destination.shutdown(socket.SHUT_WR)
        if self.opposite.done:
            for half in (self, self.opposite):
                half._close_source()

    def _close_source(self) -> None:
        self.reading = False
        if self.source.fileno() != -1:
            self.line.loop.remove_reader(self.source)
            self.source.close()

    def _reset(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def _set_writing(self, on: bool) -> None:
        if on and not self.writing:
            self.line.loop.add_writer(self.destination, self.send_due)
        elif self.writing and not on:
            self.line.loop.remove_writer(self.destination)
        self.writing = on


class Line:
    """All halves that cross the bottleneck in one direction."""

    def __init__(self, settings: WanSettings) -> None:
        self.loop = asyncio.get_running_loop()
        self._settings = settings
        self._bottleneck = Bottleneck(settings.bytes_per_s, settings.delay_s, settings.queue_bytes)
        self._waiting: deque[tuple[Half, float]] = deque()
        """Halves that have (or may have) bytes to read, each with the instant since when."""
        self._in_flight: deque[tuple[float, Half, int]] = deque()
        """(arrival, half, bytes or how it ended), in order of arrival: the delay is the same for all."""
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = 0.0

    def change(self, settings: WanSettings) -> None:
        self._settings = settings
        self._bottleneck.change(settings.bytes_per_s, settings.queue_bytes)

    def start(self, half: Half) -> None:
        if half.reading:
            self.loop.add_reader(half.source, self._readable, half)

    def wait_for_turn(self, half: Half) -> None:
        if half.reading:
            self.loop.remove_reader(half.source)
            self._waiting.append((half, time.monotonic()))
            self._arm(time.monotonic())

    def enter(self, half: Half, size: int, ready_s: float) -> None:
        self._in_flight.append((self._bottleneck.enter(ready_s, max(size, 0)), half, size))
        self._arm(time.monotonic())

    def _readable(self, half: Half) -> None:
        now = time.monotonic()
        if self._waiting or self._bottleneck.room_at() > now or not self._read(half, now):
            self.wait_for_turn(half)

    def _read(self, half: Half, ready_s: float) -> bool:
        """One turn. True: the source has no more for now and its reader is to be (or stay) set."""
        space = half.ring.free(self._settings.turn_bytes)
        if not space:
            half.ring_full = True
            self.loop.remove_reader(half.source)
            return True
        try:
            count = half.source.recv_into(space)
        except (BlockingIOError, InterruptedError):
            return True
        except OSError:
            half.source_ended(RESET)
            return True
        if count == 0:
            half.source_ended(END_OF_STREAM)
            return True
        if half.done:  # nobody takes it any more: read on so that the end is seen, keep nothing
            return count < len(space)
        half.ring.filled(count)
        self.enter(half, count, ready_s)
        return count < len(space)

    def _tick(self) -> None:
        self._timer = None
        now = time.monotonic()
        while self._waiting and self._bottleneck.room_at() <= now:
            half, since = self._waiting.popleft()
            if not half.reading:
                continue
            if not self._read(half, since):
                self._waiting.append((half, now))  # the rest was there by now at the latest
            elif half.reading and not half.ring_full:
                self.loop.add_reader(half.source, self._readable, half)
        while self._in_flight and self._in_flight[0][0] <= now + DUE_SLACK_S:
            _, half, size = self._in_flight.popleft()
            if size > 0:
                half.due_bytes += size
            else:
                half.end = size
            half.send_due()
        self._arm(now)

    def _arm(self, now: float) -> None:
        """One timer, for whatever comes next."""
        next_s = self._in_flight[0][0] if self._in_flight else float("inf")
        if self._waiting:
            next_s = min(next_s, self._bottleneck.room_at())
        if next_s == float("inf") or (self._timer is not None and self._timer_s <= next_s):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_s = next_s
        self._timer = self.loop.call_later(max(next_s - now, TURN_S), self._tick)


class Wan:
    """Both directions and all listeners."""

    def __init__(self, settings: WanSettings) -> None:
        self._settings = settings
        self._a_to_b = Line(settings)
        self._b_to_a = Line(settings)
        self._dials: set[asyncio.Task[None]] = set()
        self._listeners: list[socket.socket] = []
        self._told_exhausted = False

    def set_rate(self, bytes_per_s: float) -> None:
        """Of both directions, from now on."""
        self._settings = replace(self._settings, bytes_per_s=bytes_per_s)
        self._a_to_b.change(self._settings)
        self._b_to_a.change(self._settings)

    async def listen(self, host: str, port: int, target: tuple[str, int], *, backward: bool = False) -> int:
        """Forward connections to `target`; returns the port. Raises OSError when it can't be bound."""
        loop = asyncio.get_running_loop()
        family, kind, _, _, address = (await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))[0]
        listener = socket.socket(family, kind)
        listener.setblocking(False)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._settings.receive_buffer_bytes)
        try:
            listener.bind(address)
        except OSError:
            listener.close()
            raise
        listener.listen(256)
        lines = (self._b_to_a, self._a_to_b) if backward else (self._a_to_b, self._b_to_a)
        loop.add_reader(listener, self._accept, listener, target, lines)
        self._listeners.append(listener)
        return int(listener.getsockname()[1])

    def close(self) -> None:
        """Stop listening; connections end with the process."""
        for listener in self._listeners:
            asyncio.get_running_loop().remove_reader(listener)
            listener.close()
        for dial in self._dials:
            dial.cancel()

    def _accept(self, listener: socket.socket, target: tuple[str, int], lines: tuple[Line, Line]) -> None:
        try:
            client, reserved = _accept_with_reserve(listener)
        except OSError as error:  # else the client is gone already
            if error.errno in EXHAUSTED:
                # The listener stays readable: without a pause the loop would do nothing else.
                self._tell_exhausted(error)
                loop = asyncio.get_running_loop()
                loop.remove_reader(listener)
                loop.call_later(ACCEPT_AGAIN_S, self._accept_again, listener, target, lines)
            return
        dial = asyncio.ensure_future(self._dial(client, reserved, target, lines))
        self._dials.add(dial)
        dial.add_done_callback(self._dials.discard)

    def _accept_again(self, listener: socket.socket, target: tuple[str, int], lines: tuple[Line, Line]) -> None:
        if listener.fileno() != -1:
            asyncio.get_running_loop().add_reader(listener, self._accept, listener, target, lines)

    def _tell_exhausted(self, error: OSError) -> None:
        if not self._told_exhausted:
            self._told_exhausted = True
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            with contextlib.suppress(OSError):  # a full disk is no reason to carry nothing any more
                sys.stderr.write(
                    f"wan: {error.strerror}: connections wait until others end; each takes two of {limit} descriptors "
                    "(ulimit -n)\n"
                )
                sys.stderr.flush()

    async def _dial(
        self, client: socket.socket, reserved: int, target: tuple[str, int], lines: tuple[Line, Line]
    ) -> None:
        loop = asyncio.get_running_loop()
        delay_s = self._settings.delay_s
        accepted_s = time.monotonic()
        _prepare(client)
        await asyncio.sleep(delay_s)
        try:
            server = await _connect(target, reserved)
        except OSError:
            await asyncio.sleep(delay_s)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
            return
        out, back = lines
        to_server = Half(out, self._settings.ring_bytes, client, server)
        to_client = Half(back, self._settings.ring_bytes, server, client)
        to_server.opposite, to_client.opposite = to_client, to_server
        elapsed_s = time.monotonic() - accepted_s
        loop.call_later(max(0.0, 2 * delay_s - elapsed_s), out.start, to_server)
        loop.call_later(max(0.0, 3 * delay_s - elapsed_s), back.start, to_client)


def _accept_with_reserve(listener: socket.socket) -> tuple[socket.socket, int]:
    """A client, and a descriptor that is held for the connection to its target: a burst of clients that took all would
    leave none to serve any of them with."""
    reserved = os.dup(listener.fileno())
    try:
        return listener.accept()[0], reserved
    except OSError:
        os.close(reserved)
        raise


async def _connect(target: tuple[str, int], reserved: int) -> socket.socket:
    """The name is looked up each time: containers come and go."""
    loop = asyncio.get_running_loop()
    try:
        family, kind, _, _, address = (await loop.getaddrinfo(*target, type=socket.SOCK_STREAM))[0]
    finally:
        os.close(reserved)  # the socket takes its place
    sock = socket.socket(family, kind)
    sock.setblocking(False)
    try:
        await loop.sock_connect(sock, address)
    except BaseException:
        sock.close()
        raise
    _prepare(sock)
    return sock


def _prepare(sock: socket.socket) -> None:
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # The line is emulated here; a pacing congestion control underneath would be a second one.
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")


# -- the command ------------------------------------------------------------------------------------------------------

Forward = tuple[tuple[str, int], tuple[str, int]]


def _forward(text: str) -> Forward:
    listen, _, target = text.partition("=")
    try:
        return parse_address(listen), parse_address(target)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} must look like host:port=host:port ({error})") from None


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be above 0")
    return value


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must not be negative")
    return value


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(
        prog="python -m prfaas.services.wan.proxy", description="An emulated WAN: a TCP proxy with rate and delay."
    )
    arguments.add_argument(
        "--forward", type=_forward, action="append", default=[], metavar="LISTEN=TARGET", help="for clients on side A"
    )
    arguments.add_argument(
        "--backward", type=_forward, action="append", default=[], metavar="LISTEN=TARGET", help="for clients on side B"
    )
    arguments.add_argument("--rate-mbit", type=_positive, default=500.0, help="payload Mbit/s each way (500)")
    arguments.add_argument("--rate-file", metavar="FILE", help="holds it instead; read again at SIGHUP")
    arguments.add_argument("--delay-ms", type=_not_negative, default=20.0, help="one-way delay (20)")
    arguments.add_argument("--queue-ms", type=_not_negative, default=20.0, help="the bottleneck's queue (20)")
    return arguments


def read_rate(file: str) -> float:
    """Bytes/s from a file that holds Mbit/s. Raises OSError, ValueError."""
    try:
        return _positive(Path(file).read_text(encoding="utf-8").strip()) * 1e6 / 8
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise ValueError(f"{file} must hold a rate in Mbit/s: {error}") from None


def _change_rate(wan: Wan, file: str) -> None:
    try:
        bytes_per_s = read_rate(file)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"wan: the rate stays: {error}\n")
        return
    wan.set_rate(bytes_per_s)
    _say("RATE", {"mbit": bytes_per_s * 8 / 1e6})


def _say(word: str, what: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # on a full disk it carries on
        sys.stdout.write(f"{word} {json.dumps(what)}\n")
        sys.stdout.flush()


async def run(
    settings: WanSettings, forward: Sequence[Forward], backward: Sequence[Forward], rate_file: str | None = None
) -> None:
    """Until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    wan = Wan(settings)
    if rate_file is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, _change_rate, wan, rate_file)
    ports = [await wan.listen(*listen, target) for listen, target in forward]
    ports += [await wan.listen(*listen, target, backward=True) for listen, target in backward]
    _say("READY", {"ports": ports})
    await stop.wait()
    wan.close()


def main(argv: Sequence[str] | None = None) -> int:
    given = parser().parse_args(argv)
    if not given.forward and not given.backward:
        parser().error("nothing to forward: give --forward or --backward")
    try:
        rate = given.rate_mbit * 1e6 / 8 if given.rate_file is None else read_rate(given.rate_file)
        settings = WanSettings(rate, given.delay_ms / 1e3, given.queue_ms / 1e3)
        uvloop.run(run(settings, given.forward, given.backward, given.rate_file))
    except (OSError, ValueError) as error:
        sys.stderr.write(f"wan: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
