"""What a backend must offer: lanes, which carry bytes in order to the other side, and a way to dial and to accept them.

The transport above hands out the memory that received bytes go to (`LaneHandler.next_buffer`), so that a chunk lands in
its destination without a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from prfaas.common.identity import PeerIdentity

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class LaneSample:
    """What the network below a lane says of it at one moment (TCP_INFO); cumulative unless said."""

    rtt_s: float
    """Smoothed, now."""
    min_rtt_s: float
    delivery_bytes_per_s: float
    """Of the last acknowledged flight, now."""
    app_limited: bool
    """That flight was short of data, not of bandwidth: the rate is a lower bound."""
    sent_bytes: int
    """First transmissions and retransmissions."""
    retransmitted_bytes: int
    acknowledged_bytes: int
    in_flight_bytes: int
    """Now."""
    queued_bytes: int
    """Now: taken by the kernel, not yet sent."""
    busy_s: float
    """Time with anything to send; of it, limited by the receiver's window, and by our send buffer:"""
    receive_limited_s: float
    send_limited_s: float


class LaneHandler(Protocol):
    """What a lane calls, on the event loop."""

    def connected(self, lane: Lane) -> None:
        """Once, first."""
        ...

    def next_buffer(self) -> memoryview:
        """Where to put the next received bytes; never empty. Asked anew after each `advance`; not kept."""
        ...

    def advance(self, received_bytes: int) -> None: ...

    def writable(self) -> None:
        """`unsent_bytes` has gone down to 0 after `write` left some."""
        ...

    def lost(self, error: Exception | None) -> None:
        """Once, last. None: closed by either side in order."""
        ...


class Lane(Protocol):
    @property
    def peer_identity(self) -> PeerIdentity | None:
        """Whom the other side's certificate names; None where there are no certificates."""
        ...

    def write(self, buffers: Sequence[Buffer]) -> None:
        """Send all, in order. The buffers are read until `unsent_bytes` is 0 and must not change before. A no-op on a
        lane that is closing."""
        ...

    @property
    def unsent_bytes(self) -> int:
        """Accepted by `write` but not yet handed to the network."""
        ...

    @property
    def closing(self) -> bool:
        """`close` or `abort` was called, or the network has ended the lane: `write` is a no-op, `lost` will follow."""
        ...

    def sample(self) -> LaneSample | None:
        """None where the network below tells nothing."""
        ...

    def close(self) -> None:
        """Send what was written, then close; what comes meanwhile still goes to the handler. Idempotent; `lost` follows
        when the other side has closed too, so have `abort` follow in time."""
        ...

    def abort(self) -> None:
        """Close now and drop what is unsent. Idempotent; `lost` follows soon, and no buffer is read any more."""
        ...


class Listener(Protocol):
    @property
    def address(self) -> tuple[str, int]:
        """Where it really listens."""
        ...

    async def aclose(self) -> None:
        """Accept no more; lanes that are open go on."""
        ...


class Backend(Protocol):
    async def listen(self, host: str, port: int, handler: Callable[[], LaneHandler]) -> Listener:
        """Raises OSError."""
        ...

    async def dial(self, host: str, port: int, handler: LaneHandler) -> None:
        """Returns after `handler.connected`. Raises OSError; PeerRefusedError when the two sides' certificates don't
        suit each other."""
        ...
