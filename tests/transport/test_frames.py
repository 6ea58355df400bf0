"""Each frame parsed whole, byte by byte and with trailing data; every limit refused before it is believed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prfaas.common.errors import ProtocolError
from prfaas.transport.connection import TRANSITIONS, ChunkArrived, Control, LaneConnection, LaneState
from prfaas.transport.frames import (
    BODY_TYPES,
    FROM_RECEIVER,
    HEADER,
    MAX_CHUNK_BYTES,
    MAX_CONTROL_BYTES,
    MAX_HELLO_BYTES,
    Ack,
    Cancel,
    ControlBody,
    Credit,
    Error,
    Fetch,
    Fetched,
    Finish,
    FrameHeader,
    FrameType,
    Open,
    Opened,
    Ping,
    Pong,
    Resume,
    SignedHello,
    checksum,
    encode_chunk_header,
    encode_control,
    encode_header,
    parse_header,
)

HELLO = SignedHello(b"hello", b"mac")
OPEN = Open("ticket", 1, "0" * 32, 0, 9, 0, 1, 0, None, "f", "l", {"key": "bfloat16"})
FRAMES: list[tuple[ControlBody, int]] = [
    (OPEN, 0),
    (Opened(1, credit_bytes=5), FROM_RECEIVER),
    (Opened(2, no_room=True, retry_after_s=0.5), FROM_RECEIVER),
    (Opened(3, refused="why"), FROM_RECEIVER),
    (Credit(1 << 40), FROM_RECEIVER),
    (Ack(chunks=[1, 2], damaged=[3]), FROM_RECEIVER),
    (Finish({"sent_s": [1.0, 2.0], "ended_s": 3.0}), 0),
    (Cancel("cancelled", "gone"), 0),
    (Cancel("cancelled"), FROM_RECEIVER),
    (Fetch("ticket", b"h" * 16, 0, 64), 0),
    (Fetched("not held"), FROM_RECEIVER),
    (Resume([1, 2], 3, answer=True), 0),
    (Ping(1.5), 0),
    (Pong(1.5, 2.5), 0),
]


def feed(connection: LaneConnection, data: bytes, step: int | None = None) -> list[object]:
    """Write `data` as a lane would, at most `step` bytes at a time."""
    events: list[object] = []
    while data:
        buffer = connection.next_buffer()
        n = min(len(buffer), len(data), step or len(data))
        buffer[:n] = data[:n]
        events += connection.advance(n)
        data = data[n:]
    return events


def opened(destination=lambda _header: None) -> LaneConnection:  # type: ignore[no-untyped-def]
    connection = LaneConnection(destination)
    feed(connection, encode_control(HELLO))
    connection.accept()
    return connection


@pytest.mark.parametrize(("body", "flags"), FRAMES, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("step", [None, 1, 7])
def test_a_frame_whole_in_pieces_and_followed_by_another(body: ControlBody, flags: int, step: int | None) -> None:
    """The same event comes out however the bytes are cut, and the next frame is not disturbed."""
    events = feed(opened(), encode_control(body, 7, flags) + encode_control(Ping(9.0)), step)
    first, second = events
    assert isinstance(first, Control)
    assert (first.body, first.header.transfer, first.header.flags) == (body, 7, flags)
    assert isinstance(second, Control)
    assert second.body == Ping(9.0)


@pytest.mark.parametrize("step", [None, 1, 7])
def test_a_chunk_lands_in_its_destination_or_in_the_sink(step: int | None) -> None:
    """A payload goes to the buffer that the destination gave; without one it is drained, and the lane goes on."""
    memory = bytearray(300)
    given: list[FrameHeader] = []

    def destination(header: FrameHeader) -> memoryview | None:
        given.append(header)
        return memoryview(memory)[:200] if header.transfer == 1 else None

    data = bytes(range(200))
    wanted = encode_chunk_header(1, 5, (2, 1, 3, 64), 200, 200, 0, 99)
    drained = encode_chunk_header(2, 6, (0, 0, 0, 0), 200, 200, 0, 99)
    events = feed(opened(destination), drained + data + wanted + data + encode_control(Ping(1.0)), step)
    first, second, third = events
    assert isinstance(first, ChunkArrived)
    assert first.data is None
    assert first.checksum is None
    assert isinstance(second, ChunkArrived)
    assert second.checksum == checksum(data, 1, 5)
    assert (second.header.layer, second.header.tensor, second.header.row, second.header.offset_bytes) == (2, 1, 3, 64)
    assert bytes(memory) == data + bytes(100)
    assert isinstance(third, Control)
    assert len(given) == 2


def test_a_redirected_chunk_writes_nothing_more() -> None:
    """After a cancel the rest of the chunk in progress goes to the sink."""
    memory = bytearray(200)
    connection = opened(lambda _header: memoryview(memory))
    feed(connection, encode_chunk_header(1, 1, (0, 0, 0, 0), 200, 200, 0, 0) + b"x" * 50)
    connection.redirect(2)
    feed(connection, b"y" * 10)
    connection.redirect(1)
    events = feed(connection, b"z" * 140)
    assert bytes(memory) == b"x" * 50 + b"y" * 10 + bytes(140)
    assert isinstance(events[0], ChunkArrived)
    assert events[0].data is None


@pytest.mark.parametrize("state", list(LaneState))
@pytest.mark.parametrize("type", [*BODY_TYPES, FrameType.CHUNK])
def test_the_state_table(state: LaneState, type: FrameType) -> None:
    """Each frame in each state: legal exactly where the table says so; an illegal one closes the lane."""
    bodies: dict[FrameType, bytes] = {
        FrameType.HELLO: encode_control(HELLO),
        FrameType.ERROR: encode_control(Error("x")),
    }
    for body, flags in FRAMES:
        bodies[FrameType(HEADER.unpack_from(encode_control(body))[2])] = encode_control(body, 1, flags)
    bodies[FrameType.CHUNK] = encode_chunk_header(1, 1, (0, 0, 0, 0), 4, 4, 0, 0) + b"data"
    connection = LaneConnection(lambda _header: None)
    connection.state = state
    if type in TRANSITIONS[state]:
        assert len(feed(connection, bodies[type])) == 1
        assert connection.state is TRANSITIONS[state][type]
    else:
        with pytest.raises(ProtocolError, match="not legal"):
            feed(connection, bodies[type])
        assert connection.state is LaneState.CLOSED


def test_the_direction_bit_must_fit() -> None:
    """A CREDIT from the side that sends the KV, or a CHUNK from the one that receives it, is refused."""
    for frame in (encode_control(Credit(1), 1, 0), encode_control(OPEN, 1, FROM_RECEIVER)):
        with pytest.raises(ProtocolError, match="direction"):
            feed(opened(), frame)


CHUNK = FrameHeader._make(HEADER.unpack(encode_chunk_header(1, 1, (0, 0, 0, 0), 64, 64, 0, 0)))


@pytest.mark.parametrize(
    ("header", "text"),
    [
        (CHUNK._replace(magic=1), "not a PrfaaS frame"),
        (CHUNK._replace(version=9), "version 9"),
        (CHUNK._replace(type=99), "unknown or reserved"),
        (CHUNK._replace(type=FrameType.LINK), "reserved"),
        (CHUNK._replace(raw_bytes=MAX_CHUNK_BYTES + 1, body_bytes=1, codec=1), "decoded bytes"),
        (CHUNK._replace(raw_bytes=0), "decoded bytes"),
        (CHUNK._replace(body_bytes=65), "on the wire"),
        (CHUNK._replace(body_bytes=0), "on the wire"),
        (CHUNK._replace(body_bytes=63), "raw CHUNK"),
        (CHUNK._replace(body_bytes=MAX_CHUNK_BYTES + 1), "the limit is"),
        (CHUNK._replace(type=FrameType.HELLO, body_bytes=MAX_HELLO_BYTES + 1), "the limit is"),
        (CHUNK._replace(type=FrameType.FINISH, body_bytes=MAX_CONTROL_BYTES + 1), "the limit is"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_header_says_what_is_wrong(header: FrameHeader, text: str) -> None:
    """Before any body is read or memory taken."""
    with pytest.raises(ProtocolError, match=text):
        parse_header(encode_header(header))


def test_a_control_frame_over_its_limit_is_not_even_made() -> None:
    """FINISH with timings that no peer would accept is the caller's error."""
    with pytest.raises(ValueError, match="at most"):
        encode_control(Finish({f"t{i}": [1.0] * 1024 for i in range(8)}))


@given(st.binary(max_size=400))
@settings(max_examples=200, deadline=None)
def test_any_bytes_give_events_or_a_protocol_error(data: bytes) -> None:
    """No input crashes a lane in another way."""
    try:
        feed(opened(), encode_control(Ping(1.0))[:14] + data)
    except ProtocolError:
        return


@given(st.integers(0, 8 * HEADER.size - 1))
@settings(max_examples=8 * HEADER.size, deadline=None)
def test_a_header_with_a_damaged_bit_is_refused(bit: int) -> None:
    """Of a control frame and of a chunk, any bit of any field."""
    for frame in (encode_control(Credit(5), 1, FROM_RECEIVER), encode_chunk_header(1, 2, (0, 0, 0, 0), 4, 4, 0, 9)):
        header = bytearray(frame[: HEADER.size])
        header[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ProtocolError):
            parse_header(header)


@pytest.mark.parametrize(("body", "flags"), FRAMES)
def test_a_control_frame_with_a_damaged_body_is_refused(body: ControlBody, flags: int) -> None:
    """Most of them would be a good frame that says something else: a CREDIT of another number, say."""
    frame = bytearray(encode_control(body, 1, flags))
    frame[-1] ^= 1
    with pytest.raises(ProtocolError, match="damaged on its way"):
        feed(opened(), bytes(frame))


def test_the_checksum_says_whose_the_bytes_are() -> None:
    """The same bytes have another one in another chunk, and in the chunk of that number of another transfer."""
    data = memoryview(b"k" * 1000)
    assert len({checksum(data, *whose) for whose in [(1, 1), (1, 2), (2, 1), (2, 2)]}) == 4
