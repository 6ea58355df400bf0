"""What a transfer may not do, or not any longer: lossy codecs, deadlines, bookkeeping, egress."""

from __future__ import annotations

import asyncio
import secrets
import threading
import tracemalloc

import pytest
from prfaas.common.errors import TransferCancelledError, TransferError
from prfaas.common.kv_layout import TensorKind
from prfaas.transport.codecs.api import ChunkForm
from prfaas.transport.codecs.registry import codec_by_name
from prfaas.transport.endpoint import MAX_ACCEPTED_SESSIONS
from prfaas.transport.frames import FrameType, Ping, checksum, encode_control
from prfaas.transport.handshake import signed
from prfaas.transport.lanes.tcp import TcpBackend
from prfaas.transport.scratch import ScratchPool

from tests.conformance.kv_harness import (
    SECRET,
    SOON_S,
    MakeBackend,
    RawLane,
    Transfer,
    chunk_frame,
    content,
    dense,
    hello_body,
    open_body,
    pair,
    spec_of,
)

# -- lossy codecs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensor", "allowed"), [(0, False), (1, True)], ids=["keys-which-are-not-allowed", "values-which-are"]
)
async def test_a_lossy_chunk_is_taken_only_where_this_side_allows_it(tensor: int, allowed: bool) -> None:
    """int8 for values, by the receiver's settings: a key in it fails its transfer and its lane, with both names."""
    async with pair(TcpBackend, dense(1), lossy=("value=int8",)) as p:
        lane = await RawLane.dial(p.far.addresses[0])
        transfer = p.offer(spec_of(p.layout, (0, 100)))
        lane.writer.write(encode_control(open_body(transfer), 1))
        assert (await lane.until(FrameType.OPENED)).credit_bytes
        codec = codec_by_name("int8")
        data = memoryview(bytes(12800))
        form = ChunkForm((TensorKind.KEY, TensorKind.VALUE)[tensor], "bfloat16", 64)
        wire = memoryview(codec.encode(data, form))
        place = (0, tensor, 0, 0)
        changes = {"codec": codec.number, "raw_bytes": len(data)}
        lane.writer.write(chunk_frame(bytes(wire), place, **changes))
        if allowed:
            assert (await lane.until(FrameType.ACK)).chunks == [1]
            assert bytes(transfer.destination.rows[0, 1, 0]) == bytes(12800)
        else:
            async with asyncio.timeout(SOON_S):
                with pytest.raises(TransferError, match=r"lossy codec int8.*key"):
                    await transfer.receiver.finished()
            await lane.until_closed()
            assert set(transfer.destination.rows[0, 0, 0]) == {0xA5}
        await transfer.receiver.aclose()
        await lane.aclose()
        await p.send()


# -- deadlines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lanes_up", [True, False], ids=["lanes-up", "no-lane-up"])
async def test_a_transfer_whose_time_has_run_out_ends_on_both_sides(backend: MakeBackend, lanes_up: bool) -> None:
    """Also where no lane is left to say so; its memory is free, and the session goes on."""
    async with pair(backend, dense(), resume_s=3600.0) as p:
        await p.send()
        transfer = p.offer(spec_of(p.layout), seed=1)
        await transfer.sender.open(remaining_s=1.0)
        transfer.sender.put(transfer.pieces(0))
        await transfer.until_layer(0)
        if not lanes_up:
            await p.far._listener.aclose()
            for dialler in p.near._dialled.values():
                for channel in dialler.session.channels():
                    channel.abort("cut")
        async with asyncio.timeout(SOON_S):
            for half in (transfer.sender.done(), transfer.receiver.finished()):
                with pytest.raises(TransferCancelledError, match="time ran out"):
                    await half
            await transfer.sender.aclose()
            await transfer.receiver.aclose()
        assert [type(error) for error in transfer.errors] == [TransferCancelledError]
        if lanes_up:
            await p.send(seed=2)


async def test_time_that_has_run_out_before_open_opens_nothing(backend: MakeBackend) -> None:
    """OPEN is not answered because nothing is asked any more; the memory is not reserved for long."""
    async with pair(backend, dense()) as p:
        await p.send()
        transfer = p.offer(spec_of(p.layout), seed=1)
        with pytest.raises(TransferCancelledError, match="time ran out"):
            await transfer.sender.open(remaining_s=0.0)
        await transfer.sender.aclose()
        await transfer.receiver.aclose()
        await p.send(seed=2)


# -- what a peer can make us remember ---------------------------------------------------------------------------------


async def test_copies_of_a_chunk_that_is_being_checked_are_remembered_once() -> None:
    """A peer sends the same chunk under a thousand numbers while the decoder is busy."""
    async with pair(TcpBackend, dense(1), codec_threads=1) as p:
        session = secrets.token_hex(16)
        first, second = [await RawLane.dial(p.far.addresses[0], session=session, lane=i) for i in range(2)]
        transfer = p.offer(spec_of(p.layout, (0, 100)))
        first.writer.write(encode_control(open_body(transfer), 1))
        await first.until(FrameType.OPENED)
        busy = threading.Event()
        p.far._executor.submit(busy.wait, SOON_S)
        codec = codec_by_name("zstd")
        data = bytes(12800)
        wire = bytes(codec.encode(memoryview(data), ChunkForm(TensorKind.KEY, "bfloat16", 64)))

        def frame(number: int) -> bytes:
            check = checksum(data, 1, number)
            return chunk_frame(wire, codec=codec.number, raw_bytes=len(data), sequence=number, checksum=check)

        first.writer.write(frame(1))
        first.writer.write(encode_control(Ping(1.0)))
        await first.until(FrameType.PONG)
        for number in range(1000):
            second.writer.write(frame(2 + number))
        second.writer.write(encode_control(Ping(1.0)))
        await second.until(FrameType.PONG)
        remembered = len(transfer.receiver._acknowledge_on)
        busy.set()
        assert remembered == 1
        assert (await second.until(FrameType.ACK)).chunks == [1]
        await transfer.receiver.aclose()
        await first.aclose()
        await second.aclose()


async def test_a_node_can_have_so_many_sessions() -> None:
    """Those whose lanes are gone make room, though they might be resumed; those that are up don't: one more is refused,
    and other nodes are not."""
    async with pair(TcpBackend, dense(1), resume_s=3600.0) as p:
        await p.send()
        for _ in range(2 * MAX_ACCEPTED_SESSIONS):
            await (await RawLane.dial(p.far.addresses[0])).aclose()
        lanes = []
        for _ in range(MAX_ACCEPTED_SESSIONS):
            lanes.append(await RawLane.dial(p.far.addresses[0]))
            assert len(p.far._accepted) <= 1 + MAX_ACCEPTED_SESSIONS
        one_more = await RawLane.connect(p.far.addresses[0])
        one_more.writer.write(encode_control(signed(hello_body(secrets.token_hex(16)), SECRET)))
        error = await one_more.until(FrameType.ERROR)
        assert (error.code, "raw has 64 sessions here" in error.detail) == ("hello_refused", True)
        await p.send(seed=1)
        for lane in (*lanes, one_more):
            await lane.aclose()


def test_tiny_encoded_chunks_take_tiny_buffers() -> None:
    """A thousand of a hundred bytes are not a thousand MiB; those of usual size are recycled."""
    pool = ScratchPool()
    tracemalloc.start()
    try:
        held = [pool.take(100) for _ in range(1000)]
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert all(len(view) == 100 for view in held)
    usual = pool.take(700_000)
    kept = usual.obj
    pool.give_back(usual)
    assert pool.take(300_000).obj is kept


# -- egress -----------------------------------------------------------------------------------------------------------


async def test_two_sessions_share_the_cap_on_egress(backend: MakeBackend) -> None:
    """Both transfers go on side by side: when the first is done, the other (as large) nearly is."""
    async with pair(backend, dense(layers=8), egress_bytes_per_s=8e6, codec="raw", chunk_bytes=65536) as p:
        third = p.endpoint("third")
        await third.start()
        p.near.connect("third", third.addresses)
        transfers = []
        for receiving, seed in ((p.far, 1), (third, 2)):
            spec = spec_of(p.layout, (0, 700))
            ticket, receiver = receiving.receiver(spec)
            transfer = Transfer(p.layout, spec, ticket, receiver, content(p.layout, spec, seed))
            receiver.bind(transfer.reserve, transfer.on_layer, transfer.errors.append)
            transfer.sender = p.near.sender(ticket, receiving.node, receiving.addresses)
            await transfer.sender.open()
            transfers.append(transfer)
        for transfer in transfers:
            transfer.put_all()
        async with asyncio.timeout(SOON_S):
            done = [asyncio.ensure_future(transfer.sender.done()) for transfer in transfers]
            await asyncio.wait(done, return_when=asyncio.FIRST_COMPLETED)
            sent = [transfer.sender.report.raw_bytes for transfer in transfers]
            assert min(sent) >= 0.7 * max(sent), sent
        for transfer in transfers:
            await transfer.complete()
        await third.aclose()
