"""When sessions are opened, kept and closed: peers that move, routers that disagree, sessions that nobody needs."""

from __future__ import annotations

import contextlib

import pytest
import structlog
from prfaas.common.errors import PeerRefusedError
from prfaas.transport.api import KvAddress

from tests.conformance.kv_harness import FaultyBackend, MakeBackend, dense, pair, spec_of

# -- where a node is --------------------------------------------------------------------------------------------------


async def test_routers_that_disagree_end_no_session(faulty: MakeBackend, faults: list[FaultyBackend]) -> None:
    """Heartbeat answers tell a node's addresses in another order, or an address where nobody is: the open transfer goes
    on, and the next one finds the same lanes."""
    async with pair(faulty, dense()) as p:
        await p.send()
        lanes = list(faults[0].lanes)
        [here] = p.far.addresses
        second_rank, stale = KvAddress(here.host, 9, rank=1), KvAddress("127.0.0.1", 9)
        transfer = p.offer(spec_of(p.layout))
        await transfer.sender.open()
        for addresses in ([second_rank, here], [stale], [here, second_rank], [stale], [here]):
            p.near.connect("far", addresses)
        transfer.put_all()
        await transfer.complete()
        await p.send(seed=1)
        assert len(lanes) == 2 * p.config.lanes
        assert not any(handler.lane for handler in faults[0].lanes[len(lanes) :])


async def test_a_node_that_moved_is_reached_where_it_is_now(backend: MakeBackend) -> None:
    """The process is dead and a new one listens elsewhere under the same name."""
    async with pair(backend, dense()) as p:
        await p.send()
        await p.far.aclose()
        p.far = p.endpoint("far")
        await p.far.start()
        p.near.connect("far", p.far.addresses)
        await p.send(seed=1)


async def test_a_ticket_goes_to_the_process_that_issued_it(backend: MakeBackend) -> None:
    """The node was started elsewhere while its old process lives on: what is under way to the old one is completed,
    what the new one has asked for goes to the new one; also when the heartbeats still tell the old address."""
    async with pair(backend, dense()) as p:
        before = p.offer(spec_of(p.layout))
        await before.sender.open()
        old, p.far = p.far, p.endpoint("far")
        await p.far.start()
        try:
            p.near.connect("far", old.addresses)
            await p.send(seed=1)
            before.put_all()
            await before.complete()
        finally:
            await old.aclose()


async def test_who_answers_must_be_the_node_that_was_dialled(backend: MakeBackend) -> None:
    """Another node of the cluster listens where a router said this one would: a clear error that names both, at once,
    and no byte of KV for the wrong one."""
    async with pair(backend, dense()) as p, contextlib.aclosing(p.endpoint("third")) as third:
        await third.start()
        transfer = p.offer(spec_of(p.layout))
        await transfer.sender.aclose()
        transfer.sender = p.near.sender(transfer.ticket, "far", third.addresses)
        with pytest.raises(PeerRefusedError, match="third answers where far was dialled"):
            await transfer.sender.open()
        await transfer.receiver.aclose()
        await p.send()


# -- sessions that nobody needs ---------------------------------------------------------------------------------------


async def test_an_idle_session_closes_on_both_sides(faulty: MakeBackend, faults: list[FaultyBackend]) -> None:
    """By itself, when nobody has asked for it for `idle_s`; whoever needs it later opens it again."""
    async with pair(faulty, dense(), idle_s=0.1) as p:
        await p.send()
        await faults[0].until_lost(2 * p.config.lanes)
        assert p.near.clock("far") is None
        assert p.far.clock("near") is None
        await p.send(seed=1)


async def test_a_session_is_not_closed_under_a_transfer(faulty: MakeBackend, faults: list[FaultyBackend]) -> None:
    """Nor under a sender that waits for its turn before it opens: the idle time begins when they have ended. A sender
    that was closed, or dropped, without having opened holds nothing."""
    async with pair(faulty, dense(), idle_s=0.1) as p, contextlib.aclosing(p.endpoint("other")) as other:
        await other.start()
        await p.send()
        lanes = len(faults[0].lanes)
        for opened in (False, True):
            transfer = p.offer(spec_of(p.layout))
            if opened:
                await transfer.sender.open()
            before = len(faults[0].lanes)
            p.near.connect("other", other.addresses)  # asked for later, and closed when that was too long ago
            await faults[0].until_lost(lanes, after=before)
            assert all(handler.open for handler in faults[0].lanes[:lanes])
            if not opened:
                await transfer.sender.open()
            transfer.put_all()
            await transfer.complete()
        closed, dropped = p.offer(spec_of(p.layout)), p.offer(spec_of(p.layout))
        await closed.sender.aclose()
        dropped.sender = None
        await faults[0].until_lost(lanes)


async def test_a_node_that_is_somewhere_else_each_time_holds_few_sessions(backend: MakeBackend) -> None:
    """Its earlier addresses make room, except where a transfer is."""
    async with pair(backend, dense()) as p:
        transfer = p.offer(spec_of(p.layout))
        await transfer.sender.open()
        with structlog.testing.capture_logs() as logs:
            for port in range(60000, 60020):
                p.near.connect("far", [KvAddress("127.0.0.1", port)])
        assert len([entry for entry in logs if entry["event"] == "kv session closed"]) == 16, logs
        transfer.put_all()
        await transfer.complete()
