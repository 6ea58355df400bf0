"""Everything at once: many transfers in both directions, some cancelled, while lanes die at random."""

from __future__ import annotations

import asyncio
import random

import pytest
from prfaas.common.errors import TransferError
from prfaas.transport.frames import FrameHeader

from tests.conformance.kv_harness import SOON_S, FaultyBackend, MakeBackend, Pair, Transfer, dense, pair, spec_of


async def one(p: Pair, rng: random.Random, seed: int) -> str:
    """A transfer, perhaps ended by one of its sides in the middle; its outcome."""
    transfer = p.offer(spec_of(p.layout, (0, rng.randrange(1, 300))), seed=seed, sender=rng.choice([p.near, p.far]))
    fate = rng.choice(["whole", "whole", "sender", "receiver"])
    try:
        await transfer.sender.open()
        for layer in range(4):
            transfer.sender.put(transfer.pieces(layer, step_bytes=rng.choice([None, 999])))
            await asyncio.sleep(0)
            if layer == 2 and fate != "whole":
                await getattr(transfer, fate).aclose("no longer wanted")
                break
        else:
            transfer.sender.finish({})
        await ended(transfer)
    except TransferError:
        if fate == "whole":
            raise
    finally:
        await transfer.sender.aclose()
        await transfer.receiver.aclose()
    if fate == "whole":
        assert transfer.destination.rows == transfer.source
        assert transfer.errors == []
    return fate


async def ended(transfer: Transfer) -> None:
    """Both sides must hear of it, whichever way it ends."""
    for half in await asyncio.gather(transfer.sender.done(), transfer.receiver.finished(), return_exceptions=True):
        if isinstance(half, BaseException):
            raise half


@pytest.mark.parametrize("codec", ["raw", "zstd"])
@pytest.mark.parametrize("seed", range(3))
async def test_lanes_die_at_random_under_many_transfers(
    faulty: MakeBackend, faults: list[FaultyBackend], seed: int, codec: str
) -> None:
    """Each transfer that nobody cancels is completed byte for byte; each that is ends on both sides; and nothing is
    kept of any."""
    rng = random.Random(seed)
    async with pair(faulty, dense(), codec=codec, lanes=3, ping_s=0.1) as p:
        await p.send()
        seen = 0

        def chunk(_header: FrameHeader) -> None:
            nonlocal seen
            seen += 1
            if seen % 60 == 0 and seen <= 720:
                lanes = [handler.lane for handler in faults[0].lanes if handler.open]
                for lane in rng.sample(lanes, rng.choice([1, 1, 2, len(lanes)]) if len(lanes) > 1 else len(lanes)):
                    asyncio.get_running_loop().call_soon(lane.abort)

        faults[0].on_chunk = chunk
        async with asyncio.timeout(3 * SOON_S):
            fates = await asyncio.gather(*(one(p, rng, number) for number in range(24)))
        assert set(fates) == {"whole", "sender", "receiver"}
        faults[0].on_chunk = lambda _header: None
        await p.send(seed=100)
        await p.send_back(seed=101)
        sessions = [*p.far._accepted.values(), *(dialler.session for dialler in p.near._dialled.values())]
        assert [(len(s._senders), len(s._receivers)) for s in sessions] == [(0, 0)] * 2
        for node in (p.near, p.far):
            assert not node._receivers
            assert not node._book._issued
