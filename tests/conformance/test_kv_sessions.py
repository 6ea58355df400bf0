"""When sessions are opened, kept and closed: peers that move, routers that disagree, sessions that nobody needs."""

from __future__ import annotations

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


# -- sessions that nobody needs ---------------------------------------------------------------------------------------


async def test_a_session_is_not_closed_under_a_sender_that_will_open(
    faulty: MakeBackend, faults: list[FaultyBackend]
) -> None:
    """Prefill waits for its turn between `sender` and `open`: `forget` leaves the lanes until that transfer has ended;
    a sender that was closed, or dropped, without having opened holds nothing."""
    async with pair(faulty, dense()) as p:
        await p.send()
        lanes = len(faults[0].lanes)
        transfer = p.offer(spec_of(p.layout))
        p.near.forget("far")
        await transfer.sender.open()
        transfer.put_all()
        await transfer.complete()
        assert len(faults[0].lanes) == lanes
        closed, dropped = p.offer(spec_of(p.layout)), p.offer(spec_of(p.layout))
        await closed.sender.aclose()
        dropped.sender = None
        p.near.forget("far")
        assert p.near.clock("far") is None
