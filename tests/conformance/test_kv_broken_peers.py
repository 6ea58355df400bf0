"""What others may do to a live KV port: garbage, replays, broken frames on lanes that were good, peers that stop.

Each is closed or refused with its reason in our own log, and costs only the transfers that can't go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest
import structlog
from prfaas.common.config import TransportConfig
from prfaas.common.errors import NoRoomError, PeerRefusedError, PrfaasError, TransferError
from prfaas.transport import channel as channel_module
from prfaas.transport import endpoint, sending
from prfaas.transport.api import KvAddress, KvPiece, KvSender
from prfaas.transport.frames import (
    FROM_RECEIVER,
    Ack,
    FrameHeader,
    FrameType,
    Opened,
    Ping,
    SignedHello,
    encode_control,
    parse_body,
    parse_hello,
)
from prfaas.transport.handshake import signed
from prfaas.transport.lanes.tcp import TcpBackend
from prfaas.transport.ticket import TicketBook

from tests.conformance.kv_harness import (
    SECRET,
    SOON_S,
    FaultyBackend,
    Pair,
    RawLane,
    Transfer,
    chunk_frame,
    control_frame,
    dense,
    hello_body,
    open_body,
    pair,
    spec_of,
)

DEEP = b"\x81\xa1x" + b"\x91" * 3000
"""msgpack: under a key that nobody knows, lists in lists."""


@pytest.fixture
def kind() -> str:
    """There is a port to write to over TCP only."""
    return "tcp"


def closed_with(logs: list[dict[str, object]], reason: str) -> bool:
    return any(e["event"] == "kv lane closed" and reason in str(e["reason"]) for e in logs)


# -- before HELLO -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + b"." * 40, "not a PrfaaS frame"),
        (control_frame(FrameType.HELLO, b".", version=77), "version 77"),
        (control_frame(FrameType.LINK, b"."), "reserved"),
        (control_frame(FrameType.HELLO, b".", body_bytes=1 << 31), "the limit is"),
        (chunk_frame(b"." * 64), "not legal before HELLO"),
        (encode_control(Ping(1.0)), "not legal before HELLO"),
        (control_frame(FrameType.HELLO, b"\xc1" * 8), "HELLO"),
        (control_frame(FrameType.HELLO, DEEP), "HELLO: maximum recursion"),
    ],
    ids=["http", "version", "reserved", "oversized", "chunk-first", "ping-first", "not-msgpack", "nested"],
)
async def test_garbage_is_logged_with_its_reason_and_disturbs_nobody(data: bytes, reason: str) -> None:
    """A stranger writes to the port while a transfer is running; the transfer completes with the same bytes."""
    async with pair(TcpBackend, dense()) as p:
        transfer = p.offer(spec_of(p.layout))
        await transfer.sender.open()
        with structlog.testing.capture_logs() as logs:
            raw = await RawLane.connect(p.far.addresses[0])
            raw.writer.write(data)
            transfer.put_all()
            await raw.until_closed()
            await raw.aclose()
            await transfer.complete()
        assert closed_with(logs, reason), logs


async def test_half_a_header_and_silence_holds_nothing() -> None:
    """The stranger is closed in time; no transfer notices."""
    async with pair(TcpBackend, dense(), open_timeout_s=0.2) as p:
        with structlog.testing.capture_logs() as logs:
            raw = await RawLane.connect(p.far.addresses[0])
            raw.writer.write(chunk_frame(b"." * 64)[:10])
            await p.send()
            await raw.until_closed()
            await raw.aclose()
        assert closed_with(logs, "no HELLO in time"), logs


async def test_strangers_that_were_refused_are_few_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are told why and have time to read it, in which they may send on; more of them close the oldest at once."""
    monkeypatch.setattr(endpoint, "MAX_GREETING_LANES", 2)
    async with pair(TcpBackend, dense()) as p, contextlib.AsyncExitStack() as stack:
        await p.send()
        for _ in range(4):
            raw = await RawLane.connect(p.far.addresses[0])
            stack.push_async_callback(raw.aclose)
            raw.writer.write(encode_control(signed(hello_body("0" * 32), b"another secret")))
            assert (await raw.until(FrameType.ERROR)).code == "hello_refused"
            raw.writer.write(bytes(1 << 20))
            assert 1 <= len(p.far._greeting) <= 2
        await p.send(seed=1)


async def test_strangers_that_say_nothing_are_few_and_keep_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the bound each new one costs the oldest its socket; a node that says HELLO gets in beside them."""
    monkeypatch.setattr(endpoint, "MAX_GREETING_LANES", 2)
    async with pair(TcpBackend, dense(), open_timeout_s=60.0, lanes=1) as p:
        await p.send()
        with structlog.testing.capture_logs() as logs:
            silent = [await RawLane.connect(p.far.addresses[0]) for _ in range(5)]
            for raw in silent[:3]:
                await raw.until_closed()
            late = await RawLane.dial(p.far.addresses[0])
            await silent[3].until_closed()
        assert closed_with(logs, "too many lanes"), logs
        await p.send(seed=1)
        for raw in (*silent, late):
            await raw.aclose()


async def test_a_replayed_hello_is_refused() -> None:
    """The recorded bytes of a HELLO that was good, from a new connection, while the first session goes on."""
    async with pair(TcpBackend, dense()) as p:
        good = await RawLane.dial(p.far.addresses[0])
        transfer = p.offer(spec_of(p.layout))
        await transfer.sender.open()
        with structlog.testing.capture_logs() as logs:
            replay = await RawLane.connect(p.far.addresses[0])
            replay.writer.write(good.hello)
            error = await replay.until(FrameType.ERROR)
            await replay.until_closed()
        assert error.code == "hello_refused"
        assert "replay" in error.detail
        assert closed_with(logs, "replay"), logs
        transfer.put_all()
        await transfer.complete()
        good.writer.write(encode_control(Ping(1.0)))
        await good.until(FrameType.PONG)
        await replay.aclose()
        await good.aclose()


# -- on a lane that was good ------------------------------------------------------------------------------------------


@asynccontextmanager
async def raw_session(p: Pair) -> AsyncIterator[tuple[RawLane, RawLane, Transfer]]:
    """Two lanes of one session by hand, and a transfer that is open on it as number 1."""
    session = secrets.token_hex(16)
    lanes = [await RawLane.dial(p.far.addresses[0], session=session, lane=i) for i in range(2)]
    transfer = p.offer(spec_of(p.layout, (0, 100)))
    lanes[0].writer.write(encode_control(open_body(transfer), 1))
    assert (await lanes[0].until(FrameType.OPENED)).credit_bytes > 0
    try:
        yield lanes[0], lanes[1], transfer
    finally:
        await transfer.receiver.aclose()
        for lane in lanes:
            await lane.aclose()


PING = msgspec.msgpack.encode(Ping(1.0))
BROKEN = {
    "magic": (control_frame(FrameType.PING, PING, magic=0x4142), "not a PrfaaS frame"),
    "version": (control_frame(FrameType.PING, PING, version=9), "frame version 9"),
    "unknown-type": (control_frame(99, PING), "frame type 99"),
    "reserved-type": (control_frame(FrameType.LINK, PING), "reserved"),
    "second-hello": (control_frame(FrameType.HELLO, hello_body("0" * 32)), "HELLO is not legal open"),
    "credit-from-the-sender": (control_frame(FrameType.CREDIT, {"granted_bytes": 1}, transfer=1), "direction"),
    "chunk-from-the-receiver": (chunk_frame(b"." * 64, flags=FROM_RECEIVER), "direction"),
    "oversized-control": (control_frame(FrameType.PING, PING, body_bytes=1 << 20), "the limit is"),
    "oversized-chunk": (chunk_frame(b".", body_bytes=1 << 30, raw_bytes=1 << 30), "the limit is"),
    "bomb": (chunk_frame(b"." * 64, codec=2, raw_bytes=1 << 31), "decoded bytes"),
    "longer-than-decoded": (chunk_frame(b"." * 64, codec=2, raw_bytes=32), "on the wire"),
    "no-body": (control_frame(FrameType.PING, b""), "without a body"),
    "not-msgpack": (control_frame(FrameType.PING, b"\xc1" * 8), "PING"),
    "nested": (control_frame(FrameType.PING, DEEP), "PING: maximum recursion"),
    "unknown-transfer": (chunk_frame(b"." * 64, transfer=77), "never opened"),
    "transfer-0": (chunk_frame(b"." * 64, transfer=0), "never opened"),
    "truncated-header": (chunk_frame(b"." * 64)[:20], "in the middle of a frame: 20 of a header"),
    "truncated-control": (control_frame(FrameType.PING, PING)[:-1], "in the middle of a frame: PING with"),
}


@pytest.mark.parametrize("case", BROKEN)
async def test_a_broken_frame_closes_its_lane_only(case: str) -> None:
    """Transfers go on: one of the same session over its other lane, and one of another session."""
    data, reason = BROKEN[case]
    async with pair(TcpBackend, dense(1)) as p, raw_session(p) as (good, bad, transfer):
        beside = p.offer(spec_of(p.layout), seed=1)
        await beside.sender.open()
        with structlog.testing.capture_logs() as logs:
            bad.writer.write(data)
            if case.startswith("truncated"):
                bad.writer.write_eof()
            await bad.until_closed()
            beside.put_all()
            await beside.complete()
            await good.send_all(transfer)
            await transfer.receiver.finished()
        assert transfer.destination.rows == transfer.source
        assert closed_with(logs, reason), logs


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"offset_bytes": 12800 - 32}, "outside"),
        ({"row": 2}, "outside"),
        ({"tensor": 5}, "not in the layout"),
        ({"layer": 9}, "not in the layout"),
        ({"offset_bytes": (1 << 64) - 1}, "outside"),
        ({"codec": 9}, "unknown codec"),
    ],
)
async def test_a_chunk_out_of_place_fails_its_transfer_and_its_lane(changes: dict[str, int], reason: str) -> None:
    """No byte is written, the decode side hears at once, and everything else goes on."""
    async with pair(TcpBackend, dense(1)) as p, raw_session(p) as (good, bad, transfer):
        before = {key: bytes(row) for key, row in transfer.destination.rows.items()}
        second = p.offer(spec_of(p.layout, (0, 100)), seed=2)
        good.writer.write(encode_control(open_body(second), 2))
        await good.until(FrameType.OPENED)
        with structlog.testing.capture_logs() as logs:
            bad.writer.write(chunk_frame(b"." * 64, **changes))
            with pytest.raises(TransferError, match=reason):
                async with asyncio.timeout(SOON_S):
                    await transfer.receiver.finished()
            await bad.until_closed()
        assert len(transfer.errors) == 1
        assert closed_with(logs, reason), logs
        await good.send_all(second, number=2)
        await second.receiver.finished()
        assert second.destination.rows == second.source
        assert transfer.destination.rows == before
        await second.receiver.aclose()
        await p.send()


async def test_more_than_was_granted_fails_the_transfer() -> None:
    """The receiver itself holds the bound on what a sender may have in flight: here two chunks that have begun."""
    async with pair(TcpBackend, dense(1)) as p, raw_session(p) as (good, bad, _transfer):
        greedy = p.offer(spec_of(p.layout, (0, 300)))
        good.writer.write(encode_control(open_body(greedy), 2))
        await good.until(FrameType.OPENED)
        for row, lane in enumerate((good, bad)):
            begun = chunk_frame(greedy.source[0, 0, row], (0, 0, row, 0), transfer=2)[:-1]
            lane.writer.write(begun)
        async with asyncio.timeout(SOON_S):
            with pytest.raises(TransferError, match="76800 bytes sent, 65536 were granted"):
                await greedy.receiver.finished()
        await greedy.receiver.aclose()


@pytest.mark.parametrize(
    ("more", "known"),
    [({}, ""), ({"traceparent": "00-abc"}, "00-abc"), ({"traceparent": "x" * 65}, ""), ({"of_a_later_version": 1}, "")],
)
async def test_open_may_carry_a_traces_context_and_what_only_later_versions_know(
    more: dict[str, object], known: str
) -> None:
    """An earlier version sends none of it, a later one more; what is too long to be a context is passed over."""
    async with pair(TcpBackend, dense(1)) as p, raw_session(p) as (good, _bad, _transfer):
        transfer = p.offer(spec_of(p.layout, (0, 100)), seed=2)
        body = msgspec.to_builtins(open_body(transfer)) | more
        good.writer.write(control_frame(FrameType.OPEN, body, transfer=2))
        assert (await good.until(FrameType.OPENED)).credit_bytes > 0
        await good.send_all(transfer, number=2)
        assert (await transfer.receiver.finished()).traceparent == known
        assert transfer.destination.rows == transfer.source
        await transfer.receiver.aclose()


async def test_one_number_is_one_transfer() -> None:
    """OPEN can't give a transfer's number to another, nor a transfer a second number: memory would be found by chunks
    after its owner has closed the transfer."""
    async with pair(TcpBackend, dense(1)) as p, raw_session(p) as (good, bad, transfer):
        other = p.offer(spec_of(p.layout, (0, 100)), seed=3, room=False)
        good.writer.write(encode_control(open_body(other), 2))
        assert (await good.until(FrameType.OPENED)).no_room
        other.room = True
        good.writer.write(encode_control(open_body(other), 3))
        assert "open already" in (await good.until(FrameType.OPENED)).refused
        bad.writer.write(encode_control(open_body(other, attempt=9), 1))
        await bad.until_closed()
        good.writer.write(encode_control(open_body(other, attempt=2), 2))
        assert (await good.until(FrameType.OPENED)).credit_bytes
        await good.send_all(transfer, number=1)
        await good.send_all(other, number=2)
        await other.receiver.finished()
        assert (transfer.destination.rows, other.destination.rows) == (transfer.source, other.source)
        await other.receiver.aclose()


async def test_a_sessions_id_does_not_make_a_ticket_anothers() -> None:
    """Another node of the cluster names its session as the one that presented the ticket first (the id is readable on
    the wire): it is refused, and the memory that comes later is the first one's."""
    async with pair(TcpBackend, dense(1)) as p:
        session = secrets.token_hex(16)
        first = await RawLane.dial(p.far.addresses[0], session=session)
        thief = await RawLane.dial(p.far.addresses[0], session=session, node="thief")
        transfer = p.offer(spec_of(p.layout, (0, 100)), room=False)
        first.writer.write(encode_control(open_body(transfer), 1))
        assert (await first.until(FrameType.OPENED)).no_room
        transfer.room = True
        thief.writer.write(encode_control(open_body(transfer, attempt=2), 1))
        assert "another session" in (await thief.until(FrameType.OPENED)).refused
        first.writer.write(encode_control(open_body(transfer, attempt=2), 1))
        assert (await first.until(FrameType.OPENED)).credit_bytes
        await first.send_all(transfer)
        assert transfer.destination.rows == transfer.source
        await transfer.receiver.aclose()
        for lane in (first, thief):
            await lane.aclose()


async def test_an_open_that_does_not_fit_tells_the_decode_side() -> None:
    """Another dtype: refused, and the receiver fails at once instead of waiting for a sender that can't come."""
    async with pair(TcpBackend, dense(1)) as p:
        raw = await RawLane.dial(p.far.addresses[0])
        transfer = p.offer(spec_of(p.layout))
        raw.writer.write(encode_control(open_body(transfer, dtypes={"key": "int8"}), 1))
        assert "engine.dtype" in (await raw.until(FrameType.OPENED)).refused
        with pytest.raises(TransferError, match=r"engine\.dtype"):
            async with asyncio.timeout(SOON_S):
                await transfer.receiver.finished()
        await raw.aclose()


async def test_a_lane_closed_for_a_broken_frame_is_dialled_again() -> None:
    """A PING is garbled on its way: both sides drop that lane, an open transfer goes on, and the lane comes back."""
    faults: list[FaultyBackend] = []

    def faulty(config: TransportConfig) -> FaultyBackend:
        faults.append(FaultyBackend(TcpBackend(config)))
        return faults[0]

    async with pair(faulty, dense(), ping_s=0.05) as p:
        await p.send()
        transfer = p.offer(spec_of(p.layout))
        await transfer.sender.open()
        before = len(faults[0].lanes)
        garbled, back = asyncio.Event(), asyncio.Event()

        def garble(header: FrameHeader) -> bool:
            first = header.type == FrameType.PING and not garbled.is_set()
            if first:
                garbled.set()
            return first

        def connected() -> None:
            if len(faults[0].lanes) >= before + 2:
                back.set()

        faults[0].garble, faults[0].on_connected = garble, connected
        with structlog.testing.capture_logs() as logs:
            async with asyncio.timeout(SOON_S):
                await garbled.wait()
                await back.wait()
        assert closed_with(logs, "header was damaged"), logs
        transfer.put_all()
        await transfer.complete()
        await p.send(seed=1)


async def test_both_directions_work_after_the_session_was_lost() -> None:
    """The numbers and answers of the old session mean nothing in the new one."""
    faults: list[FaultyBackend] = []

    def faulty(config: TransportConfig) -> FaultyBackend:
        faults.append(FaultyBackend(TcpBackend(config)))
        return faults[0]

    async with pair(faulty, dense(), open_timeout_s=2.0) as p:
        await p.send()
        await p.send_back()
        lanes, back = list(faults[0].lanes), asyncio.Event()

        def connected() -> None:
            if len(faults[0].lanes) == 2 * len(lanes):
                back.set()

        faults[0].on_connected = connected
        for handler in lanes:
            handler.lane.abort()
        async with asyncio.timeout(SOON_S):
            await back.wait()
        await p.send(seed=1)
        await p.send_back(seed=1)


# -- peers that stop --------------------------------------------------------------------------------------------------


class StoppingReceiver:
    """Answers HELLO and OPEN like a decode node, reads the first CHUNK's header, and then nothing until told to."""

    def __init__(self, answer: Opened | None = None) -> None:
        self.answer = answer or Opened(1, credit_bytes=64 << 20)
        self.chunk_begun = asyncio.Event()
        self.read_on = asyncio.Event()
        self.lanes = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.lanes += 1
        lane = RawLane(reader, writer)
        try:
            while True:
                header = await lane.header()
                if header.type == FrameType.CHUNK:
                    self.chunk_begun.set()
                    await self.read_on.wait()
                    left = header.body_bytes
                    while left:
                        left -= len(await reader.read(min(left, 16 << 10)))
                        await asyncio.sleep(0.01)  # a slow link, not a stopped one
                    ack = control_frame(FrameType.ACK, Ack([header.sequence]), transfer=1, flags=FROM_RECEIVER)
                    writer.write(ack)
                    continue
                body = parse_body(header, await reader.readexactly(header.body_bytes))
                if isinstance(body, SignedHello):
                    hello = parse_hello(body.hello)
                    answer = hello_body(hello.session, hello.lane, hello.lanes, answer=True)
                    writer.write(encode_control(signed(answer, SECRET, hello.nonce)))
                elif header.type == FrameType.OPEN:
                    writer.write(encode_control(self.answer, header.transfer, FROM_RECEIVER))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (Opened(1), PeerRefusedError, "with 0 bytes of credit"),
        (Opened(1, credit_bytes=2), PeerRefusedError, "with 2 bytes of credit"),
        (Opened(1, no_room=True, retry_after_s=math.nan), NoRoomError, "no room"),
        (Opened(1, no_room=True, retry_after_s=1e300), NoRoomError, "no room"),
        (Opened(1, no_room=True, retry_after_s=-1.0), NoRoomError, "no room"),
    ],
)
async def test_a_senseless_answer_to_open_parks_no_prefill(
    answer: Opened, error: type[PrfaasError], words: str
) -> None:
    """No credit, hardly any, or a time that nobody means: the sender hears of it at once, and may wait a few seconds
    at most."""
    peer = StoppingReceiver(answer)
    server = await asyncio.start_server(peer.serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    async with pair(TcpBackend, dense(1), lanes=1) as p:
        ticket = TicketBook(b"k" * 32, "raw").issue(spec_of(p.layout, (0, 10)), 0.0)
        sender = p.near.sender(ticket, "raw", [KvAddress(host, port)])
        with pytest.raises(error, match=words) as caught:
            await asyncio.wait_for(sender.open(), SOON_S)
        if isinstance(caught.value, NoRoomError):
            assert 0 <= caught.value.retry_after_s <= sending.MAX_RETRY_AFTER_S
        await sender.aclose()
    server.close()


@asynccontextmanager
async def half_sent(p: Pair) -> AsyncIterator[tuple[StoppingReceiver, KvSender]]:
    """A transfer of 16 MB whose receiver has stopped in the middle of the first chunk."""
    peer = StoppingReceiver()
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)  # else the kernel takes the whole chunk
    listener.bind(("127.0.0.1", 0))
    server = await asyncio.start_server(peer.serve, sock=listener, limit=4096)
    host, port = listener.getsockname()
    spec = spec_of(p.layout, (0, 32000))
    ticket = TicketBook(b"k" * 32, "raw").issue(spec, 0.0)
    sender = p.near.sender(ticket, "raw", [KvAddress(host, port)])
    data = memoryview(bytes(32000 * 128))
    try:
        await sender.open()
        sender.put([KvPiece(0, tensor, row, 0, data) for tensor in range(2) for row in range(2)])
        async with asyncio.timeout(SOON_S):
            await peer.chunk_begun.wait()
        yield peer, sender
    finally:
        peer.read_on.set()
        await sender.aclose()
        server.close()


async def test_a_cancel_does_not_wait_for_a_peer_that_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine gets its memory back although the started chunk can't be flushed; the lane is given up and dialled
    again, other sessions go on. `dead_s` alone would hold the memory for a minute."""
    monkeypatch.setattr(sending, "STALLED_S", 0.1)
    async with (
        pair(TcpBackend, dense(1), lanes=1, chunk_bytes=4 << 20, socket_buffer_bytes=65536, dead_s=60) as p,
        half_sent(p) as (_peer, sender),
    ):
        with structlog.testing.capture_logs() as logs:
            async with asyncio.timeout(SOON_S):
                await sender.aclose("the client went away")
        assert any(e["event"] == "kv lane lost" and "took no byte" in e["reason"] for e in logs), logs
        await p.send()


async def test_a_cancel_leaves_a_slow_lane_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as bytes move the started chunk is finished, however long it takes: a cancel costs no lane."""
    async with (
        pair(TcpBackend, dense(1), lanes=1, chunk_bytes=2 << 20, socket_buffer_bytes=65536, dead_s=60) as p,
        half_sent(p) as (peer, sender),
    ):
        monkeypatch.setattr(sending, "STALLED_S", 0.5)  # the chunk takes over a second
        peer.read_on.set()
        async with asyncio.timeout(SOON_S):
            await sender.aclose()
        assert sender.report.raw_bytes >= 2 << 20
        assert peer.lanes == 1


async def test_a_peer_that_makes_us_answer_and_reads_nothing_fills_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """PINGs without end whose PONGs are never read: the lane is closed at a bound."""
    monkeypatch.setattr(channel_module, "MAX_QUEUED_BYTES", 100_000)
    async with pair(TcpBackend, dense(1), socket_buffer_bytes=65536) as p:
        raw = await RawLane.dial(p.far.addresses[0])
        ping = encode_control(Ping(1.0)) * 100
        with structlog.testing.capture_logs() as logs:
            async with asyncio.timeout(SOON_S):
                with contextlib.suppress(ConnectionError):
                    await raw.flood(ping)
            await raw.aclose()
        assert closed_with(logs, "does not read"), logs
        await p.send()


# -- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bind", ["[::1]:0", "localhost:0"])
async def test_other_names_of_this_machine(bind: str) -> None:
    """IPv6, and a name instead of an address."""
    async with pair(TcpBackend, dense(), bind=bind) as p:
        await p.send()
        transfer = p.offer(spec_of(p.layout))
        if bind.startswith("localhost"):
            by_name = [KvAddress("localhost", p.far.addresses[0].port)]
            transfer.sender = p.near.sender(transfer.ticket, "far", by_name)
        await transfer.sender.open()
        transfer.put_all()
        await transfer.complete()


@pytest.mark.parametrize("address", [KvAddress("127.0.0.1", 99999), KvAddress("x" * 70 + ".invalid", 9)])
async def test_a_malformed_address_does_not_end_the_dialling(address: KvAddress) -> None:
    """What makes the resolver itself raise is logged; the next heartbeat brings the right address."""
    async with pair(TcpBackend, dense()) as p:
        third = p.endpoint("third", lanes=1)
        with structlog.testing.capture_logs() as logs:
            third.connect("far", [address])
            async with asyncio.timeout(SOON_S):
                while not logs:
                    await asyncio.sleep(0.01)
        assert logs[0]["event"] == "kv lane could not be opened; trying again"
        third.connect("far", p.far.addresses)
        transfer = p.offer(spec_of(p.layout))
        transfer.sender = third.sender(transfer.ticket, "far", [])
        async with asyncio.timeout(SOON_S):
            await transfer.sender.open()
        transfer.put_all()
        await transfer.complete()
        await third.aclose()


async def test_a_wrong_model_is_refused_by_the_dialler_too() -> None:
    """The answer to HELLO is checked as HELLO is."""
    async with pair(TcpBackend, dense()) as p:

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            lane = RawLane(reader, writer)
            hello = await lane.until(FrameType.HELLO)
            answer = hello_body(hello.session, hello.lane, hello.lanes, answer=True)
            writer.write(encode_control(signed(answer, b"wrong", hello.nonce)))
            await lane.until_closed()
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        transfer = p.offer(spec_of(p.layout))
        sender = p.near.sender(transfer.ticket, "impostor", [KvAddress(*server.sockets[0].getsockname()[:2])])
        with pytest.raises(PeerRefusedError, match="secret"):
            async with asyncio.timeout(SOON_S):
                await sender.open()
        await sender.aclose()
        await transfer.receiver.aclose()
        server.close()
        await p.send()
