"""LinkEstimate of a real session over the emulated WAN that is a proxy, whose rate is changed while transfers run."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import uvloop
from prfaas.common.config import TransportConfig
from prfaas.common.metrics import TransportMetrics
from prfaas.transport.api import KvAddress, KvPiece, LinkEstimate
from prfaas.transport.endpoint import KvEndpoint
from prometheus_client import CollectorRegistry

from tests.conformance.kv_harness import FINGERPRINT, SECRET, Destination, dense, spec_of

LAYOUT = dense(layers=4)
TOKENS = 1024
"""Of a transfer: 2 MiB, which the buffers of sockets and proxy take whole."""
TRANSFERS = 40
"""That are enough for any change."""
WIDE_MBIT, NARROW_MBIT = 800, 40


class Line:
    """The process that is the WAN, to one port."""

    def __init__(self, folder: Path, target_port: int) -> None:
        self._rate = folder / "rate-mbit"
        self._rate.write_text(str(WIDE_MBIT))
        command = [sys.executable, "-m", "prfaas.services.wan.proxy", "--rate-file", str(self._rate), "--delay-ms", "2"]
        command += ["--forward", f"127.0.0.1:0=127.0.0.1:{target_port}"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.port = int(json.loads(self._said("READY"))["ports"][0])

    def change(self, rate_mbit: int) -> None:
        self._rate.write_text(str(rate_mbit))
        self._process.send_signal(signal.SIGHUP)
        self._said("RATE")

    def close(self) -> None:
        with self._process:
            self._process.terminate()

    def _said(self, word: str) -> str:
        assert self._process.stdout is not None
        said, _, what = self._process.stdout.readline().partition(" ")
        assert said == word
        return what


class Traffic:
    """Transfers from one endpoint to another, over the line, each when the one before has ended."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._receiver, self._sender = endpoint("receiver"), endpoint("sender")

    async def __aenter__(self) -> Traffic:
        await self._receiver.start()
        await self._sender.start()
        self.line = Line(self._folder, self._receiver.addresses[0].port)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._sender.aclose()
        await self._receiver.aclose()
        self.line.close()

    async def until(self, reached: Callable[[LinkEstimate], bool]) -> None:
        found = []
        for _ in range(TRANSFERS):
            await self._transfer()
            found.append(self._sender.link_estimates()["receiver"])
            if reached(found[-1]):
                return
        pytest.fail(f"not within {TRANSFERS} transfers: {found}")

    async def _transfer(self) -> None:
        spec = spec_of(LAYOUT, tokens=(0, TOKENS))
        ticket, receiver = self._receiver.receiver(spec)
        receiver.bind(lambda opened: Destination(LAYOUT, opened), lambda _layer: None, lambda _error: None)
        sender = self._sender.sender(ticket, "receiver", [KvAddress("127.0.0.1", self.line.port)])
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


def endpoint(node: str) -> KvEndpoint:
    return KvEndpoint(
        TransportConfig(bind="127.0.0.1:0", codec="raw"), node=node, layout=LAYOUT, model_fingerprint=FINGERPRINT,
        secret=SECRET, metrics=TransportMetrics(CollectorRegistry()),
    )  # fmt: skip


@pytest.mark.slow
def test_the_estimate_follows_a_line_that_narrows_and_widens_while_it_is_used(tmp_path: Path) -> None:
    """Down to a twentieth though no lane ever waits for its buffer, and up again. A line that is wide takes what its
    processes manage, so that only the narrow rate can be told exactly."""
    narrow = NARROW_MBIT * 1e6 / 8

    async def follow() -> None:
        async with Traffic(tmp_path) as traffic:
            await traffic.until(lambda found: found.bandwidth_bytes_per_s > 4 * narrow)
            traffic.line.change(NARROW_MBIT)
            await traffic.until(lambda found: found.bandwidth_bytes_per_s == pytest.approx(narrow, rel=0.2))
            traffic.line.change(WIDE_MBIT)
            await traffic.until(lambda found: found.bandwidth_bytes_per_s > 3 * narrow)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(follow())
