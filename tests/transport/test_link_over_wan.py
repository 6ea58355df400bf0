"""LinkEstimate between two real endpoints, over an emulated WAN whose rate and loss change while it runs."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from dataclasses import fields
from typing import Any

import pytest
import uvloop
from prfaas.common.config import TransportConfig
from prfaas.common.metrics import TransportMetrics
from prfaas.transport.api import KvAddress, KvPiece, LinkEstimate, TransferSpec
from prfaas.transport.endpoint import KvEndpoint
from prometheus_client import CollectorRegistry

from tests.conformance.kv_harness import FINGERPRINT, SECRET, Destination, dense, spec_of
from tests.wan_link import TCP_PAYLOAD_SHARE, Host, WanLink, missing, wan_link

pytestmark = [
    pytest.mark.netns,
    pytest.mark.slow,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]

LAYOUT = dense(layers=4)
TOKENS = 1024
"""Of a transfer: 2 MiB."""
STREAMS = 4
TICK_S = 0.25
PATIENCE_S = 20.0


class Node:
    """An endpoint on one of the link's hosts, with an event loop of its own in a thread that lives there."""

    def __init__(self, name: str, host: Host) -> None:
        self.registry = CollectorRegistry()
        config = TransportConfig(
            bind=f"{host.address}:0", lanes=3, codec="raw", congestion_control="bbr", chunk_bytes=64 << 10
        )
        self._up = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(name, host, config))
        self._thread.start()
        self._up.wait()

    def _run(self, name: str, host: Host, config: TransportConfig) -> None:
        host.enter()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._live(name, config))

    async def _live(self, name: str, config: TransportConfig) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        self.kv = KvEndpoint(
            config, node=name, layout=LAYOUT, model_fingerprint=FINGERPRINT, secret=SECRET,
            metrics=TransportMetrics(self.registry),
        )  # fmt: skip
        await self.kv.start()
        self._up.set()
        await self._over.wait()
        await self.kv.aclose()

    def call(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()


class Traffic:
    """Transfers from the far host to the near one, several at a time and without a pause."""

    def __init__(self, link: WanLink) -> None:
        self._receiver = Node("receiver", link.near)
        self._sender = Node("sender", link.far)
        self._address: list[KvAddress] = self._receiver.kv.addresses
        self._streams = [self._sender.call(self._stream()) for _ in range(STREAMS)]

    async def _stream(self) -> None:
        while True:
            spec = spec_of(LAYOUT, tokens=(0, TOKENS))
            ticket = await asyncio.wrap_future(self._receiver.call(self._expect(spec)))
            sender = self._sender.kv.sender(ticket, "receiver", self._address)
            await sender.open()
            sender.put(
                [
                    KvPiece(layer, tensor, row, 0, memoryview(bytes(extent.row_bytes)))
                    for layer, tensors in enumerate(LAYOUT.extents(spec.tokens, spec.shard))
                    for tensor, extent in enumerate(tensors)
                    for row in range(extent.rows)
                ]
            )
            sender.finish({})
            await sender.done()
            await sender.aclose()

    async def _expect(self, spec: TransferSpec) -> str:
        ticket, receiver = self._receiver.kv.receiver(spec)
        receiver.bind(lambda opened: Destination(LAYOUT, opened), lambda _layer: None, lambda _error: None)
        return ticket

    def estimate(self) -> LinkEstimate:
        """As the sender's metrics say."""
        figures = {
            figure.name: self._sender.registry.get_sample_value(
                "prfaas_transport_link", {"peer": "receiver", "what": figure.name}
            )
            for figure in fields(LinkEstimate)
        }
        return LinkEstimate(**{name: value or 0.0 for name, value in figures.items()})  # type: ignore[arg-type]

    def wait_for(self, what: str, reached: Callable[[LinkEstimate], bool]) -> LinkEstimate:
        deadline_s = time.monotonic() + PATIENCE_S
        while not reached(found := self.estimate()):
            for stream in self._streams:
                assert not stream.done(), stream.exception()
            if time.monotonic() > deadline_s:
                pytest.fail(f"not within {PATIENCE_S:g} s: {what}; the last estimate: {found}")
            time.sleep(TICK_S)  # the gauges are set at each tick of the session; they can only be asked for
        return found

    def close(self) -> None:
        for stream in self._streams:
            stream.cancel()
        for stream in self._streams:
            with contextlib.suppress(BaseException):
                stream.result()
        self._sender.close()
        self._receiver.close()


@pytest.fixture
def link() -> Iterator[WanLink]:
    """Its queue is long enough for bbr, which loses nothing by itself then."""
    with wan_link(rate_bits_per_s=40e6, rtt_s=0.04, queue_bytes=1 << 20, offload=False) as made:
        yield made


@pytest.fixture
def traffic(link: WanLink) -> Iterator[Traffic]:
    made = Traffic(link)
    yield made
    made.close()


def near(rate_bits_per_s: float) -> Callable[[LinkEstimate], bool]:
    payload = rate_bits_per_s / 8 * TCP_PAYLOAD_SHARE
    return lambda found: found.bandwidth_bytes_per_s == pytest.approx(payload, rel=0.12)


def test_the_estimate_follows_rate_and_loss(link: WanLink, traffic: Traffic) -> None:
    """Under load: the bandwidth follows the link down and up again, the loss as it comes and goes, the round trip as
    the way becomes longer."""
    at_40 = near(40e6)
    found = traffic.wait_for("40 Mbit/s in full use", lambda found: at_40(found) and found.utilisation > 0.9)
    assert 0.04 <= found.min_rtt_s < 0.06
    assert found.queued_bytes > 0
    link.change(rate_bits_per_s=10e6)
    traffic.wait_for("10 Mbit/s", near(10e6))
    link.change(rate_bits_per_s=40e6)
    traffic.wait_for("40 Mbit/s again", near(40e6))
    link.change(loss=0.02)
    traffic.wait_for("two percent are lost", lambda found: 0.015 < found.loss < 0.03)
    link.change(loss=0.0)
    traffic.wait_for("nothing is lost", lambda found: found.loss < 0.005)
    link.change(delay_s=0.06)
    traffic.wait_for("the way is longer", lambda found: found.rtt_s >= 0.12)
