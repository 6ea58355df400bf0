"""FETCH: a node asks another for the KV of a token range; what comes is a transfer like any other."""

from __future__ import annotations

import asyncio

import pytest
from prfaas.common.errors import LaneLostError, PeerRefusedError, TransferCancelledError
from prfaas.transport.api import KvAddress, KvSender
from prfaas.transport.fetching import FetchRequest

from tests.conformance.kv_harness import SOON_S, FaultyBackend, MakeBackend, Pair, Transfer, dense, pair, spec_of

PREFIX = b"h" * 16


class Holder:
    """Holds one prefix, and sends what is asked of it from a task of its own."""

    def __init__(self, transfer: Transfer) -> None:
        self.transfer = transfer
        self.requests: list[FetchRequest] = []
        self.tasks: list[asyncio.Task[None]] = []

    def serve(self, request: FetchRequest, sender: KvSender) -> str | None:
        self.requests.append(request)
        if request.prefix_hash != PREFIX:
            return "this prefix is not here"
        self.transfer.sender = sender
        self.tasks.append(asyncio.create_task(self.send(sender)))
        return None

    async def send(self, sender: KvSender) -> None:
        await sender.open()
        self.transfer.put_all()


def wanted(p: Pair, seed: int = 1) -> Transfer:
    """A transfer that `near` wants from `far`."""
    spec = spec_of(p.layout, (64, 640))
    transfer = p.offer(spec, seed=seed, sender=p.far)
    transfer.sender = None
    return transfer


async def test_a_range_of_a_prefix_is_fetched(backend: MakeBackend) -> None:
    """Byte for byte, over the session that the asking side dialled; the holder learns who asks for what."""
    async with pair(backend, dense()) as p:
        transfer = wanted(p)
        holder = Holder(transfer)
        p.far.on_fetch(holder.serve)
        async with asyncio.timeout(SOON_S):
            await p.near.fetch(transfer.ticket, PREFIX, "far", p.far.addresses, 60.0)
            await asyncio.gather(*holder.tasks)
        await transfer.complete()
        (request,) = holder.requests
        assert (request.node, request.prefix_hash, request.spec.tokens) == ("near", PREFIX, transfer.spec.tokens)
        assert request.remaining_s == pytest.approx(60.0)


async def test_the_accepting_side_may_ask_too(backend: MakeBackend) -> None:
    """Sessions are symmetric."""
    async with pair(backend, dense()) as p:
        await p.send()
        transfer = p.offer(spec_of(p.layout), seed=1)
        holder = Holder(transfer)
        p.near.on_fetch(holder.serve)
        async with asyncio.timeout(SOON_S):
            await p.far.fetch(transfer.ticket, PREFIX, "near", [])
            await asyncio.gather(*holder.tasks)
        await transfer.complete()


@pytest.mark.parametrize(
    ("prefix", "serving", "text"),
    [
        (b"other", True, "this prefix is not here"),
        (PREFIX, False, "holds no prefixes"),
        (b"", True, "hash of 0 bytes"),
        (b"x" * 65, True, "hash of 65 bytes"),
    ],
)
async def test_what_is_not_there_is_refused_with_its_reason(
    backend: MakeBackend, prefix: bytes, serving: bool, text: str
) -> None:
    """The session goes on."""
    async with pair(backend, dense()) as p:
        transfer = wanted(p)
        if serving:
            p.far.on_fetch(Holder(transfer).serve)
        with pytest.raises(PeerRefusedError, match=text):
            await p.near.fetch(transfer.ticket, prefix, "far", p.far.addresses)
        await transfer.receiver.aclose()
        await p.send()


async def test_what_waits_for_its_turn_is_bounded(backend: MakeBackend) -> None:
    """A holder that opens late, or never, is not made to hold more of them than transfers may be open; those that end
    make room."""
    async with pair(backend, dense(), max_transfers=2) as p:
        agreed: list[KvSender] = []

        def serve(_request: FetchRequest, sender: KvSender) -> None:
            agreed.append(sender)

        p.far.on_fetch(serve)
        transfers = [wanted(p) for _ in range(4)]
        for transfer in transfers[:2]:
            await p.near.fetch(transfer.ticket, PREFIX, "far", p.far.addresses)
        with pytest.raises(PeerRefusedError, match=r"too many fetches wait.*max_transfers"):
            await p.near.fetch(transfers[2].ticket, PREFIX, "far", p.far.addresses)
        await agreed[0].aclose()
        await p.near.fetch(transfers[3].ticket, PREFIX, "far", p.far.addresses)
        for sender in agreed:
            await sender.aclose()
        for transfer in transfers:
            await transfer.receiver.aclose()


@pytest.mark.parametrize("raises", [False, True])
async def test_the_sender_of_a_fetch_that_was_refused_is_dead(backend: MakeBackend, raises: bool) -> None:
    """Though the holder keeps it: it can't be opened after FETCHED has said no, and counts for nothing."""
    async with pair(backend, dense(), max_transfers=2) as p:
        refused: list[KvSender] = []

        def serve(_request: FetchRequest, sender: KvSender) -> str:
            refused.append(sender)
            if raises:
                raise ValueError("a bug")
            return "not here"

        p.far.on_fetch(serve)
        transfers = [wanted(p) for _ in range(4)]
        for transfer in transfers:
            with pytest.raises(PeerRefusedError, match=r"not here|its engine failed"):
                await p.near.fetch(transfer.ticket, PREFIX, "far", p.far.addresses)
        with pytest.raises(TransferCancelledError, match="FETCH was refused"):
            await refused[0].open()
        for transfer in transfers:
            await transfer.receiver.aclose()


async def test_a_holder_that_raises_refuses(backend: MakeBackend) -> None:
    """Its log says more; the lane stays."""

    def serve(_request: FetchRequest, _sender: KvSender) -> str | None:
        raise RuntimeError("broken")

    async with pair(backend, dense()) as p:
        transfer = wanted(p)
        p.far.on_fetch(serve)
        with pytest.raises(PeerRefusedError, match="engine failed"):
            await p.near.fetch(transfer.ticket, PREFIX, "far", p.far.addresses)
        await transfer.receiver.aclose()
        await p.send()


async def test_a_ticket_is_good_for_what_it_says_only(backend: MakeBackend) -> None:
    """One of another process is no permission: OPEN is refused, and the asking side has received nothing."""
    async with pair(backend, dense()) as p:
        stranger = p.endpoint("stranger")
        transfer = wanted(p)
        forged, receiver = stranger.receiver(transfer.spec)
        holder = Holder(transfer)
        p.far.on_fetch(holder.serve)
        async with asyncio.timeout(SOON_S):
            await p.near.fetch(forged, PREFIX, "far", p.far.addresses)
            (refused,) = await asyncio.gather(*holder.tasks, return_exceptions=True)
        assert "not issued by this process" in str(refused)
        assert transfer.destination is None
        await transfer.receiver.aclose()
        await receiver.aclose()
        await stranger.aclose()


async def test_lanes_that_die_lose_no_question(faulty: MakeBackend, faults: list[FaultyBackend]) -> None:
    """Asked while all lanes die: asked again on the next, served once."""
    async with pair(faulty, dense()) as p:
        await p.send()
        transfer = wanted(p)
        holder = Holder(transfer)

        def serve(request: FetchRequest, sender: KvSender) -> str | None:
            for handler in faults[0].lanes:
                if handler.open:
                    handler.lane.abort()  # before the answer can leave
            return holder.serve(request, sender)

        p.far.on_fetch(serve)
        async with asyncio.timeout(SOON_S):
            await p.near.fetch(transfer.ticket, PREFIX, "far", p.far.addresses)
            await asyncio.gather(*holder.tasks)
        await transfer.complete()
        assert len(holder.requests) == 1


async def test_nobody_answers(backend: MakeBackend) -> None:
    """One clear error within the time-out."""
    async with pair(backend, dense(), open_timeout_s=0.3) as p:
        transfer = wanted(p)
        nowhere = KvAddress("127.0.0.1", 65500)
        with pytest.raises(LaneLostError, match="FETCH"):
            await p.near.fetch(transfer.ticket, PREFIX, "nobody", [nowhere])
        await transfer.receiver.aclose()
