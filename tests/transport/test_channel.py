"""What a channel writes into its lane."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from prfaas.transport.channel import TURN_BYTES, Channel, Outgoing
from prfaas.transport.connection import Event
from prfaas.transport.frames import HEADER_BYTES, FrameHeader
from prfaas.transport.lanes.api import Buffer, LaneSample
from prfaas.transport.transfer import Cut

CHUNK_BYTES = 4096
CHUNKS = 64
WRITE_BYTES = CHUNKS * (HEADER_BYTES + CHUNK_BYTES)


class SwiftLane:
    """Takes all at once, as the kernel does while the reader keeps up."""

    peer_identity = None
    unsent_bytes = 0
    closing = False

    def __init__(self) -> None:
        self.taken_bytes = 0

    def write(self, buffers: Sequence[Buffer]) -> None:
        self.taken_bytes += sum(map(len, buffers))

    def sample(self) -> LaneSample | None:
        return None

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.closing = True


class Feeding:
    """An owner that always has some small chunks for one write."""

    def __init__(self) -> None:
        data = memoryview(bytes(CHUNK_BYTES))
        sender: Any = None
        self._chunks = [
            Outgoing(sender, Cut(number, 0, 0, 0, 0, data, 1), bytes(HEADER_BYTES), data) for number in range(CHUNKS)
        ]

    def lane_event(self, channel: Channel, event: Event) -> None:
        raise AssertionError(event)

    def destination(self, channel: Channel, chunk: FrameHeader) -> memoryview | None:
        return None

    def next_outgoing(self, channel: Channel) -> Sequence[Outgoing]:
        return self._chunks

    def chunks_sent(self, chunks: Sequence[Outgoing]) -> None:
        pass

    def lane_lost(self, channel: Channel, reason: str) -> None:
        pass


async def test_a_channel_lets_the_loop_go_on() -> None:
    """However fast the lane is, and however many chunks a write has: after TURN_BYTES it is the others' turn."""
    lane = SwiftLane()
    channel = Channel(Feeding(), time.monotonic, "far")
    channel.connected(lane)
    channel.wake()
    for turn in range(1, 4):
        await asyncio.sleep(0)
        assert turn * TURN_BYTES <= lane.taken_bytes < turn * (TURN_BYTES + WRITE_BYTES)
    channel.abort("over")
