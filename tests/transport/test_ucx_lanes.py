"""A UCX lane by itself, both ends in this process: bytes, closing, strangers, and what stands in the way of a lane."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
from prfaas.common.config import TransportConfig
from prfaas.common.errors import ConfigError
from prfaas.transport.lanes.api import Lane, LaneHandler
from prfaas.transport.lanes.ucx import UcxBackend, make_ucx_backend
from prfaas.transport.lanes.ucx_binding import ucx_problem
from prfaas.transport.lanes.ucx_wire import CHALLENGE_BYTES, MESSAGE_BYTES, WINDOW_MESSAGES, encode_challenge

needs_ucx = pytest.mark.skipif(ucx_problem() is not None, reason=str(ucx_problem()))
SECRET = b"the secret"
SOON_S = 10.0


class Reader:
    """A `LaneHandler` that keeps what it reads, in buffers of a size that fits nothing."""

    def __init__(self) -> None:
        self.received = bytearray()
        self.lost_with: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self.open = asyncio.Event()
        self.is_writable = asyncio.Event()
        self._buffer = bytearray(300_001)

    def connected(self, lane: Lane) -> None:
        self.lane = lane
        self.open.set()

    def next_buffer(self) -> memoryview:
        return memoryview(self._buffer)

    def advance(self, received_bytes: int) -> None:
        self.received += self._buffer[:received_bytes]

    def writable(self) -> None:
        self.is_writable.set()

    def lost(self, error: Exception | None) -> None:
        self.lost_with.set_result(error)


def backend(secret: bytes = SECRET, **settings: object) -> UcxBackend:
    return make_ucx_backend(TransportConfig(**settings), secret)  # type: ignore[arg-type]


@asynccontextmanager
async def listening(made: UcxBackend) -> AsyncIterator[tuple[int, list[Reader]]]:
    """(port, the handlers of what was accepted)."""
    accepted: list[Reader] = []

    def accept() -> LaneHandler:
        accepted.append(Reader())
        return accepted[-1]

    listener = await made.listen("127.0.0.1", 0, accept)
    try:
        async with asyncio.timeout(3 * SOON_S):
            yield listener.address[1], accepted
    finally:
        await listener.aclose()


@asynccontextmanager
async def lane_between(made: UcxBackend, dialling: UcxBackend | None = None) -> AsyncIterator[tuple[Reader, Reader]]:
    """(the dialling end, the accepting end)."""
    async with listening(made) as (port, accepted):
        near = Reader()
        await (dialling or made).dial("127.0.0.1", port, near)
        while not accepted:
            await asyncio.sleep(0)
        far = accepted[0]
        yield near, far
        for end in (near, far):
            end.lane.abort()
            await end.lost_with


def test_without_ucx_the_mend_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """ConfigError with the key and the command that installs it; no import is tried before."""
    for name in ("ucxx", "ucp"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"transport\.backend = ucx: .*pip install"):
        make_ucx_backend(TransportConfig())


@needs_ucx
async def test_bytes_in_order_both_ways_at_once() -> None:
    """More than the window, in writes of every size; then the lane closes in order at both ends."""
    async with lane_between(backend()) as (near, far):
        rng = random.Random(1)
        content = [rng.randbytes(size) for size in (1, 15, MESSAGE_BYTES, 5, 3 * MESSAGE_BYTES + 7, 4096, 10_000_000)]
        for end in (near, far):
            end.lane.write(content)
        await near.is_writable.wait()
        assert near.lane.unsent_bytes == 0
        near.lane.close()
        assert await near.lost_with is None
        assert await far.lost_with is None
        assert far.received == b"".join(content)
        assert b"".join(content).startswith(near.received)


@needs_ucx
async def test_what_was_sent_before_the_close_arrives_after_it() -> None:
    """The spine's END overtakes the last message: the end is told when that has come as well."""
    made = backend()
    async with lane_between(made, backend()) as (near, far):
        stuck = threading.Event()
        thread = await made.retain_thread()
        thread._do(stuck.wait)
        near.lane.write([b"last words"])
        near.lane.close()
        assert await near.lost_with is None
        while far.lane._peer_sent is None:  # type: ignore[attr-defined]
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert far.received == b""
        stuck.set()
        assert await far.lost_with is None
        assert far.received == b"last words"
        thread.release()


@needs_ucx
async def test_a_lane_that_is_aborted_drops_what_is_unsent() -> None:
    """`lost` follows, no buffer is held, and writing is a no-op from then on; the other end gets an error."""
    async with lane_between(backend()) as (near, far):
        near.lane.write([bytes((WINDOW_MESSAGES + 2) * MESSAGE_BYTES)])
        assert near.lane.unsent_bytes == 2 * MESSAGE_BYTES
        near.lane.abort()
        assert near.lane.unsent_bytes == 0
        assert await near.lost_with is None
        near.lane.write([b"late"])
        assert near.lane.unsent_bytes == 0
        assert isinstance(await far.lost_with, ConnectionError)


@needs_ucx
async def test_another_secret_is_refused_before_ucx_sees_anything() -> None:
    """By whoever finds out first; the listener accepts the next one."""
    made = backend()
    async with listening(made) as (port, accepted):
        with pytest.raises(ConnectionError):
            await backend(b"another").dial("127.0.0.1", port, Reader())
        near = Reader()
        await made.dial("127.0.0.1", port, near)
        near.lane.close()
        assert await near.lost_with is None
        assert len(accepted) == 1


@needs_ucx
@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\nhost: localhost\r\naccept: everything\r\n\r\n" * 2, bytes(1 << 20)]
)
async def test_a_stranger_is_closed(garbage: bytes) -> None:
    """Whatever it says; the process lives, no handler is made for it, and the next lane opens."""
    made = backend()
    async with listening(made) as (port, accepted):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert len(await reader.readexactly(CHALLENGE_BYTES)) == CHALLENGE_BYTES
        writer.write(garbage)
        with suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()
        assert accepted == []
        near = Reader()
        await made.dial("127.0.0.1", port, near)
        near.lane.close()
        await near.lost_with


@needs_ucx
async def test_a_port_that_says_nothing_more() -> None:
    """A dial ends by transport.open_timeout_s, and the connection is closed."""
    closed = asyncio.get_running_loop().create_future()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(encode_challenge(bytes(16)))
        try:
            while await reader.read(4096):
                pass
        except ConnectionError:
            pass
        writer.close()
        closed.set_result(None)

    async with await asyncio.start_server(accept, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(TimeoutError):
            await backend(open_timeout_s=0.3).dial("127.0.0.1", port, Reader())
        async with asyncio.timeout(SOON_S):
            await closed


@needs_ucx
async def test_nobody_listens() -> None:
    """OSError, as from TCP."""
    made = backend()
    async with listening(made) as (port, _):
        pass
    with pytest.raises(OSError):
        await made.dial("127.0.0.1", port, Reader())


@needs_ucx
async def test_a_call_of_ucx_that_does_not_return() -> None:
    """Its lanes are lost by the deadline, on a loop that goes on; the listener takes no harm."""
    made = backend(dead_s=1.0)
    async with lane_between(made) as (near, far):
        stuck = threading.Event()
        thread = await made.retain_thread()
        thread._do(stuck.wait)
        for end in (near, far):
            assert isinstance(await asyncio.shield(end.lost_with), TimeoutError)
        stuck.set()
        thread.release()


STUCK = """
import asyncio, time
from tests.transport.test_ucx_lanes import backend, lane_between

async def main():
    made = backend()
    async with lane_between(made):
        (await made.retain_thread())._do(time.sleep, 3600)
        print("stuck", flush=True)

asyncio.run(main())
"""


@needs_ucx
def test_a_process_whose_ucx_is_stuck_ends_all_the_same() -> None:
    """With the lanes closed as usual, and a line that says what was left behind."""
    done = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("stuck\n")
    assert "the UCX thread does not end" in done.stdout + done.stderr
    assert done.returncode == 0
