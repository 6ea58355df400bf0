"""Lanes that die: one, one after the other, all at once, for good, and with a peer that has begun anew."""

from __future__ import annotations

import asyncio
import time

import pytest
from prfaas.common.errors import LaneLostError, TransferCancelledError
from prfaas.transport.frames import FrameHeader

from tests.conformance.kv_harness import SOON_S, FaultyBackend, MakeBackend, Pair, dense, pair, spec_of


class Killer:
    """Aborts lanes as chunks arrive: every `every`-th, the lane that brings it; with `all`, all lanes at once."""

    def __init__(self, faults: FaultyBackend, *, every: int, times: int, all: bool = False) -> None:
        self.faults = faults
        self.every = every
        self.left = times
        self.all = all
        self.seen = 0
        faults.on_chunk = self.chunk

    def chunk(self, _header: FrameHeader) -> None:
        self.seen += 1
        if self.left and self.seen % self.every == 0:
            self.left -= 1
            open_lanes = [handler.lane for handler in self.faults.lanes if handler.open]
            for lane in open_lanes if self.all else open_lanes[self.seen % len(open_lanes) :][:1]:
                asyncio.get_running_loop().call_soon(lane.abort)


@pytest.mark.parametrize("codec", ["raw", "zstd"])
async def test_a_lane_that_dies_costs_only_what_was_on_it(
    faulty: MakeBackend, faults: list[FaultyBackend], codec: str
) -> None:
    """The others send its chunks again meanwhile: the same bytes arrive, no transfer fails."""
    async with pair(faulty, dense(layers=8), codec=codec) as p:
        await p.send()
        killer = Killer(faults[0], every=5, times=1)
        transfer = await p.send(seed=1)
        assert killer.left == 0
        assert transfer.errors == []


async def test_lanes_that_die_one_after_the_other(faulty: MakeBackend, faults: list[FaultyBackend]) -> None:
    """A dozen deaths in one transfer: chunks half received, acknowledgements lost, FINISH lost."""
    async with pair(faulty, dense(layers=16)) as p:
        await p.send()
        killer = Killer(faults[0], every=9, times=12)
        await p.send(seed=1)
        assert killer.left < 12
        await p.send_back(seed=2)


@pytest.mark.parametrize("lanes", [1, 3])
async def test_a_transfer_survives_the_loss_of_all_lanes(
    faulty: MakeBackend, faults: list[FaultyBackend], lanes: int
) -> None:
    """Both directions, in the middle: they wait for new lanes of the same session and go on."""
    async with pair(faulty, dense(layers=8), lanes=lanes) as p:
        await p.send()
        back = p.offer(spec_of(p.layout), seed=3, sender=p.far)
        await back.sender.open()
        killer = Killer(faults[0], every=7, times=2, all=True)
        back.put_all()
        await p.send(seed=1)
        await back.complete()
        assert killer.left < 2


async def test_open_is_asked_again_when_its_answer_went_down_with_the_lanes(
    faulty: MakeBackend, faults: list[FaultyBackend]
) -> None:
    """The memory is reserved once, the answer given twice."""
    async with pair(faulty, dense()) as p:
        await p.send()
        transfer = p.offer(spec_of(p.layout), seed=1)
        reserved = []

        def reserve(spec: object) -> object:
            reserved.append(spec)
            for handler in faults[0].lanes:
                if handler.open:
                    handler.lane.abort()  # before the answer can leave
            return transfer.reserve(spec)

        transfer.receiver.bind(reserve, transfer.on_layer, transfer.errors.append)
        async with asyncio.timeout(SOON_S):
            await transfer.sender.open()
        transfer.put_all()
        await transfer.complete()
        assert len(reserved) == 1


@pytest.mark.parametrize("side", ["sender", "receiver"])
async def test_what_is_cancelled_while_no_lane_is_up_ends_on_the_other_side_too(
    faulty: MakeBackend, faults: list[FaultyBackend], side: str
) -> None:
    """The CANCEL can't be sent; the first lane afterwards tells."""
    async with pair(faulty, dense()) as p:
        await p.send()
        transfer = p.offer(spec_of(p.layout), seed=1)
        await transfer.sender.open()
        transfer.sender.put(transfer.pieces(0))
        await transfer.until_layer(0)
        lost = asyncio.create_task(faults[0].until_lost(2 * p.config.lanes))
        for handler in faults[0].lanes:
            handler.lane.abort()
        await lost
        await getattr(transfer, side).aclose("no longer wanted")
        other = transfer.receiver.finished() if side == "sender" else transfer.sender.done()
        async with asyncio.timeout(SOON_S):
            with pytest.raises(TransferCancelledError):
                await other
        await transfer.sender.aclose()
        await transfer.receiver.aclose()
        await p.send(seed=2)


async def test_no_new_lane_in_time_is_one_clear_error(backend: MakeBackend) -> None:
    """`transport.resume_s` after the last lane, on both sides, and it says so."""
    async with pair(backend, dense(), resume_s=0.3) as p:
        await p.send()
        transfer = p.offer(spec_of(p.layout), seed=1)
        await transfer.sender.open()
        await vanish(p)
        async with asyncio.timeout(SOON_S):
            with pytest.raises(LaneLostError, match=r"within 0\.3 s"):
                await transfer.sender.done()
            with pytest.raises(LaneLostError, match=r"within 0\.3 s"):
                await transfer.receiver.finished()
        await transfer.sender.aclose()
        await transfer.receiver.aclose()


async def vanish(p: Pair) -> None:
    """`near` is cut off: its lanes die without a word and nothing answers its dialling any more."""
    listener = p.far._listener
    assert listener is not None
    await listener.aclose()
    for dialler in p.near._dialled.values():
        for channel in dialler.session.channels():
            channel.abort("cut")


async def test_a_peer_that_leaves_is_not_waited_for(backend: MakeBackend) -> None:
    """It says that it closes: transfers fail at once, not after `resume_s`."""
    async with pair(backend, dense(), resume_s=3600.0) as p:
        await p.send()
        transfer = p.offer(spec_of(p.layout), seed=1)
        await transfer.sender.open()
        await p.far.aclose()
        async with asyncio.timeout(SOON_S):
            with pytest.raises((LaneLostError, TransferCancelledError)):
                await transfer.sender.done()
        await transfer.sender.aclose()


async def test_a_peer_that_has_begun_anew_does_not_know_the_session(
    faulty: MakeBackend, faults: list[FaultyBackend]
) -> None:
    """Killed and started again at its address: the old transfers fail as soon as it answers, new ones work."""
    async with pair(faulty, dense(), resume_s=3600.0) as p:
        await p.send()
        transfer = p.offer(spec_of(p.layout), seed=1)
        await transfer.sender.open()
        address = p.far.addresses[0]
        far = p.far
        far._accepted.clear()  # as a new process: it knows nothing
        assert far._listener is not None
        for handler in faults[0].lanes:
            if handler.open:
                handler.lane.abort()
        started_s = time.monotonic()
        async with asyncio.timeout(SOON_S):
            with pytest.raises(LaneLostError, match="restarted"):
                await transfer.sender.done()
        assert time.monotonic() - started_s < SOON_S
        assert far.addresses[0] == address
        await transfer.sender.aclose()
        await transfer.receiver.aclose()
        await p.send(seed=2)
