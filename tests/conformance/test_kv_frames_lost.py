"""A lane that dies with a control frame on it: whichever that is, both sides come to the same end."""

from __future__ import annotations

import asyncio
import secrets

import pytest
from prfaas.common.errors import TransferCancelledError
from prfaas.transport.api import KvSender
from prfaas.transport.fetching import FetchRequest
from prfaas.transport.frames import FrameHeader, FrameType, Resume, encode_control
from prfaas.transport.lanes.tcp import TcpBackend

from tests.conformance.kv_harness import (
    SOON_S,
    FaultyBackend,
    MakeBackend,
    RawLane,
    dense,
    open_body,
    pair,
    spec_of,
)


def lose(faults: FaultyBackend, type: FrameType, times: int, *, all_lanes: bool) -> list[int]:
    """The lanes that bring the next frames of that type die before it has come, or all lanes do. [How many are left]"""
    left = [times]

    def header(head: FrameHeader) -> bool:
        if left[0] and head.type == type:
            left[0] -= 1
            bringing = [handler for handler in faults.lanes if handler.open and handler.at_header is head]
            for handler in [h for h in faults.lanes if h.open] if all_lanes else bringing:
                handler.lane.abort()
        return False

    faults.garble = header
    return left


@pytest.mark.parametrize("all_lanes", [False, True], ids=["its-lane", "all-lanes"])
@pytest.mark.parametrize("type", ["OPEN", "OPENED", "CREDIT", "FINISH", "ACK", "FETCH", "FETCHED", "PING", "PONG"])
async def test_a_lost_frame_is_made_up_for(
    faulty: MakeBackend, faults: list[FaultyBackend], type: str, all_lanes: bool
) -> None:
    """Twice in a row: transfers and a fetch are completed all the same."""
    async with pair(faulty, dense(), lanes=2, ping_s=0.1, codec="raw") as p:
        await p.send()
        fetched = p.offer(spec_of(p.layout), seed=7, sender=p.far)
        tasks = []

        async def send(sender: KvSender) -> None:
            await sender.open()
            fetched.put_all()

        def serve(_request: FetchRequest, sender: KvSender) -> None:
            fetched.sender = sender
            tasks.append(asyncio.create_task(send(sender)))

        p.far.on_fetch(serve)
        left = lose(faults[0], FrameType[type], 2, all_lanes=all_lanes)
        async with asyncio.timeout(2 * SOON_S):
            await p.near.fetch(fetched.ticket, b"h", "far", p.far.addresses)
            await p.send(seed=1)
            await asyncio.gather(*tasks)
            await fetched.complete()
            seed = 2
            while left[0] and not type.startswith("FETCH"):
                await p.send(seed=seed)
                await p.send_back(seed=seed)
                seed += 1


async def test_a_cancel_that_went_down_with_each_lane_in_turn_is_made_up_for() -> None:
    """The sender's CANCEL left on both lanes, both were cut off, but never at one time, so the session was never
    without a lane: after each loss both sides say what they still send, and the memory is freed."""
    async with pair(TcpBackend, dense(1)) as p:
        session = secrets.token_hex(16)
        lanes = [await RawLane.dial(p.far.addresses[0], session=session, lane=i) for i in range(2)]
        transfer = p.offer(spec_of(p.layout, (0, 100)))
        lanes[0].writer.write(encode_control(open_body(transfer), 1))
        assert (await lanes[0].until(FrameType.OPENED)).credit_bytes
        await lanes[0].aclose()
        asked = await lanes[1].until(FrameType.RESUME)
        assert not asked.answer
        lanes[1].writer.write(encode_control(Resume([], 1, answer=True)))
        async with asyncio.timeout(SOON_S):
            with pytest.raises(TransferCancelledError):
                await transfer.receiver.finished()
        await transfer.receiver.aclose()
        await lanes[1].aclose()
