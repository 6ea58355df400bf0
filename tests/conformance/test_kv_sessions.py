"""When sessions are opened, kept and closed: peers that move, routers that disagree, sessions that nobody needs."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import itertools
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import structlog
from prfaas.common.errors import LaneLostError, PeerRefusedError, TransferCancelledError
from prfaas.transport.api import KvAddress
from prfaas.transport.endpoint import KvEndpoint
from prfaas.transport.frames import Error, FrameHeader, FrameType, Hello, Ping, encode_control
from prfaas.transport.handshake import signed
from prfaas.transport.lanes.tcp import TcpBackend
from prfaas.transport.ticket import TicketBook

from tests.conformance.kv_harness import (
    SECRET,
    SOON_S,
    FaultyBackend,
    MakeBackend,
    Pair,
    RawLane,
    dense,
    hello_body,
    pair,
    spec_of,
)

# -- what is told of links ----------------------------------------------------------------------------------------


async def test_the_session_that_has_carried_something_tells_of_the_link(backend: MakeBackend) -> None:
    """Beside a newer one to the same node that has not; when both are gone, nothing is told any more."""
    async with pair(backend, dense(4), idle_s=60.0) as p:
        await p.send(spec_of(p.layout, (0, 16384)))
        measured = p.near.link_estimates()["far"]
        assert measured.bandwidth_bytes_per_s > 0
        p.far.connect("near", p.near.addresses)
        await p.send_back(seed=1)
        p.near.connect("far", [KvAddress("127.0.0.1", 9, rank=1)])
        assert p.near.link_estimates()["far"].bandwidth_bytes_per_s > 0
        assert p.near.clock("far") is not None

        assert series(p.near) == {"far"}
        for dialler in list(p.near._dialled.values()):
            p.near._hang_up(dialler)
        await p.far.aclose()
        await asyncio.gather(*p.near._background)
        assert series(p.near) == set()


def series(endpoint: KvEndpoint) -> set[str]:
    """The peers that the metrics tell something of."""
    gauges = (endpoint.metrics.link.gauge, endpoint.metrics.codec.gauge)
    return {sample.labels["peer"] for gauge in gauges for metric in gauge.collect() for sample in metric.samples}


async def test_one_of_two_sessions_that_ends_takes_nothing_of_the_other_with_it(backend: MakeBackend) -> None:
    """Each side has dialled the other, as both do when heartbeats name them, and one needs its session no longer."""
    async with pair(backend, dense(), codec="zstd", idle_s=60.0) as p:
        await p.send()
        p.far.connect("near", p.near.addresses)
        [dialler] = p.far._dialled.values()
        async with asyncio.timeout(SOON_S):
            await dialler.usable()
        ends = dialler.session.channels()
        p.far._hang_up(dialler)
        await asyncio.gather(*(channel.closed for channel in ends), *p.far._background)
        codecs = p.far.metrics.codec.gauge.collect()
        assert {sample.labels["codec"] for metric in codecs for sample in metric.samples} == {"zstd"}
        await p.send(seed=1)


async def test_of_a_peer_that_never_answered_nothing_is_told(backend: MakeBackend) -> None:
    """Heartbeats name many that have gone already."""
    async with pair(backend, dense(), idle_s=60.0) as p:
        p.near.connect("ghost", [KvAddress("127.0.0.1", 9)])
        await p.send()
        assert series(p.near) == {"far"}


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


def link_local_address() -> str | None:
    """Of an interface of this machine, as `address%interface`; None where it has none."""
    if_inet6 = Path("/proc/net/if_inet6")
    for line in if_inet6.read_text().splitlines() if if_inet6.is_file() else []:
        digits, _, _, scope, _, interface = line.split()
        if int(scope, 16) == 0x20:
            return f"{ipaddress.IPv6Address(int(digits, 16))}%{interface}"
    return None


async def test_link_local_addresses() -> None:
    """IPv6 addresses that mean nothing without their interface: bound, advertised with it, dialled."""
    address = link_local_address()
    if address is None:
        pytest.skip("no interface has a link-local IPv6 address")
    async with pair(TcpBackend, dense(), bind=f"[{address}]:0") as p:
        assert p.far.addresses[0].host == address
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


async def test_a_session_is_not_closed_under_a_transfer(
    faulty: MakeBackend, faults: list[FaultyBackend], kind: str
) -> None:
    """Nor under a sender that waits for its turn before it opens: the idle time begins when they have ended. A sender
    that was closed, or dropped, without having opened holds nothing."""
    idle_s = 0.5 if kind == "ucx" else 0.1  # longer than lanes take to open
    async with pair(faulty, dense(), idle_s=idle_s) as p, contextlib.aclosing(p.endpoint("other")) as other:
        await other.start()
        waiting = p.offer(spec_of(p.layout))  # at each moment there is one, or the test would race with the idle time
        await p.send()
        lanes = faults[0].lanes[: p.config.lanes * 2]
        await idle_time_passes(p, faults[0], other)
        assert all(handler.open for handler in lanes)
        opened, waiting = waiting, p.offer(spec_of(p.layout))
        await opened.sender.open()
        await waiting.sender.aclose()
        dropped = p.offer(spec_of(p.layout))
        dropped.sender = None
        await idle_time_passes(p, faults[0], other)
        assert all(handler.open for handler in lanes)
        opened.put_all()
        await opened.complete()
        await faults[0].until_lost(len(lanes))


async def idle_time_passes(p: Pair, faults: FaultyBackend, other: KvEndpoint) -> None:
    """A session that was asked for later than the one under test has been closed because nobody used it."""
    before = len(faults.lanes)
    p.near.connect("other", other.addresses)
    await faults.until_lost(2 * p.config.lanes, after=before)


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


async def test_a_node_that_leaves_says_so_after_the_chunk_that_has_begun(
    faulty: MakeBackend, faults: list[FaultyBackend]
) -> None:
    """In the middle of a chunk an ERROR would be taken for its bytes, and a lane that is only cut makes the other side
    wait for the next one."""
    async with pair(faulty, dense(1), lanes=1, chunk_bytes=4 << 20, credit_bytes=32 << 20, resume_s=60.0) as p:
        transfer = p.offer(spec_of(p.layout, (0, 32768)))
        await transfer.sender.open()
        leaving: list[asyncio.Task[None]] = []

        def leave(_header: FrameHeader) -> None:
            if not leaving:
                leaving.append(asyncio.create_task(p.near.aclose()))

        faults[0].on_chunk = leave
        transfer.put_all()
        with pytest.raises(LaneLostError, match="lanes to near were lost: the node is shutting down"):
            async with asyncio.timeout(SOON_S):
                await transfer.receiver.finished()
        await leaving[0]
        await transfer.sender.aclose()
        await transfer.receiver.aclose()


async def test_a_node_that_leaves_while_much_comes_to_it_says_so(
    faulty: MakeBackend, faults: list[FaultyBackend]
) -> None:
    """A connection that is closed with bytes unread is reset, and a peer in the middle of writing sees that before it
    reads why: it would wait `resume_s` for a node that is gone."""
    async with pair(faulty, dense(2), lanes=2, chunk_bytes=1 << 20, credit_bytes=32 << 20, resume_s=60.0) as p:
        spec = functools.partial(spec_of, p.layout, (0, 65536))
        transfers = [p.offer(spec()), p.offer(spec(), sender=p.far)]
        for transfer in transfers:
            await transfer.sender.open()
        leaving: list[asyncio.Task[None]] = []
        chunks = itertools.count(1)

        def leave(_header: FrameHeader) -> None:
            if next(chunks) == 8:
                leaving.append(asyncio.create_task(p.near.aclose()))

        faults[0].on_chunk = leave
        for transfer in transfers:
            transfer.sender.put(transfer.pieces(0))
        with pytest.raises(LaneLostError, match="lanes to near were lost: the node is shutting down"):
            async with asyncio.timeout(SOON_S):
                await transfers[0].receiver.finished()
        await leaving[0]
        for transfer in transfers:
            await transfer.sender.aclose()
            await transfer.receiver.aclose()


async def test_a_lane_too_many_is_closed_when_what_it_took_has_arrived(
    faulty: MakeBackend, faults: list[FaultyBackend]
) -> None:
    """Closing one costs nothing: no chunk has to leave again on another."""
    async with pair(faulty, dense(2), lanes=3, chunk_bytes=1 << 20, credit_bytes=8 << 20) as p:
        transfer = p.offer(spec_of(p.layout, (0, 32768)))
        await transfer.sender.open()
        [dialler] = p.near._dialled.values()
        chunks, retired = itertools.count(1), []

        def fewer(_header: FrameHeader) -> None:
            if next(chunks) == 5:
                retired.extend(channel.closed for channel in dialler.session.channels() if channel.index)
                dialler._set_lanes(1)

        faults[0].on_chunk = fewer
        transfer.put_all()
        await transfer.complete()
        assert transfer.sender.report.moved_chunks == 0
        async with asyncio.timeout(SOON_S):
            await asyncio.gather(*retired)
        await p.send(seed=1)


# -- answers that come late -------------------------------------------------------------------------------------------


class Acceptor:
    """A KV port by hand: `hello` waits for a lane and its HELLO, `answer` and `refuse` say what becomes of it, `alive`
    that the other side still has it."""

    def __init__(self) -> None:
        self._lanes: asyncio.Queue[RawLane] = asyncio.Queue()

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[KvAddress]:
        ended = False
        async with contextlib.AsyncExitStack() as stack:

            async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                if ended:  # the other side dials again until it is closed, which is later
                    writer.close()
                    return
                lane = RawLane(reader, writer)
                stack.push_async_callback(lane.aclose)
                self._lanes.put_nowait(lane)

            server = await asyncio.start_server(accepted, "127.0.0.1", 0)
            stack.callback(server.close)
            try:
                yield KvAddress(*server.sockets[0].getsockname()[:2])
            finally:
                ended = True

    async def hello(self) -> tuple[RawLane, Hello]:
        async with asyncio.timeout(SOON_S):
            lane = await self._lanes.get()
        return lane, await lane.until(FrameType.HELLO)

    def answer(self, lane: RawLane, hello: Hello, *, epoch: str = "") -> None:
        body = hello_body(hello.session, hello.lane, hello.lanes, answer=True)
        body = msgspec.structs.replace(body, epoch=epoch)
        lane.writer.write(encode_control(signed(body, SECRET, hello.nonce)))

    async def alive(self, lane: RawLane) -> None:
        lane.writer.write(encode_control(Ping(1.0)))
        await lane.until(FrameType.PONG)

    async def refuse(self, lane: RawLane, code: str) -> None:
        lane.writer.write(encode_control(Error(code, "no")))
        await lane.until_closed()


@pytest.fixture
def acceptor() -> Acceptor:
    return Acceptor()


async def test_an_old_session_that_is_unknown_does_not_end_the_new_one(acceptor: Acceptor) -> None:
    """A lane resumes a session; before the answer comes all other lanes die and a new session begins. The answer, that
    the old one is unknown, then says nothing of the new one."""
    async with pair(TcpBackend, dense(), lanes=2, resume_s=0.0) as p, acceptor.listening() as address:
        p.near.connect("raw", [address])
        (first, _), (second, _) = hellos = [await acceptor.hello() for _ in range(2)]
        acceptor.answer(*hellos[0])
        await acceptor.alive(first)
        await second.aclose()
        late, resuming = await acceptor.hello()
        assert resuming.resume
        await first.aclose()
        fresh, beginning = await acceptor.hello()
        assert beginning.session != resuming.session
        acceptor.answer(fresh, beginning)
        await acceptor.alive(fresh)
        await acceptor.refuse(late, "unknown_session")
        _, joining = await acceptor.hello()
        assert (joining.session, joining.resume) == (beginning.session, True)
        await acceptor.alive(fresh)


async def test_a_late_answer_says_nothing_of_the_peer(acceptor: Acceptor) -> None:
    """The session ended meanwhile: neither what that process decodes nor who it was holds for the next one."""
    async with pair(TcpBackend, dense(), lanes=2, resume_s=0.0) as p, acceptor.listening() as address:
        p.near.connect("raw", [address])
        (first, begun), (second, late) = [await acceptor.hello() for _ in range(2)]
        acceptor.answer(first, begun, epoch="old")
        await acceptor.alive(first)
        assert "raw" in series(p.near)
        await first.aclose()
        _, fresh = await acceptor.hello()
        assert fresh.session != begun.session
        acceptor.answer(second, late, epoch="old")
        assert "ended while this lane was opened" in (await second.until(FrameType.ERROR)).detail
        assert "raw" not in series(p.near)


async def test_a_session_leads_to_one_process(acceptor: Acceptor) -> None:
    """Two of one name behind one address, or under one session's id: neither knows the other's transfers, so the second
    one's lane is refused with the reason, whoever has dialled, and the first one's goes on."""
    async with pair(TcpBackend, dense(), lanes=2) as p, acceptor.listening() as address:
        p.near.connect("raw", [address])
        hellos = [await acceptor.hello() for _ in range(2)]
        acceptor.answer(*hellos[0], epoch="one")
        await acceptor.alive(hellos[0][0])
        acceptor.answer(*hellos[1], epoch="two")
        error = await hellos[1][0].until(FrameType.ERROR)
        assert error.code == "hello_refused"
        assert "another process" in error.detail
        await acceptor.alive(hellos[0][0])
        dialled = await RawLane.dial(p.near.addresses[0], session="0" * 32)
        other = await RawLane.connect(p.near.addresses[0])
        hello = msgspec.structs.replace(hello_body("0" * 32, 1, 2), epoch="two")
        other.writer.write(encode_control(signed(hello, SECRET)))
        assert "another process" in (await other.until(FrameType.ERROR)).detail
        await acceptor.alive(dialled)
        for lane in (dialled, other):
            await lane.aclose()


async def test_one_refused_lane_is_not_the_sessions_refusal(acceptor: Acceptor) -> None:
    """It was refused while another lane was up. When that one dies too, a sender waits until a lane is back instead of
    failing for an old reason."""
    async with pair(TcpBackend, dense(), lanes=2) as p, acceptor.listening() as address:
        ticket = TicketBook(b"k" * 32, "raw").issue(spec_of(p.layout), 0.0)
        sender = p.near.sender(ticket, "raw", [address])
        hellos = [await acceptor.hello() for _ in range(2)]
        acceptor.answer(*hellos[0])
        await acceptor.alive(hellos[0][0])
        await acceptor.refuse(hellos[1][0], "hello_refused")
        again = await acceptor.hello()  # the refused lane: it has seen the refusal
        await hellos[0][0].aclose()
        other = await acceptor.hello()  # the lane that died
        opening = asyncio.create_task(sender.open())
        await asyncio.sleep(0)  # it has begun to wait
        acceptor.answer(*other)
        await other[0].until(FrameType.OPEN)
        await sender.aclose()
        with pytest.raises(TransferCancelledError):
            await opening
        await again[0].aclose()
