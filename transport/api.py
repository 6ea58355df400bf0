"""What an engine sees of the transport: a `KvSender` on the prefill side, a `KvReceiver` on the decode side.

Who owns KV memory when, for one piece on its way from prefill to decode:

    prefill engine    |-- computes --|---- keeps unchanged ----|-- free to reuse ------------------>
    sender                           put()      (encodes, sends)|  report / on_released
    lane                                  |== bytes on the wire ==|
    decode arena      carved by `reserve` at OPEN -> |-- pinned by the receiver --|-- engine reads --|-- engine frees
                                                     `KvReceiver.closed` or layer arrived ^

- The sender reads a piece's memory from `put` until the transfer has ended (done, failed or cancelled *and*
  `aclose` has returned); the engine must not write or free it in between.
- The receiver writes only inside rows that `KvDestination.row` returned, and never after `aclose` has returned.
- A layer that has arrived is never written again: the engine may read it while later layers are in flight.

Threads: methods marked *thread-safe* may be called from the engine's thread; all others from the event loop's.
Callbacks run on the event loop and must return quickly. One that raises fails its own transfer with EngineError (the
traceback is logged); lanes and other transfers go on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from prfaas.common.kv_layout import WHOLE, KvLayout, Shard, TokenRange


@dataclass(frozen=True, slots=True)
class TransferSpec:
    """What the ticket and OPEN say of one transfer. Both sides compute the same extents from it."""

    transfer_id: str
    """32 hex digits, unique for ever."""
    request_id: str
    tokens: TokenRange
    """`end` is prompt length − 1 (the n−1 rule)."""
    prompt_tokens: int
    max_output_tokens: int
    model_fingerprint: str
    layout_hash: str
    shard: Shard = WHOLE


@dataclass(frozen=True, slots=True)
class KvPiece:
    """A byte range of one row of one tensor of one layer, ready to leave.

    `tensor` indexes the layer's tensors in the layout, `row` counts from the extent's first row, `offset_bytes` from
    the row's start. `data` is C-contiguous bytes in canonical order; a piece never crosses a row.
    """

    layer: int
    tensor: int
    row: int
    offset_bytes: int
    data: memoryview


@dataclass(frozen=True, slots=True)
class LinkClock:
    """peer_monotonic = own_monotonic + offset_s, true within ± error_s. From PINGs, the best of the last many."""

    offset_s: float
    error_s: float
    rtt_s: float


@dataclass(frozen=True, slots=True)
class LinkEstimate:
    """What a session has measured of its way to the peer, of all lanes together, in the sending direction."""

    bandwidth_bytes_per_s: float
    """Payload on the wire while there was enough to send; 0.0 until known."""
    rtt_s: float
    """Smoothed, of PINGs and acknowledgements; 0.0 until known."""
    min_rtt_s: float
    loss: float
    """Share of the bytes that had to be sent again, lately."""
    utilisation: float
    """Share of the bandwidth that is in use now, 0 to 1."""
    queued_bytes: int
    """Ready to be sent, and not acknowledged yet."""


@dataclass(slots=True)
class TransferReport:
    """What one side knows of a transfer; instants are seconds of this process's monotonic clock."""

    raw_bytes: int = 0
    """Of KV. Sender: with what was sent again. Receiver: each byte once."""
    wire_bytes: int = 0
    """Bytes handed to (or taken from) the sockets for CHUNK frames, headers included."""
    layer_at_s: dict[int, float] = field(default_factory=dict)
    """Sender: when the layer's last byte was handed to the socket. Receiver: when its last piece had been decoded and
    checked."""
    resent_chunks: int = 0
    """After a checksum mismatch."""
    moved_chunks: int = 0
    """Sent again on another lane, since theirs was lost before they were acknowledged."""
    duplicate_chunks: int = 0
    peer_timings: dict[str, float | list[float]] = field(default_factory=dict)
    """Receiver: what FINISH carried, in the sender's clock."""
    traceparent: str = ""
    """Receiver: what OPEN carried, as it came; "": nothing."""
    clock: LinkClock | None = None
    """Of the session, at the end of the transfer."""


class KvDestination(Protocol):
    """Memory for one transfer, carved from the engine's arena."""

    def row(self, layer: int, tensor: int, row: int) -> memoryview:
        """The writable, contiguous bytes of this row for the transfer's token range; exactly `Extent.row_bytes`."""
        ...


Reserve = Callable[[TransferSpec], KvDestination | None]
"""Called on the event loop when OPEN arrives, at most once with success; None = no room now (the sender asks again).
Raising `EngineError` (or anything else) refuses the transfer for good."""


class KvSender(Protocol):
    """One transfer's sending half; made by `KvEndpoint.sender`, driven by the prefill engine."""

    @property
    def spec(self) -> TransferSpec: ...

    @property
    def report(self) -> TransferReport: ...

    @property
    def rtt_s(self) -> float:
        """Of the session to the receiver (0.0 until known): how early `open` should be called before data is ready."""
        ...

    async def open(self, remaining_s: float | None = None) -> None:
        """Send OPEN and wait for the answer. On `NoRoomError` it may be called again later.

        remaining_s: until the request's deadline, from now; after it the receiver fails the transfer (both sides get
        TransferCancelledError). None = no deadline.

        Raises NoRoomError, TicketError, TransferCancelledError, LaneLostError, PeerRefusedError. Cancelling it leaves
        the transfer unopened.
        """
        ...

    def put(self, pieces: Sequence[KvPiece]) -> None:
        """*Thread-safe.* Hand over pieces; returns at once. Ready pieces leave in layer order, then in token order.

        After a failure or a cancel pieces are dropped silently: `failed` tells.
        """
        ...

    def finish(self, timings: dict[str, float | list[float]]) -> None:
        """*Thread-safe.* All pieces have been put; FINISH follows the last chunk and carries `timings` to decode.

        The sender adds `sent_s` (a list, one instant a layer, own clock) to them.
        """
        ...

    @property
    def failed(self) -> Exception | None:
        """*Thread-safe.* Why the transfer can't succeed any more (the peer's cancel included), or None."""
        ...

    def on_failed(self, callback: Callable[[Exception], None]) -> None:
        """Called once, on the event loop, when `failed` becomes set (at once if it is already)."""
        ...

    async def done(self) -> TransferReport:
        """Wait until every chunk and FINISH are acknowledged. Raises the transfer's TransferError."""
        ...

    async def aclose(self, reason: str = "closed") -> None:
        """End the transfer if it is still going (CANCEL to the receiver); idempotent. When it returns, no piece is
        read any more: chunks that lanes have begun are finished, unless the peer takes no bytes for a second, which
        costs the lane. Finishes its work even when the caller is cancelled."""
        ...


class KvReceiver(Protocol):
    """One transfer's receiving half; made by `KvEndpoint.receiver`, given to the decode engine."""

    @property
    def spec(self) -> TransferSpec: ...

    @property
    def layout(self) -> KvLayout: ...

    @property
    def report(self) -> TransferReport: ...

    def bind(self, reserve: Reserve, on_layer: Callable[[int], None], on_failed: Callable[[Exception], None]) -> None:
        """Once, before the ticket is given out. `on_layer(l)` is called on the event loop when layer l is complete and
        checked (layers without bytes: right after a successful reserve); `on_failed` at most once, and not after
        all layers have arrived and FINISH is in."""
        ...

    async def finished(self) -> TransferReport:
        """Wait until all layers and FINISH are here. Raises the transfer's TransferError."""
        ...

    async def aclose(self, reason: str = "closed") -> None:
        """End the transfer (CANCEL to the sender if it is still going, ticket void); idempotent. When it returns, the
        destination is not written any more and may be freed; what is still on its way goes to a sink.
        Finishes its work even when the caller is cancelled."""
        ...


@dataclass(frozen=True, slots=True)
class KvAddress:
    """One KV endpoint of a node, as advertised: where the other side dials, and which worker rank is behind it."""

    host: str
    port: int
    rank: int = 0

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"
