"""One lane's protocol state: bytes in, events out; no socket, no clock.

The lane's shell asks `next_buffer` where the next bytes go and tells `advance` how many came. For a CHUNK's payload
that buffer is the destination itself, so nothing is copied.

    WAIT_HELLO --HELLO--> CHECK_HELLO --accept()--> OPEN --ERROR--> CLOSED
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import xxhash
from prfaas.common.errors import ProtocolError
from prfaas.transport.frames import (
    CHUNK,
    FROM_RECEIVER,
    HEADER_BYTES,
    MAX_CONTROL_BYTES,
    RAW,
    ControlBody,
    FrameHeader,
    FrameType,
    chunk_hasher,
    parse_body,
    parse_header,
)

SINK_BYTES = 256 << 10
"""Drained bytes are read in pieces of this size; nobody looks at them."""
_SINK = memoryview(bytearray(SINK_BYTES))
"""One for all lanes, strangers' too."""


class LaneState(enum.Enum):
    WAIT_HELLO = "before HELLO"
    CHECK_HELLO = "while HELLO is checked"
    OPEN = "open"
    CLOSED = "closed"


_TRANSFER_FRAMES = (
    FrameType.OPEN,
    FrameType.OPENED,
    FrameType.CHUNK,
    FrameType.CREDIT,
    FrameType.ACK,
    FrameType.FINISH,
    FrameType.CANCEL,
    FrameType.FETCH,
    FrameType.FETCHED,
)

# Which frames are legal in which state, and the state after them.
TRANSITIONS: Mapping[LaneState, Mapping[int, LaneState]] = MappingProxyType(
    {
        LaneState.WAIT_HELLO: {FrameType.HELLO: LaneState.CHECK_HELLO, FrameType.ERROR: LaneState.CLOSED},
        LaneState.CHECK_HELLO: {FrameType.ERROR: LaneState.CLOSED},
        LaneState.OPEN: {
            **dict.fromkeys(_TRANSFER_FRAMES, LaneState.OPEN),
            FrameType.RESUME: LaneState.OPEN,
            FrameType.PING: LaneState.OPEN,
            FrameType.PONG: LaneState.OPEN,
            FrameType.ERROR: LaneState.CLOSED,
        },
        LaneState.CLOSED: {},
    }
)

# The direction bit must fit the frame: a credit can't come from the side that sends the KV.
_RECEIVER_FRAMES = frozenset({FrameType.OPENED, FrameType.CREDIT, FrameType.ACK})
_SENDER_FRAMES = frozenset({FrameType.OPEN, FrameType.CHUNK, FrameType.FINISH})


class Control(NamedTuple):
    """A whole control frame."""

    header: FrameHeader
    body: ControlBody

    @property
    def from_receiver(self) -> bool:
        return bool(self.header.flags & FROM_RECEIVER)


class ChunkArrived(NamedTuple):
    """A whole CHUNK. `data` is the buffer that the destination callback gave, or None: the bytes were drained.

    checksum: of `data` in its place, for a raw chunk. It is taken part by part as the bytes come, while they are still
    in the processor's cache; None for drained and encoded bytes."""

    header: FrameHeader
    data: memoryview | None
    checksum: int | None


Event = Control | ChunkArrived
Destination = Callable[[FrameHeader], memoryview | None]
"""Where a CHUNK's `body_bytes` go (a buffer of just that size), or None: drain them. May raise ProtocolError."""


class LaneConnection:
    """Not thread-safe; once it has raised ProtocolError it is CLOSED and takes nothing more."""

    def __init__(self, destination: Destination) -> None:
        self._destination = destination
        self._header_buffer = memoryview(bytearray(HEADER_BYTES))
        self._body_buffer: memoryview | None = None
        self._header: FrameHeader | None = None
        self._hasher: xxhash.xxh3_64 | None = None
        self._target: memoryview | None = self._header_buffer
        self._filled = 0
        self._wanted = HEADER_BYTES
        self.state = LaneState.WAIT_HELLO

    @property
    def state(self) -> LaneState:
        return self._state

    @state.setter
    def state(self, state: LaneState) -> None:
        self._state = state
        self._legal = TRANSITIONS[state]  # looked at for each frame

    def accept(self) -> None:
        """HELLO was found good: transfers may begin."""
        self.state = LaneState.OPEN

    def next_buffer(self) -> memoryview:
        """Where the next bytes must be written; never empty."""
        target = self._target
        if target is None:
            return _SINK[: self._wanted - self._filled]
        return target[self._filled :] if self._filled else target

    def advance(self, received_bytes: int) -> Sequence[Event]:
        """`received_bytes` were written to the start of `next_buffer()`. Raises ProtocolError."""
        before = self._filled
        self._filled = before + received_bytes
        if self._hasher is not None and self._target is not None:
            self._hasher.update(self._target[before : self._filled])
        if self._filled < self._wanted:
            return ()
        try:
            header = self._header
            if header is None:
                return self._header_complete()
            return (self._body_complete(header),)
        except ProtocolError:
            self.close()
            raise

    @property
    def partial_frame(self) -> str | None:
        """What of a frame has come when the lane ends here, for people; None between two frames."""
        if self._header is not None:
            return f"{FrameType(self._header.type).name} with {self._filled} of {self._wanted} bytes"
        return f"{self._filled} of a header's {HEADER_BYTES} bytes" if self._filled else None

    def redirect(self, transfer: int) -> None:
        """The rest of a chunk of `transfer` that is on its way goes to the sink; its memory is not touched again."""
        header = self._header
        if header is not None and header.type == CHUNK and header.transfer == transfer:
            self._target = self._hasher = None

    def redirect_chunk(self, chunk: FrameHeader) -> bool:
        """The same for one chunk. True: this lane was receiving it."""
        header = self._header
        place = (chunk.transfer, chunk.layer, chunk.tensor, chunk.row, chunk.offset_bytes)
        if header is None or header.type != CHUNK or self._target is None:
            return False
        if (header.transfer, header.layer, header.tensor, header.row, header.offset_bytes) != place:
            return False
        self._target = self._hasher = None
        return True

    def close(self) -> None:
        """What still comes goes to the sink."""
        self.state = LaneState.CLOSED
        self._header = self._hasher = None
        self._expect(None, SINK_BYTES)

    def _expect(self, target: memoryview | None, wanted: int) -> None:
        self._target, self._wanted, self._filled = target, wanted, 0

    def _header_complete(self) -> Sequence[Event]:
        header = parse_header(self._header_buffer)
        self._check_legal(header)
        self._header = header
        if header.type == CHUNK:
            target = self._destination(header)
            self._expect(target, header.body_bytes)
            if header.codec == RAW and target is not None:
                self._hasher = chunk_hasher(header.transfer, header.sequence)
        elif header.body_bytes == 0:
            raise ProtocolError(f"{FrameType(header.type).name} without a body")
        else:
            if self._body_buffer is None or len(self._body_buffer) < header.body_bytes:
                size = header.body_bytes if self.state is not LaneState.OPEN else MAX_CONTROL_BYTES
                self._body_buffer = memoryview(bytearray(size))
            self._expect(self._body_buffer[: header.body_bytes], header.body_bytes)
        return ()

    def _check_legal(self, header: FrameHeader) -> None:
        if header.type not in self._legal:
            raise ProtocolError(f"{FrameType(header.type).name} is not legal {self.state.value}")
        from_receiver = bool(header.flags & FROM_RECEIVER)
        if header.type in (_SENDER_FRAMES if from_receiver else _RECEIVER_FRAMES):
            raise ProtocolError(f"{FrameType(header.type).name} with the wrong direction bit")

    def _body_complete(self, header: FrameHeader) -> Event:
        event: Event
        if header.type == CHUNK:
            event = ChunkArrived(header, self._target, None if self._hasher is None else self._hasher.intdigest())
        else:
            assert self._target is not None
            event = Control(header, parse_body(header, self._target))
            self.state = self._legal[header.type]
        self._header = self._hasher = None
        self._expect(self._header_buffer, HEADER_BYTES)
        return event
