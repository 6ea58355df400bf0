"""dial = "receiver": the side that receives opens sessions, since it can't be reached from the other."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import pytest
from prfaas.common.errors import LaneLostError
from prfaas.transport.api import KvAddress, KvSender
from prfaas.transport.endpoint import KvEndpoint
from prfaas.transport.fetching import FetchRequest
from prfaas.transport.lanes import connecting

from tests.conformance.kv_harness import (
    SOON_S,
    FaultyBackend,
    MakeBackend,
    Pair,
    dense,
    pair,
    spec_of,
)

NOWHERE = [KvAddress("127.0.0.1", 9)]
"""What a node behind NAT advertises: nobody answers there."""


@asynccontextmanager
async def behind_nat(backend: MakeBackend, **settings: object) -> AsyncIterator[Pair]:
    """`near` receives and dials, `far` sends and can't reach it. Nothing has been dialled yet."""
    async with pair(backend, dense(), dial="receiver", **settings) as p:
        await p.near.aclose()
        p.near = Hidden(p.endpoint("near"))
        await p.near.start()
        yield p


class Hidden:
    """An endpoint whose addresses lead nowhere."""

    addresses = NOWHERE

    def __init__(self, endpoint: KvEndpoint) -> None:
        self._endpoint = endpoint

    def __getattr__(self, name: str) -> object:
        return getattr(self._endpoint, name)


async def test_the_receiver_dials(backend: MakeBackend) -> None:
    """Its one outgoing connection is enough, before and after; and for what it sends itself."""
    async with behind_nat(backend) as p:
        p.near.connect("far", p.far.addresses)
        await p.send_back(seed=1)
        await p.send(seed=2)
        await p.send_back(seed=3)


async def test_a_request_that_is_faster_than_the_receivers_dialling_waits_for_it(backend: MakeBackend) -> None:
    """OPEN leaves when the session is there."""
    async with behind_nat(backend) as p:
        transfer = p.offer(spec_of(p.layout), sender=p.far)
        opening = asyncio.create_task(transfer.sender.open())
        await asyncio.sleep(0)
        p.near.connect("far", p.far.addresses)
        async with asyncio.timeout(SOON_S):
            await opening
        transfer.put_all()
        await transfer.complete()


async def test_a_receiver_that_never_dials_is_one_clear_error(backend: MakeBackend) -> None:
    """Within open_timeout_s."""
    async with behind_nat(backend, open_timeout_s=0.2) as p:
        transfer = p.offer(spec_of(p.layout), sender=p.far)
        with pytest.raises(LaneLostError, match=r"no lane to near within 0\.2 s.*transport\.dial"):
            await transfer.sender.open()
        await transfer.sender.aclose()
        await transfer.receiver.aclose()


async def test_a_session_of_ours_that_leads_nowhere_is_no_way(backend: MakeBackend) -> None:
    """The sender was told to dial too (it receives as well): the receiver's session is what is up, and is used."""
    async with behind_nat(backend) as p:
        p.near.connect("far", p.far.addresses)
        await p.send_back(seed=1)
        p.far.connect("near", NOWHERE)
        await p.send_back(seed=2)


async def test_the_sessions_of_both_directions_serve(backend: MakeBackend) -> None:
    """Where both can be reached, and each dials for what it receives."""
    async with pair(backend, dense(), dial="receiver") as p:
        p.far.connect("near", p.near.addresses)
        await asyncio.gather(p.send(seed=1), p.send_back(seed=2))
        await asyncio.gather(p.send(seed=3), p.send_back(seed=4))


async def test_who_fetches_receives_and_so_dials(backend: MakeBackend) -> None:
    """A holder that no router has told us of: FETCH needs no session before."""
    async with behind_nat(backend) as p:
        transfer = p.offer(spec_of(p.layout), sender=p.far)
        tasks = []

        async def send(sender: KvSender) -> None:
            await sender.open()
            transfer.put_all()

        def serve(_request: FetchRequest, sender: KvSender) -> None:
            transfer.sender = sender
            tasks.append(asyncio.create_task(send(sender)))

        p.far.on_fetch(serve)
        async with asyncio.timeout(SOON_S):
            await p.near.fetch(transfer.ticket, b"h", "far", p.far.addresses)
            await asyncio.gather(*tasks)
        await transfer.complete()


async def test_the_newest_session_is_the_one(faulty: MakeBackend, faults: list[FaultyBackend]) -> None:
    """The receiver was started anew while the lanes of its old process look alive: tickets of the new one work."""
    async with behind_nat(faulty) as p:
        p.near.connect("far", p.far.addresses)
        await p.send_back(seed=1)
        old, p.near = p.near, Hidden(p.endpoint("near"))
        await p.near.start()
        try:
            p.near.connect("far", p.far.addresses)
            await p.send(seed=2)
            await p.send_back(seed=3)
        finally:
            await old.aclose()
        await p.send_back(seed=4)


async def test_lanes_that_die_are_dialled_again_by_the_receiver(
    faulty: MakeBackend, faults: list[FaultyBackend]
) -> None:
    """All at once, in the middle of a transfer."""
    async with behind_nat(faulty) as p:
        p.near.connect("far", p.far.addresses)
        transfer = p.offer(spec_of(p.layout), sender=p.far)
        await transfer.sender.open()
        transfer.sender.put(transfer.pieces(0))
        await transfer.until_layer(0)
        for handler in faults[0].lanes:
            if handler.open:
                handler.lane.abort()
        for layer in range(1, 4):
            transfer.sender.put(transfer.pieces(layer))
        transfer.sender.finish({})
        await transfer.complete()


async def test_a_ticket_goes_to_the_process_that_issued_it_though_another_has_its_name(backend: MakeBackend) -> None:
    """The node was started elsewhere while its old process lives on and dials too: the name alone does not say which
    session leads to whom. One whose process has not dialled yet waits for it."""
    async with behind_nat(backend) as p:
        p.near.connect("far", p.far.addresses)
        await p.send_back(seed=1)
        old, new = p.near, Hidden(p.endpoint("near"))
        await new.start()
        try:
            p.near = new
            early = p.offer(spec_of(p.layout), sender=p.far)
            opening = asyncio.create_task(early.sender.open())
            p.near = old
            await p.send_back(seed=2)
            new.connect("far", p.far.addresses)
            async with asyncio.timeout(SOON_S):
                await opening
            early.put_all()
            await early.complete()
            for seed in range(3, 6):
                p.near = old if seed % 2 else new
                await p.send_back(seed=seed)
        finally:
            p.near = old
            await new.aclose()


async def test_a_dialled_session_to_another_process_of_the_name_is_no_way(backend: MakeBackend) -> None:
    """The sender was told the old process's address, and its session there comes up before the one that the ticket's
    process dials: OPEN waits for that one."""
    async with behind_nat(backend) as p, contextlib.aclosing(p.endpoint("near")) as old:
        await old.start()
        p.far.connect("near", old.addresses)
        transfer = p.offer(spec_of(p.layout), sender=p.far)
        opening = asyncio.create_task(transfer.sender.open())
        [dialler] = p.far._dialled.values()
        async with asyncio.timeout(SOON_S):
            await dialler.usable()
            await asyncio.sleep(0)  # who waits for it wakes
            p.near.connect("far", p.far.addresses)
            await opening
        transfer.put_all()
        await transfer.complete()


@pytest.mark.parametrize("kind", ["tcp", "tls"])
async def test_names_that_do_not_resolve_keep_no_address_waiting(backend: MakeBackend) -> None:
    """The loop's threads all wait for a resolver that doesn't answer; an address needs none."""
    answers = threading.Event()
    async with pair(backend, dense()) as p:
        threads = ThreadPoolExecutor(1)
        asyncio.get_running_loop().set_default_executor(threads)
        threads.submit(answers.wait)
        try:
            async with asyncio.timeout(SOON_S):
                await p.send()
        finally:
            answers.set()


@asynccontextmanager
async def blackhole() -> AsyncIterator[tuple[str, int]]:
    """An address that answers no SYN: its queue of connections that nobody accepts is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.2", 0))
        listener.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield listener.getsockname()


@pytest.mark.parametrize("kind", ["tcp", "tls"])
async def test_an_address_of_a_name_that_leads_nowhere_keeps_no_lane_away(
    backend: MakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a name's IPv6 address often does: the next is tried beside it, long before the time for a lane is over."""
    async with pair(backend, dense(), open_timeout_s=60.0) as p, blackhole() as nowhere:
        [here] = p.far.addresses

        async def resolve(host: str, port: int, **_: object) -> list[object]:
            assert host == "far.example"
            found = [nowhere, (here.host, here.port)]
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in found]

        monkeypatch.setattr(connecting, "resolve", resolve)
        transfer = p.offer(spec_of(p.layout))
        await transfer.sender.aclose()
        transfer.sender = p.near.sender(transfer.ticket, "far", [KvAddress("far.example", here.port)])
        async with asyncio.timeout(SOON_S):
            await transfer.sender.open()
        transfer.put_all()
        await transfer.complete()
