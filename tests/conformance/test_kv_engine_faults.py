"""Callbacks of an engine that raise what nobody expected, and requests whose time runs out: that transfer fails, with
its reason; its lanes and the transfers beside it go on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress

import pytest
import structlog
from prfaas.common.errors import (
    ConfigError,
    EngineError,
    NoRoomError,
    PeerRefusedError,
    TransferCancelledError,
    TransferError,
)
from prfaas.transport.api import KvAddress, TransferSpec
from prfaas.transport.lanes.tcp import TcpBackend

from tests.conformance.kv_harness import (
    SOON_S,
    Destination,
    FaultyBackend,
    MakeBackend,
    Pair,
    Transfer,
    dense,
    pair,
    spec_of,
)


@asynccontextmanager
async def undisturbed(p: Pair, faults: list[FaultyBackend]) -> AsyncIterator[None]:
    """A transfer that runs beside the block's completes, and no lane is dialled anew."""
    await p.send()
    beside = p.offer(spec_of(p.layout), seed=7)
    await beside.sender.open()
    lanes = len(faults[0].lanes)
    yield
    beside.put_all()
    await beside.complete()
    await p.send(seed=8)
    assert len(faults[0].lanes) == lanes


async def both_fail(transfer: Transfer, receiver_match: str) -> None:
    async with asyncio.timeout(SOON_S):
        with pytest.raises(EngineError, match=receiver_match):
            await transfer.receiver.finished()
        with pytest.raises(TransferError, match=receiver_match):
            await transfer.sender.done()
    await transfer.sender.aclose()
    await transfer.receiver.aclose()


def traceback_logged(logs: list[dict[str, object]], text: str) -> bool:
    return any(text in repr(entry.get("exc_info")) for entry in logs)


@pytest.mark.parametrize("error", [ValueError("a bug"), MemoryError("no page")])
async def test_a_reserve_that_raises_something_else(
    faulty: MakeBackend, faults: list[FaultyBackend], error: Exception
) -> None:
    """Refused for good, as with EngineError; the foreign text stays in our log."""
    async with pair(faulty, dense()) as p, undisturbed(p, faults):
        transfer = p.offer(spec_of(p.layout))

        def reserve(_spec: TransferSpec) -> None:
            raise error

        transfer.receiver.bind(reserve, transfer.on_layer, transfer.errors.append)
        with structlog.testing.capture_logs() as logs:
            with pytest.raises(PeerRefusedError, match=f"reserve raised {type(error).__name__}") as caught:
                await transfer.sender.open()
            assert str(error) not in str(caught.value)
            with pytest.raises(EngineError):
                await transfer.receiver.finished()
        assert traceback_logged(logs, str(error)), logs
        assert len(transfer.errors) == 1
        await transfer.sender.aclose()
        await transfer.receiver.aclose()


class BadDestination(Destination):
    """The rows of layer 1 can't be had, in one way or another."""

    kind = ""

    def row(self, layer: int, tensor: int, row: int) -> memoryview:
        good = super().row(layer, tensor, row)
        if layer != 1:
            return good
        if self.kind == "short":
            return good[:-1]
        if self.kind == "read-only":
            return good.toreadonly()
        raise KeyError("a bug in row")


@pytest.mark.parametrize("codec", ["raw", "zstd"])
@pytest.mark.parametrize("kind_of_row", ["raises", "short", "read-only"])
async def test_a_row_that_can_not_be_had(
    faulty: MakeBackend, faults: list[FaultyBackend], kind_of_row: str, codec: str
) -> None:
    """Layer 0 has arrived; layer 1 finds no memory."""
    async with pair(faulty, dense(), codec=codec) as p, undisturbed(p, faults):
        transfer = p.offer(spec_of(p.layout))

        def reserve(spec: TransferSpec) -> Destination:
            destination = BadDestination(p.layout, spec)
            destination.kind = kind_of_row
            return destination

        transfer.receiver.bind(reserve, transfer.on_layer, transfer.errors.append)
        await transfer.sender.open()
        with structlog.testing.capture_logs() as logs:
            transfer.put_all()
            await both_fail(transfer, "row")
        assert kind_of_row != "raises" or traceback_logged(logs, "a bug in row"), logs
        assert len(transfer.errors) == 1


@pytest.mark.parametrize("layout_has_empty_layer", [False, True])
async def test_an_on_layer_that_raises(
    faulty: MakeBackend, faults: list[FaultyBackend], layout_has_empty_layer: bool
) -> None:
    """Also for a layer that is complete from the start, which no frame announces."""
    async with pair(faulty) if layout_has_empty_layer else pair(faulty, dense()) as p, undisturbed(p, faults):
        transfer = p.offer(spec_of(p.layout))

        def on_layer(layer: int) -> None:
            if layer == 2:
                raise RuntimeError("a bug in on_layer")

        transfer.receiver.bind(transfer.reserve, on_layer, transfer.errors.append)
        with structlog.testing.capture_logs() as logs:
            with suppress(TransferError):  # an empty layer fails right behind OPENED: `open` may tell already
                await transfer.sender.open()
            transfer.put_all()
            await both_fail(transfer, "on_layer raised RuntimeError")
        assert traceback_logged(logs, "a bug in on_layer"), logs
        assert len(transfer.errors) == 1


@pytest.mark.parametrize("side", ["sender", "receiver"])
async def test_an_on_failed_that_raises(faulty: MakeBackend, faults: list[FaultyBackend], side: str) -> None:
    """The other callbacks and the other side still hear of the failure."""
    async with pair(faulty, dense()) as p, undisturbed(p, faults):
        transfer = p.offer(spec_of(p.layout))
        heard: list[Exception] = []

        def on_failed(_error: Exception) -> None:
            raise RuntimeError("a bug in on_failed")

        transfer.receiver.bind(transfer.reserve, transfer.on_layer, on_failed)
        await transfer.sender.open()
        transfer.sender.on_failed(on_failed)
        transfer.sender.on_failed(heard.append)
        transfer.sender.put(transfer.pieces(0))
        with structlog.testing.capture_logs() as logs:
            closing, other = (
                (transfer.receiver, transfer.sender) if side == "sender" else (transfer.sender, transfer.receiver)
            )
            await closing.aclose("enough")
            with pytest.raises(TransferCancelledError, match="enough"):
                async with asyncio.timeout(SOON_S):
                    await (other.done() if side == "sender" else other.finished())
            transfer.sender.on_failed(on_failed)
            await other.aclose()
        assert len(heard) == 1
        assert [e["event"] for e in logs].count("the engine's on_failed raised") == 2 + (side == "receiver")


# -- time -------------------------------------------------------------------------------------------------------------


async def test_a_request_whose_time_runs_out_fails_on_both_sides(
    faulty: MakeBackend, faults: list[FaultyBackend]
) -> None:
    """`remaining_s` travels in OPEN; the receiver ends the transfer, so memory is freed even if prefill is stuck."""
    async with pair(faulty, dense()) as p, undisturbed(p, faults):
        transfer = p.offer(spec_of(p.layout))
        await transfer.sender.open(remaining_s=1.0)
        transfer.sender.put(transfer.pieces(0))
        async with asyncio.timeout(SOON_S):
            with pytest.raises(TransferCancelledError, match="time ran out"):
                await transfer.receiver.finished()
            with pytest.raises(TransferCancelledError, match="time ran out"):
                await transfer.sender.done()
        assert len(transfer.errors) == 1
        await transfer.sender.aclose()
        await transfer.receiver.aclose()


async def test_each_open_says_the_remaining_time_anew(backend: MakeBackend) -> None:
    """ "No room" counts on; the later OPEN's time holds, and a transfer that is complete in time stays so."""
    async with pair(backend, dense()) as p:
        await p.send()  # the lanes are up: the time is for OPEN
        transfer = p.offer(spec_of(p.layout), room=False)
        with pytest.raises(NoRoomError):
            await transfer.sender.open(remaining_s=1.0)
        transfer.room = True
        await transfer.sender.open(remaining_s=60.0)
        await asyncio.sleep(1.0)  # the first deadline passes
        transfer.put_all()
        await transfer.complete()


async def test_waiting_for_room_ends_with_the_time(backend: MakeBackend) -> None:
    """A sender that never asks again doesn't keep the decode side waiting."""
    async with pair(backend, dense()) as p:
        await p.send()  # lanes are up, and OPEN needs no dialling
        transfer = p.offer(spec_of(p.layout), room=False)
        with pytest.raises(NoRoomError):
            await transfer.sender.open(remaining_s=1.0)
        async with asyncio.timeout(SOON_S):
            with pytest.raises(TransferCancelledError, match="time ran out"):
                await transfer.receiver.finished()
        await transfer.sender.aclose()
        await transfer.receiver.aclose()


async def test_an_open_that_nobody_answers_ends_with_the_time(backend: MakeBackend) -> None:
    """Sooner than `open_timeout_s`, and as a cancel: the lanes may be fine."""
    async with pair(backend, open_timeout_s=60.0) as p:
        transfer = p.offer(spec_of(p.layout))
        dead = p.far.addresses[0]
        await p.far.aclose()
        transfer.sender = p.near.sender(transfer.ticket, "nobody", [dead])
        async with asyncio.timeout(SOON_S):
            with pytest.raises(TransferCancelledError, match="time ran out"):
                await transfer.sender.open(remaining_s=0.1)
        await transfer.sender.aclose()


# -- life of an endpoint ----------------------------------------------------------------------------------------------


async def test_nothing_is_dialled_after_the_end(backend: MakeBackend) -> None:
    """A heartbeat that comes late can't open a session that nobody closes."""
    async with pair(backend) as p:
        transfer = p.offer(spec_of(p.layout))
        await p.near.aclose()
        await p.near.aclose()
        with pytest.raises(TransferCancelledError, match="shutting down"):
            p.near.connect("elsewhere", [KvAddress("127.0.0.1", 9)])
        with pytest.raises(TransferCancelledError, match="shutting down"):
            p.near.sender(transfer.ticket, "elsewhere", [KvAddress("127.0.0.1", 9)])
        await transfer.receiver.aclose()


@pytest.mark.parametrize("bind", ["0.0.0.0:0", "[::]:0", "0:0"])
async def test_a_wildcard_needs_an_address_to_advertise(bind: str) -> None:
    """Nobody can dial 0.0.0.0, however it is spelled: whoever tries reaches himself."""
    async with pair(TcpBackend) as p, aclosing(p.endpoint("wild", bind=bind)) as endpoint:
        with pytest.raises(ConfigError, match=r"transport\.advertise"):
            await endpoint.start()
