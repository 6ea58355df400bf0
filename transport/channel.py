"""One lane of a session: the protocol state below, the queue of what is to be written above.

A channel writes what the session gives it, a large chunk in pieces of at most `MAX_WRITE_BYTES`, and asks for more
when the lane has nothing unsent; control frames go between. So the session decides late which chunk goes where (the
lane that is free first takes the next), and chunks are known to be *sent* when the lane has nothing unsent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from prfaas.common.errors import PeerError
from prfaas.common.identity import PeerIdentity
from prfaas.common.log import get_logger
from prfaas.transport.connection import Event, LaneConnection
from prfaas.transport.frames import MAX_REASON_CHARS, ControlBody, Error, FrameHeader, encode_control
from prfaas.transport.transfer import Cut

if TYPE_CHECKING:
    from prfaas.transport.lanes.api import Buffer, Lane, LaneSample
    from prfaas.transport.sending import TransferSender

MAX_WRITE_BYTES = 1 << 20
"""One write of more stalls the loop: the kernel copies all of it before it returns."""
TURN_BYTES = 4 << 20
"""After so many bytes in one turn a channel lets the loop go on, even if the kernel would take more."""
CLOSING_S = 1.0
"""How long the rest of a chunk and an ERROR frame may take to leave before the lane is aborted."""

MAX_QUEUED_BYTES = 8 << 20
"""Control frames that may wait for a lane; thousands of OPENs, the largest that are usual. A peer that makes us answer
(PINGs, chunks) but reads nothing would fill our memory otherwise."""

_NOTHING = memoryview(b"")

log = get_logger("transport")


class Outgoing(NamedTuple):
    """A chunk on its way into a lane; payload: the engine's memory (raw) or the encoder's bytes."""

    sender: TransferSender
    cut: Cut
    header: bytes
    payload: memoryview


class ChannelOwner(Protocol):
    """The handshake first, then the session."""

    def lane_event(self, channel: Channel, event: Event) -> None:
        """May raise PeerError: the lane is closed with it."""
        ...

    def destination(self, channel: Channel, chunk: FrameHeader) -> memoryview | None: ...

    def next_outgoing(self, channel: Channel) -> Sequence[Outgoing]:
        """For one write: a chunk, or some small ones, or none."""
        ...

    def chunks_sent(self, chunks: Sequence[Outgoing]) -> None: ...

    def lane_lost(self, channel: Channel, reason: str) -> None: ...


class Channel:
    """A `LaneHandler`. `index` is the lane's place in its session, once that is known."""

    def __init__(self, owner: ChannelOwner, now: Callable[[], float], peer: str) -> None:
        self.owner = owner
        self.peer = peer
        self.index = -1
        self.retiring = False
        """It takes no new chunks."""
        self.last_received_s = now()
        self.closed = asyncio.get_running_loop().create_future()
        self.acks: dict[int, tuple[list[int], list[int]]] = {}
        self.connection = LaneConnection(self._destination)
        self.next_buffer = self.connection.next_buffer
        self._now = now
        self._loop = asyncio.get_running_loop()
        self._lane: Lane | None = None
        self._control: list[bytes] = []
        self._queued_bytes = 0
        self._writing: Sequence[Outgoing] = ()
        self._rest = _NOTHING
        """Of the last of them, not yet given to the lane."""
        self._pump_scheduled = False
        self._ended = False
        self._farewell: bytes | None = None
        self._reason = "closed by the other side"

    # -- LaneHandler

    def connected(self, lane: Lane) -> None:
        self._lane = lane
        if self._ended:  # given up before the loop had come to tell us
            lane.abort()

    def advance(self, received_bytes: int) -> None:
        if self._ended:
            return
        self.last_received_s = self._now()
        try:
            for event in self.connection.advance(received_bytes):
                self.owner.lane_event(self, event)
        except PeerError as error:
            self.fail(error)

    def writable(self) -> None:
        self._pump()

    def lost(self, error: Exception | None) -> None:
        if not self._ended:
            self._ended = True
            self._ended_by_peer(error)
        self._lane = None
        if not self.closed.done():
            self.closed.set_result(None)
            self.owner.lane_lost(self, self._reason)
        self._writing, self._rest = (), _NOTHING

    def _ended_by_peer(self, error: Exception | None) -> None:
        if error is not None:
            self._reason = str(error) or type(error).__name__
        partial = self.connection.partial_frame
        if partial is not None:
            self._reason = f"{self._reason}, in the middle of a frame: {partial}"
            log.warning("kv lane closed", peer=self.peer, lane=self.index, reason=self._reason)

    # -- for the owner

    @property
    def usable(self) -> bool:
        return not self._ended and self._lane is not None

    @property
    def peer_identity(self) -> PeerIdentity | None:
        """Whom the lane's certificate names; None without TLS."""
        return self._lane.peer_identity if self._lane is not None else None

    @property
    def writing(self) -> Sequence[Outgoing]:
        """The chunks whose memory the lane is reading now."""
        return self._writing

    @property
    def unwritten_bytes(self) -> int:
        """Of what is being written: goes down as long as the other side takes bytes."""
        return len(self._rest) + (self._lane.unsent_bytes if self._lane is not None else 0)

    def sample(self) -> LaneSample | None:
        return self._lane.sample() if self._lane is not None and not self._ended else None

    def send(self, body: ControlBody, transfer: int = 0, flags: int = 0) -> None:
        """Queue a control frame; it goes before any chunk that has not begun. A no-op on a lane that has ended."""
        if self._ended:
            return
        frame = encode_control(body, transfer, flags)
        self._control.append(frame)
        self._queued_bytes += len(frame)
        if self._queued_bytes > MAX_QUEUED_BYTES:
            reason = f"{self._queued_bytes} bytes of control frames wait: the peer does not read"
            log.warning("kv lane closed", peer=self.peer, lane=self.index, reason=reason)
            self.abort(reason)
        else:
            self.wake()

    def wake(self) -> None:
        """Something may be ready to be written: look in this turn of the loop."""
        if not self._pump_scheduled and not self._ended:
            self._pump_scheduled = True
            self._loop.call_soon(self._scheduled_pump)

    def fail(self, error: PeerError, code: str = "protocol") -> None:
        """The peer broke the protocol (or was refused): tell it why, then close."""
        log.warning("kv lane closed", peer=self.peer, lane=self.index, reason=str(error), error=type(error).__name__)
        self.close(str(error), code)

    def close(self, reason: str, code: str = "closing") -> None:
        """Send ERROR and close; what has not begun is not sent, a chunk that has begun is. Idempotent."""
        if self._ended:
            return
        self._ended = True
        self._reason = reason
        self.connection.close()
        lane = self._lane
        if lane is not None:
            self._farewell = encode_control(Error(code, reason[:MAX_REASON_CHARS]))
            self._loop.call_later(CLOSING_S, lane.abort)
            self._pump()

    def abort(self, reason: str) -> None:
        """Close without a word: the other side doesn't listen. Idempotent."""
        self._ended = True
        self._reason = reason
        self.connection.close()
        if self._lane is not None:
            self._lane.abort()

    # -- writing

    def _destination(self, chunk: FrameHeader) -> memoryview | None:
        return self.owner.destination(self, chunk)

    def _scheduled_pump(self) -> None:
        self._pump_scheduled = False
        self._pump()

    def _pump(self) -> None:
        lane = self._lane
        budget = TURN_BYTES
        while lane is not None and not lane.closing and lane.unsent_bytes == 0:
            if self._rest:
                budget -= self._write(lane, [], self._rest)
                continue
            if self._writing:
                sent, self._writing = self._writing, ()
                self.owner.chunks_sent(sent)
            if self._ended:
                self._say_farewell(lane)
                return
            if self._control:
                control, self._control = self._control, []
                self._queued_bytes = 0
                lane.write(control)
                continue
            if budget <= 0:
                self.wake()
                return
            self._writing = self.owner.next_outgoing(self)
            if not self._writing:
                return
            buffers: list[Buffer] = [buffer for chunk in self._writing for buffer in (chunk.header, chunk.payload)]
            budget -= self._write(lane, buffers[:-1], self._writing[-1].payload)

    def _write(self, lane: Lane, buffers: list[Buffer], last: memoryview) -> int:
        """`buffers`, and as much of `last` as goes into one write; how many bytes those are."""
        piece = last if len(last) <= MAX_WRITE_BYTES else last[:MAX_WRITE_BYTES]
        self._rest = last[len(piece) :]
        buffers.append(piece)
        lane.write(buffers)
        return sum(map(len, buffers))

    def _say_farewell(self, lane: Lane) -> None:
        farewell, self._farewell = self._farewell, None
        if farewell is not None:
            lane.write([farewell])
            self._loop.call_soon(lane.close)  # asyncio's transports end twice when `writable` closes them
