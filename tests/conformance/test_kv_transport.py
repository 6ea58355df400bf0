"""One suite that every backend of lanes must pass."""

from __future__ import annotations

import asyncio

import pytest
import structlog
from prfaas.common.errors import (
    ChecksumError,
    EngineError,
    LaneLostError,
    NoRoomError,
    PeerRefusedError,
    TicketError,
    TransferCancelledError,
)
from prfaas.common.kv_layout import Shard
from prfaas.transport.frames import FrameHeader

from tests.conformance.kv_harness import (
    SECRET,
    SOON_S,
    FaultyBackend,
    MakeBackend,
    dense,
    pair,
    spec_of,
)

# -- what must arrive -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["raw", "lz4", "zstd"])
async def test_every_kind_of_kv_arrives_byte_for_byte(backend: MakeBackend, codec: str) -> None:
    """Dense, windowed, latent, state and empty layers, with every codec."""
    async with pair(backend, codec=codec) as p:
        transfer = await p.send()
        assert transfer.receiver.report.raw_bytes == p.layout.total_bytes(transfer.spec.tokens)
        if codec != "raw":
            assert transfer.receiver.report.wire_bytes < transfer.receiver.report.raw_bytes


@pytest.mark.parametrize("tokens", [(0, 1), (300, 700), (690, 700), (0, 0), (700, 700)])
async def test_token_ranges(backend: MakeBackend, tokens: tuple[int, int]) -> None:
    """Any range: one token, token_start > 0, less than a window, nothing at all."""
    async with pair(backend) as p:
        await p.send(spec_of(p.layout, tokens))


@pytest.mark.parametrize("shard", [Shard(0, 2, 0, 1), Shard(1, 2, 1, 2)])
async def test_shards(backend: MakeBackend, shard: Shard) -> None:
    """Part of the heads; latents and states travel with shard 0 only."""
    async with pair(backend) as p:
        await p.send(spec_of(p.layout, shard=shard))


async def test_layers_are_reported_as_they_arrive(backend: MakeBackend) -> None:
    """A layer is usable on the decode side while prefill has not even put the next one."""
    async with pair(backend, dense()) as p:
        transfer = p.offer(spec_of(p.layout))
        await transfer.sender.open()
        for layer in range(4):
            transfer.sender.put(transfer.pieces(layer, step_bytes=1000))
            await transfer.until_layer(layer)
            assert transfer.layers == list(range(layer + 1))
        transfer.sender.finish({"computed_s": [1.0, 2.0, 3.0, 4.0]})
        await transfer.complete()
        report = transfer.receiver.report
        assert report.peer_timings["computed_s"] == [1.0, 2.0, 3.0, 4.0]
        assert len(report.peer_timings["sent_s"]) == 4
        assert report.clock is not None
        for layer in range(4):
            assert report.peer_timings["sent_s"][layer] == transfer.sender.report.layer_at_s[layer]
        assert sorted(report.layer_at_s) == [0, 1, 2, 3]


async def test_ready_pieces_leave_in_layer_order(faulty: MakeBackend, faults: list[FaultyBackend]) -> None:
    """Whatever order they were put in; on one lane the wire shows it."""
    async with pair(faulty, dense(), lanes=1) as p:
        seen: list[FrameHeader] = []
        faults[0].on_chunk = seen.append
        transfer = p.offer(spec_of(p.layout, (0, 100)))
        await transfer.sender.open()
        transfer.sender.put([piece for layer in (3, 1, 0, 2) for piece in transfer.pieces(layer)])
        transfer.sender.finish({})
        await transfer.complete()
        assert [h.layer for h in seen] == sorted(h.layer for h in seen)
        assert len(seen) > 4


async def test_two_transfers_at_once_and_both_directions(backend: MakeBackend) -> None:
    """On the same lanes, none mixed up with another."""
    async with pair(backend, dense(), codec="lz4") as p:
        await p.send()
        transfers = [p.offer(spec_of(p.layout), seed=i, sender=p.far if i % 2 else p.near) for i in range(4)]
        for transfer in transfers:
            await transfer.sender.open()
        for transfer in transfers:
            transfer.put_all()
        await asyncio.gather(*(transfer.complete() for transfer in transfers))


async def test_a_put_from_another_thread_and_before_open_is_answered(backend: MakeBackend) -> None:
    """`put` and `finish` are the engine thread's."""
    async with pair(backend, dense()) as p:
        transfer = p.offer(spec_of(p.layout))
        opening = asyncio.create_task(transfer.sender.open())
        await asyncio.to_thread(transfer.put_all)
        await opening
        await transfer.complete()


# -- memory and cancel ------------------------------------------------------------------------------------------------


async def test_no_room_then_room(backend: MakeBackend) -> None:
    """The same sender asks again; the answer says when."""
    async with pair(backend) as p:
        transfer = p.offer(spec_of(p.layout), room=False)
        for _ in range(2):
            with pytest.raises(NoRoomError) as caught:
                await transfer.sender.open()
            assert caught.value.retry_after_s > 0
        transfer.room = True
        await transfer.sender.open()
        transfer.put_all()
        await transfer.complete()


@pytest.mark.parametrize("codec", ["raw", "zstd"])
@pytest.mark.parametrize("side", ["sender", "receiver"])
async def test_cancel_in_the_middle(faulty: MakeBackend, faults: list[FaultyBackend], side: str, codec: str) -> None:
    """Either side cancels while chunks are on their way: the other learns it, the memory is not written after aclose,
    no lane is lost, and the next transfer over the same lanes is byte-exact."""
    async with pair(faulty, dense(), codec=codec, chunk_bytes=1 << 20, credit_bytes=4 << 20) as p:
        await p.send()
        lanes_before = len(faults[0].lanes)
        transfer = p.offer(spec_of(p.layout, (0, 8000)))  # rows, and chunks, of 1 MB: cut off in the middle
        first_chunk = asyncio.Event()
        faults[0].on_chunk = lambda _header: first_chunk.set()
        await transfer.sender.open()
        transfer.put_all()
        async with asyncio.timeout(SOON_S):
            await first_chunk.wait()
            closing, other = (
                (transfer.sender, transfer.receiver) if side == "sender" else (transfer.receiver, transfer.sender)
            )
            await closing.aclose("the client went away")
            if side == "receiver":
                after = {key: bytes(row) for key, row in transfer.destination.rows.items()}
            with pytest.raises(TransferCancelledError, match="the client went away"):
                await (other.finished() if side == "sender" else other.done())
            await other.aclose()
        if side == "sender":
            after = {key: bytes(row) for key, row in transfer.destination.rows.items()}
            assert len(transfer.errors) == 1
        await p.send(seed=1)
        assert {key: bytes(row) for key, row in transfer.destination.rows.items()} == after
        assert len(faults[0].lanes) == lanes_before


async def test_aclose_finishes_although_its_caller_is_cancelled(backend: MakeBackend) -> None:
    """Cancelling the task that awaits aclose does not leave the transfer half closed."""
    async with pair(backend, dense()) as p:
        transfer = p.offer(spec_of(p.layout))
        await transfer.sender.open()
        transfer.put_all()
        task = asyncio.create_task(transfer.sender.aclose())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert transfer.sender.failed is not None
        with pytest.raises(TransferCancelledError):
            await transfer.receiver.finished()
        await transfer.receiver.aclose()


async def test_a_transfer_without_credit_does_not_hold_up_the_others(backend: MakeBackend) -> None:
    """A window of 64 KiB, many times less than the transfer: credit keeps it going, and others beside it."""
    async with pair(backend, dense(layers=8), credit_bytes=65536, chunk_bytes=1 << 20) as p:
        await asyncio.gather(*(p.send(seed=i) for i in range(3)))


async def test_a_reserve_that_raises_refuses_for_good(backend: MakeBackend) -> None:
    """EngineError of the decode engine reaches the prefill side with its text."""
    async with pair(backend) as p:
        ticket, receiver = p.far.receiver(spec_of(p.layout))
        failures: list[Exception] = []

        def reserve(_spec):  # type: ignore[no-untyped-def]
            raise EngineError("longer than the arena")

        receiver.bind(reserve, lambda _layer: None, failures.append)
        sender = p.near.sender(ticket, "far", p.far.addresses)
        with pytest.raises(PeerRefusedError, match="longer than the arena"):
            await sender.open()
        assert len(failures) == 1
        await sender.aclose()
        await receiver.aclose()


async def test_unfinished_pieces_fail_the_transfer_alone(backend: MakeBackend) -> None:
    """finish() with bytes missing is the engine's mistake: a clear error instead of a decode that waits for ever."""
    async with pair(backend, dense()) as p:
        transfer = p.offer(spec_of(p.layout))
        await transfer.sender.open()
        transfer.sender.put(transfer.pieces(0))
        transfer.sender.finish({})
        with pytest.raises(EngineError, match="bytes were put"):
            await transfer.sender.done()
        await transfer.sender.aclose()
        await transfer.receiver.aclose()
        await p.send()


# -- tickets ----------------------------------------------------------------------------------------------------------


async def test_wrong_tickets(backend: MakeBackend) -> None:
    """Altered, void and foreign tickets are refused with a reason; the session goes on."""
    async with pair(backend) as p:
        transfer = p.offer(spec_of(p.layout))
        claims, mac = transfer.ticket.split(".")
        altered = p.near.sender(claims + "." + mac[:10] + ("A" if mac[10] != "A" else "B") + mac[11:], "far", [])
        with pytest.raises(TicketError, match="altered"):
            await altered.open()
        await transfer.receiver.aclose()
        with pytest.raises(TicketError, match="void"):
            await transfer.sender.open()
        with pytest.raises(TicketError, match="not a ticket"):
            p.near.sender("nonsense", "far", [])
        for sender in (altered, transfer.sender):
            await sender.aclose()
        await p.send()


async def test_a_ticket_of_another_session_is_refused(backend: MakeBackend) -> None:
    """The first session that presents it owns it."""
    async with pair(backend) as p:
        thief = p.endpoint("thief", lanes=1)
        transfer = p.offer(spec_of(p.layout))
        await transfer.sender.open()
        stolen = thief.sender(transfer.ticket, "far", p.far.addresses)
        with pytest.raises(TicketError, match="another session"):
            await stolen.open()
        await stolen.aclose()
        await thief.aclose()
        transfer.put_all()
        await transfer.complete()


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["raw", "zstd"])
async def test_a_damaged_chunk_is_sent_once_more(faulty: MakeBackend, faults: list[FaultyBackend], codec: str) -> None:
    """One flipped bit: counted, resent, and the bytes are right in the end."""
    async with pair(faulty, dense(), codec=codec) as p:
        damaged: list[int] = []

        def once(header: FrameHeader) -> bool:
            if header.layer == 1 and not damaged:
                damaged.append(header.sequence)
                return True
            return False

        faults[0].damage = once
        transfer = await p.send()
        assert transfer.sender.report.resent_chunks == 1


async def test_damage_twice_fails_that_transfer_alone(faulty: MakeBackend, faults: list[FaultyBackend]) -> None:
    """Both sides get ChecksumError, and another transfer that runs beside it completes."""
    async with pair(faulty, dense()) as p:
        healthy = p.offer(spec_of(p.layout), seed=1)
        await healthy.sender.open()
        sick = p.offer(spec_of(p.layout))
        await sick.sender.open()
        number = sick.sender.number
        faults[0].damage = lambda h: h.transfer == number and (h.layer, h.row, h.offset_bytes) == (2, 1, 0)
        sick.put_all()
        healthy.put_all()
        async with asyncio.timeout(SOON_S):
            with pytest.raises(ChecksumError):
                await sick.receiver.finished()
            with pytest.raises(ChecksumError):
                await sick.sender.done()
        await sick.sender.aclose()
        await sick.receiver.aclose()
        await healthy.complete()


# -- lanes ------------------------------------------------------------------------------------------------------------


async def test_a_peer_that_restarts_is_found_again(backend: MakeBackend) -> None:
    """The decode node goes and comes back at the same address: the session redials, old tickets are refused."""
    async with pair(backend, dense()) as p:
        await p.send()
        address = p.far.addresses[0]
        old_ticket, _receiver = p.far.receiver(spec_of(p.layout))
        await p.far.aclose()
        p.far = p.endpoint("far", bind=f"{address.host}:{address.port}")
        await p.far.start()
        await p.send()
        stale = p.near.sender(old_ticket, "far", p.far.addresses)
        with pytest.raises(TicketError, match="restarted"):
            await stale.open()
        await stale.aclose()


async def test_nobody_there(backend: MakeBackend) -> None:
    """A dead address gives LaneLostError within the time-out, not a hang."""
    async with pair(backend, open_timeout_s=0.3) as p:
        transfer = p.offer(spec_of(p.layout))
        address = p.far.addresses[0]
        await p.far.aclose()
        transfer.sender = p.near.sender(transfer.ticket, "far", [address])
        with pytest.raises(LaneLostError):
            await transfer.sender.open()
        await transfer.sender.aclose()


@pytest.mark.parametrize(("secret", "fingerprint", "text"), [(b"wrong", "f" * 32, "secret"), (None, "0" * 32, "model")])
async def test_a_stranger_is_refused(backend: MakeBackend, secret: bytes | None, fingerprint: str, text: str) -> None:
    """Wrong secret or another model: PeerRefusedError that says so, logged on the other side; sessions go on."""
    async with pair(backend) as p:
        spec = spec_of(p.layout, fingerprint=fingerprint)
        ticket, receiver = p.far.receiver(spec)
        stranger = p.endpoint("stranger", secret=secret or SECRET, fingerprint=fingerprint, lanes=1)
        sender = stranger.sender(ticket, "far", p.far.addresses)
        with structlog.testing.capture_logs() as logs, pytest.raises(PeerRefusedError, match=text):
            await sender.open()
        assert any(entry["event"] == "kv lane closed" and text in entry["reason"] for entry in logs)
        await sender.aclose()
        await receiver.aclose()
        await stranger.aclose()
        await p.send()
