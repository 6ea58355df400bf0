"""What is fuzzed, and what must hold of it: no exception but ours, no more memory than the bounds, and the same events
however the bytes are cut.

Each target takes `HostileFrames` and raises AssertionError, or whatever the code under test raises that it may not.
"""

from __future__ import annotations

import builtins
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from prfaas.common.auth import NonceWindow, sign
from prfaas.common.errors import ChecksumError, PeerRefusedError, ProtocolError, TicketError
from prfaas.common.kv_layout import KvLayout, LayerLayout, TensorKind, TensorLayout, TokenRange
from prfaas.transport import connection, frames
from prfaas.transport.api import TransferSpec
from prfaas.transport.connection import SINK_BYTES, ChunkArrived, Control, LaneConnection, LaneState
from prfaas.transport.frames import HEADER, HEADER_BYTES, FrameHeader, FrameType, SignedHello
from prfaas.transport.handshake import check_hello
from prfaas.transport.ticket import TicketBook, read_claims
from prfaas.transport.transfer import Placement, ReceivingTransfer

from tests.fuzz import hostile_frames
from tests.fuzz.hostile_frames import HostileFrames

KEY_AND_VALUE = tuple(TensorLayout(kind, "bfloat16", 2, (4,)) for kind in (TensorKind.KEY, TensorKind.VALUE))
STATE = TensorLayout(TensorKind.RECURRENT, "float32", 1, (10, 3))
LAYOUT = KvLayout((LayerLayout(KEY_AND_VALUE), LayerLayout(()), LayerLayout((STATE,))))
SPEC = TransferSpec("0" * 32, "r", TokenRange(3, 40), 41, 1, "f", LAYOUT.layout_hash)
EXTENTS = LAYOUT.extents(SPEC.tokens, SPEC.shard)

HELD_BYTES = HEADER_BYTES + 2 * frames.MAX_HELLO_BYTES + frames.MAX_CONTROL_BYTES + SINK_BYTES
"""All that a lane may allocate for bytes in its whole life, but for what the destination gives."""
STRANGER_BYTES = HEADER_BYTES + 2 * frames.MAX_HELLO_BYTES + SINK_BYTES
"""The same before its HELLO was accepted."""
UNPACKED = 40
"""A byte of msgpack may become an object of so many bytes (a float in a list: 9 bytes on the wire, 32 in memory; a
one-letter key and a small number: 3 and about 110)."""
_POOL = memoryview(bytearray(frames.MAX_CHUNK_BYTES))


@dataclass
class Allocations:
    """Of buffers, by `bytearray` in the connection's module."""

    nbytes: int = 0

    def bytearray(self, size: int) -> bytearray:
        self.nbytes += size
        return builtins.bytearray(size)


@contextmanager
def counted_buffers() -> Iterator[Allocations]:
    counted = Allocations()
    connection.bytearray = counted.bytearray  # type: ignore[attr-defined]
    try:
        yield counted
    finally:
        del connection.bytearray  # type: ignore[attr-defined]


@dataclass
class Lane:
    """A connection that is fed, with a receiving transfer behind it."""

    allocations: Allocations
    events: list[Any] = field(default_factory=list)
    error: str = ""

    def __post_init__(self) -> None:
        self.connection = LaneConnection(self.destination)
        self.transfer = ReceivingTransfer(LAYOUT, SPEC, 4096)
        self.accepted = False

    def destination(self, chunk: FrameHeader) -> memoryview | None:
        assert chunk.body_bytes <= frames.MAX_CHUNK_BYTES
        if chunk.transfer == 0:
            return _POOL[: chunk.body_bytes]
        return None if self.transfer.place(chunk, object()) is Placement.DUPLICATE else _POOL[: chunk.body_bytes]

    def feed(self, data: bytes, cut: Callable[[], int] = lambda: 1 << 30) -> None:
        """`cut()` says how many bytes come next at most. Until the end, or a ProtocolError."""
        position = 0
        try:
            while position < len(data):
                buffer = self.connection.next_buffer()
                assert len(buffer) > 0
                size = min(len(buffer), len(data) - position, cut())
                buffer[:size] = data[position : position + size]
                position += size
                for event in self.connection.advance(size):
                    self.take(event)
                assert self.allocations.nbytes <= (HELD_BYTES if self.accepted else STRANGER_BYTES)
        except ProtocolError as error:
            self.error = str(error)
            assert self.connection.state is LaneState.CLOSED
            assert len(self.error) < 1000, self.error

    def take(self, event: Control | ChunkArrived) -> None:
        header = event.header
        if isinstance(event, Control):
            assert type(event.body) is frames.BODY_TYPES[FrameType(header.type)]
            self.events.append((header, repr(event.body)))  # repr: NaN equals nothing
            if header.type == FrameType.HELLO:
                self.connection.accept()
                self.accepted = True
            return
        assert self.accepted
        data = None if event.data is None else bytes(event.data)
        if data is not None:
            assert len(data) == header.body_bytes
            if header.codec == frames.RAW:
                assert event.checksum == frames.checksum(data, header.transfer, header.sequence)
        self.events.append((header, data))


def fuzz_lane(hostile: HostileFrames) -> None:
    """A byte stream, cut anywhere, and once more in one piece: the same events, and the same error."""
    rng, data = hostile.rng, hostile.stream()
    with counted_buffers() as allocations:
        lane = Lane(allocations)
        most = rng.choice((1, 5, 50, 1 << 20)) if len(data) < 300 else rng.choice((60, 300, 1 << 20))
        lane.feed(data, lambda: rng.randint(1, most))
    if rng.random() < 0.3:
        with counted_buffers() as allocations:
            whole = Lane(allocations)
            whole.feed(data)
        assert whole.events == lane.events
        assert whole.error == lane.error
        assert whole.connection.state is lane.connection.state
    if rng.random() < 0.3:
        lane.connection.redirect(rng.choice((0, 1, 2)))
        with counted_buffers() as lane.allocations:
            lane.feed(hostile.stream())
    if lane.connection.state is LaneState.CLOSED and lane.error:
        lane.events.clear()
        lane.feed(hostile.frame())
        assert not lane.events, "a lane that is closed has taken a frame"


def fuzz_header(hostile: HostileFrames) -> None:
    rng = hostile.rng
    data = rng.randbytes(HEADER_BYTES) if rng.random() < 0.2 else hostile.header_changed(hostile.frame())[:HEADER_BYTES]
    try:
        header = frames.parse_header(data)
    except ProtocolError:
        return
    assert header.body_bytes <= frames.body_limit(header.type)
    if header.type == FrameType.CHUNK:
        assert 1 <= header.body_bytes <= header.raw_bytes <= frames.MAX_CHUNK_BYTES
        assert header.codec != frames.RAW or header.body_bytes == header.raw_bytes
    assert HEADER.pack(*header) == data


def fuzz_body(hostile: HostileFrames) -> None:
    type = hostile.rng.choice(tuple(frames.BODY_TYPES))
    try:
        parse_body(type, hostile.body(type))
    except ProtocolError:
        return


def parse_body(type: FrameType, data: bytes) -> frames.ControlBody:
    """Behind a header that is right."""
    header = frames.parse_header(hostile_frames.header_for(type, data))
    return frames.parse_body(header, data)


def fuzz_place(hostile: HostileFrames) -> None:
    """Chunks anywhere in a small transfer on three lanes: half here, taken over, arrived, damaged or drained, lanes
    lost between; beside a model that knows each byte."""
    rng = hostile.rng
    window = rng.choice((64, 500, 5000))
    transfer, model = ReceivingTransfer(LAYOUT, SPEC, window), PlaceModel()
    for _ in range(rng.randrange(40)):
        lane = rng.randrange(3)
        if lane in model.receiving:
            chunk = model.receiving.pop(lane)
            if rng.random() < 0.3:
                transfer.lane_lost(lane)
                model.write(chunk, free=True)
                continue
            transfer.received(chunk)
            if rng.random() < 0.2:
                try:
                    transfer.damaged(chunk)
                except ChecksumError:
                    return
                model.write(chunk, free=True)
            else:
                model.missing[chunk.layer] -= chunk.raw_bytes
                model.consumed += chunk.raw_bytes
                assert transfer.arrived(chunk) == (model.missing[chunk.layer] == 0)
        elif not begin_chunk(hostile, transfer, model, lane):
            return
        transfer.credit_due()
        assert transfer.granted_bytes <= model.consumed + window
    transfer.finish()
    assert transfer.complete == (not any(model.missing))


class PlaceModel:
    """Which bytes are here or coming, and on which lane."""

    def __init__(self) -> None:
        self.rows: dict[tuple[int, ...], bytearray] = {}
        self.receiving: dict[int, FrameHeader] = {}
        self.missing = [sum(e.total_bytes for e in layer) for layer in EXTENTS]
        self.consumed = 0

    def bytes_of(self, chunk: FrameHeader) -> bytes:
        row = self.rows.setdefault((chunk.layer, chunk.tensor, chunk.row), bytearray(400))
        return bytes(row[chunk.offset_bytes : chunk.offset_bytes + chunk.raw_bytes])

    def write(self, chunk: FrameHeader, *, free: bool) -> None:
        row = self.rows[chunk.layer, chunk.tensor, chunk.row]
        mark = b"\x00" if free else b"\x01"
        row[chunk.offset_bytes : chunk.offset_bytes + chunk.raw_bytes] = mark * chunk.raw_bytes

    @property
    def begun(self) -> int:
        return sum(row.count(1) for row in self.rows.values())


def begin_chunk(hostile: HostileFrames, transfer: ReceivingTransfer, model: PlaceModel, lane: int) -> bool:
    """False: it broke the protocol, and the transfer is over."""
    rng = hostile.rng
    size = rng.choice((1, 7, 8, 40, 100, 296))
    layer, tensor, row = rng.choice((0, 0, 0, 2, 2, 1, 3)), rng.choice((0, 0, 1, 2)), rng.choice((0, 0, 1, 2))
    offset = rng.choice((0, 8, 40, 295, 296, rng.randrange(300), (1 << 64) - 1))
    copy = rng.choice((0, 0, 1, 2))
    chunk = FrameHeader(0, 1, FrameType.CHUNK, 0, 0, copy, size, 1, layer, tensor, row, offset, size, 1, 0, 0)
    if rng.random() < 0.1:
        chunk = FrameHeader._make(HEADER.unpack_from(hostile.header_changed(HEADER.pack(*chunk))))
    granted = transfer.granted_bytes
    try:
        placement = transfer.place(chunk, lane)
    except ProtocolError:
        return False
    extent = EXTENTS[chunk.layer][chunk.tensor]
    assert chunk.row < extent.rows
    assert chunk.offset_bytes + chunk.raw_bytes <= extent.row_bytes
    if placement is Placement.NEW:
        assert not any(model.bytes_of(chunk))
        model.write(chunk, free=False)
        model.receiving[lane] = chunk
        assert model.begun <= granted
        return True
    assert all(model.bytes_of(chunk))
    if placement is Placement.TAKEN_OVER:
        places = {other: place_of(c) for other, c in model.receiving.items()}
        old = next(at for at, place in places.items() if place == place_of(chunk))
        assert model.receiving.pop(old).copy < chunk.copy
        model.receiving[lane] = chunk
    return True


def place_of(chunk: FrameHeader) -> tuple[int, int, int, int]:
    return chunk.layer, chunk.tensor, chunk.row, chunk.offset_bytes


BOOK = TicketBook(b"k" * 32, "far")
TICKET = BOOK.issue(SPEC, 1e9)


def fuzz_ticket(hostile: HostileFrames) -> None:
    """Only what was issued is good; what is not is refused in words that fit into OPENED."""
    text = hostile.ticket(TICKET)
    try:
        read_claims(text)
        assert BOOK.present(text, "near 1", 0.0) == SPEC, "a ticket that was not issued is good"
    except TicketError as error:
        frames.encode_control(frames.Opened(1, refused=str(error), kind="ticket"))


def fuzz_hello(hostile: HostileFrames) -> None:
    """From bytes to the last check, as a stranger and as one who knows the secret."""
    rng = hostile.rng
    try:
        body = parse_body(FrameType.HELLO, hostile.body(FrameType.HELLO)[: frames.MAX_HELLO_BYTES])
    except ProtocolError:
        return
    assert isinstance(body, SignedHello)
    answer = rng.choice((None, "nonce"))
    if rng.random() < 0.7:
        data = hostile.hello()
        body = SignedHello(data, sign(b"s", b"prfaas hello", data, (answer or "").encode()))
    try:
        check_hello(
            body,
            secret=rng.choice((b"s", b"s", b"")),
            model_fingerprint="f" * 32,
            now_s=1000.0,
            monotonic_s=50.0,
            skew_s=60.0,
            nonces=NonceWindow(120.0),
            expect_answer_to=answer,
            expect_node=rng.choice((None, "near")),
        )
    except ProtocolError:
        return
    except PeerRefusedError as error:
        frames.encode_control(frames.Error("hello_refused", str(error)[: frames.MAX_REASON_CHARS]))


TARGETS: tuple[tuple[Callable[[HostileFrames], None], float], ...] = (
    (fuzz_lane, 0.5),
    (fuzz_header, 0.1),
    (fuzz_body, 0.1),
    (fuzz_place, 0.1),
    (fuzz_ticket, 0.1),
    (fuzz_hello, 0.1),
)


def peak_bytes(target: Callable[[HostileFrames], None], hostile: HostileFrames) -> int:
    """What the target had allocated at most at one time, inputs included."""
    tracemalloc.start()
    try:
        target(hostile)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


PEAK_BYTES = 2 * HELD_BYTES + UNPACKED * frames.MAX_CONTROL_BYTES
"""Bound on `peak_bytes`: two lanes, and the largest body unpacked."""
