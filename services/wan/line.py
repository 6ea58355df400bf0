"""What a long line does to packets: a queue that overflows, the time that the rate needs, delay, jitter, loss. Pure."""

from __future__ import annotations

import collections
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass

VIRTIO_HEADER = struct.Struct("=BBHHHH")
"""flags, gso_type, hdr_len, gso_size, csum_start, csum_offset: before each packet of a device with offload."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """The same in both directions."""

    rate_bits_per_s: float = 1e9
    """Of whole IP packets: TCP's payload has 1448/1500 of it over the usual MTU."""
    delay_s: float = 0.0
    """One way."""
    jitter_s: float = 0.0
    """Each packet waits up to so much longer, but never overtakes another."""
    loss: float = 0.0
    """Share of packets."""
    queue_bytes: int = 0
    """Before the bottleneck; packets beyond it are dropped."""
    down: bool = False
    """Every packet is dropped."""


@dataclass(frozen=True, slots=True)
class Counters:
    """Of one direction, since the line is there."""

    packets: int
    """That arrived; segments that the kernel hands over as one count one by one."""
    packet_bytes: int
    """Of these, IP headers included."""
    lost: int
    overflowed: int
    latest_s: float
    """By how much the emulation itself was late at most: what the machine's load adds to it."""


@dataclass(frozen=True, slots=True)
class Packet:
    data: bytes
    nbytes: int
    """On the wire, once the kernel's bunch has been cut into segments."""
    segments: int

    @classmethod
    def of(cls, data: bytes, *, offload: bool) -> Packet:
        """`data` as a TUN device gives it; with `offload` a VIRTIO_HEADER is before the packet."""
        if not offload:
            return cls(data, len(data), 1)
        nbytes = len(data) - VIRTIO_HEADER.size
        _, gso_type, header_bytes, segment_bytes, _, _ = VIRTIO_HEADER.unpack_from(data)
        if not gso_type or not segment_bytes:
            return cls(data, nbytes, 1)
        segments = max(1, -(-(nbytes - header_bytes) // segment_bytes))
        return cls(data, nbytes + (segments - 1) * header_bytes, segments)


class Line:
    """One direction. All instants are of one monotonic clock."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._under_way: collections.deque[tuple[float, Packet]] = collections.deque()
        self._free_s = 0.0
        """When the bottleneck has sent all that waits before it."""
        self.packets = self.packet_bytes = self.lost = self.overflowed = 0
        self.latest_s = 0.0

    @property
    def next_s(self) -> float | None:
        """When the next packet arrives."""
        return self._under_way[0][0] if self._under_way else None

    def enter(self, packet: Packet, conditions: Conditions, now_s: float) -> None:
        """Takes the packet, or drops it. Changed conditions hold for packets that come from then on."""
        if conditions.down or (conditions.loss and self._rng.random() >= (1 - conditions.loss) ** packet.segments):
            self.lost += packet.segments
            return
        start_s = max(self._free_s, now_s)
        if (start_s - now_s) * conditions.rate_bits_per_s / 8 > conditions.queue_bytes:
            self.overflowed += packet.segments
            return
        self._free_s = start_s + packet.nbytes * 8 / conditions.rate_bits_per_s
        due_s = self._free_s + conditions.delay_s + self._rng.random() * conditions.jitter_s
        if self._under_way:
            due_s = max(due_s, self._under_way[-1][0])
        self._under_way.append((due_s, packet))

    def arrived(self, now_s: float) -> Iterator[bytes]:
        """The packets that are due; one that is not taken from the iterator stays."""
        under_way = self._under_way
        while under_way and under_way[0][0] <= now_s:
            due_s, packet = under_way.popleft()
            self.packets += packet.segments
            self.packet_bytes += packet.nbytes
            self.latest_s = max(self.latest_s, now_s - due_s)
            yield packet.data

    def counters(self) -> Counters:
        return Counters(self.packets, self.packet_bytes, self.lost, self.overflowed, self.latest_s)
