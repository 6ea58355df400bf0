"""`transport.backend = "ucx"`: a session's first lane is TCP, the others go over UCX where both ends have it, and over
TCP with one warning and a metric where one has not."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter

import pytest
import structlog
from prfaas.common.config import TransportConfig, load
from prfaas.common.errors import ConfigError
from prfaas.transport.endpoint import KvEndpoint
from prfaas.transport.lanes.tcp import TcpBackend
from prfaas.transport.lanes.ucx_binding import ucx_problem

from tests.conformance.kv_harness import SOON_S, Pair, pair, spec_of

needs_ucx = pytest.mark.skipif(ucx_problem() is not None, reason=str(ucx_problem()))


async def until_open(p: Pair, lanes: int = 3) -> Counter[str]:
    """Wait until the session has all its lanes: {kind: how many}, seen from the accepting side."""
    async with asyncio.timeout(SOON_S):
        while True:
            session = p.far.accepted_from("near")
            channels = session.channels() if session is not None else []
            if len(channels) == lanes:
                assert all(type(c._lane).__name__ == "TcpLane" for c in channels if c.index == 0)
                return Counter(type(c._lane).__name__ for c in channels)
            await asyncio.sleep(0.01)


def fallbacks(endpoint: KvEndpoint) -> dict[str, float]:
    samples = next(iter(endpoint.metrics.backend_fallbacks.collect())).samples
    return {s.labels["reason"]: s.value for s in samples if s.name.endswith("_total")}


async def tcp_only(p: Pair) -> None:
    """In place of `far`: a node that was not told of UCX."""
    await p.far.aclose()
    p.far = p.endpoint("far", backend="tcp")
    await p.far.start()
    p.near.connect("far", p.far.addresses)


@needs_ucx
async def test_both_have_it() -> None:
    """Lane 0 is TCP, lanes 1 and 2 are UCX; transfers go in both directions; nobody falls back."""
    async with pair(TcpBackend, backend="ucx") as p:
        assert await until_open(p) == {"TcpLane": 1, "UcxLane": 2}
        await p.send()
        await p.send_back()
        assert fallbacks(p.near) == fallbacks(p.far) == {}


@needs_ucx
async def test_the_peer_offers_none() -> None:
    """All lanes are TCP; one warning and one count, however many lanes there are."""
    async with pair(TcpBackend, backend="ucx") as p:
        with structlog.testing.capture_logs() as logs:
            await tcp_only(p)
            assert await until_open(p) == {"TcpLane": 3}
            await p.send()
        warnings = [entry["reason"] for entry in logs if entry["event"] == "kv backend"]
        assert len(warnings) == 1
        assert "far offers no UCX" in warnings[0]
        assert fallbacks(p.near) == {"not_offered": 1}
        assert fallbacks(p.far) == {}


@needs_ucx
async def test_the_dialler_offers_none() -> None:
    """The side that accepts says it as well, since it was asked for UCX."""
    async with pair(TcpBackend, backend="ucx") as p:
        other = p.endpoint("near", backend="tcp")
        await p.near.aclose()
        p.near = other
        p.near.connect("far", p.far.addresses)
        await p.send()
        assert fallbacks(p.far) == {"not_offered": 1}


@needs_ucx
async def test_its_port_can_not_be_reached() -> None:
    """Two attempts a lane, then TCP, with the reason; transfers never waited for it."""
    async with pair(TcpBackend, backend="ucx") as p:
        await p.far.aclose()
        p.far = p.endpoint("far")
        await p.far.start()
        await p.far._routes.aclose()  # what a firewall between would do
        with structlog.testing.capture_logs() as logs:
            p.near.connect("far", p.far.addresses)
            await p.send()
            assert await until_open(p) == {"TcpLane": 3}
        await p.send(seed=1)
        assert fallbacks(p.near) == {"unreachable": 1}
        warnings = [entry["reason"] for entry in logs if entry["event"] == "kv backend"]
        assert len(warnings) == 1
        assert "could not be opened" in warnings[0]


async def test_ucx_that_is_not_installed_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ends go on over TCP; the warning holds the command that installs it."""
    for name in ("ucxx", "ucp"):
        monkeypatch.setitem(sys.modules, name, None)
    with structlog.testing.capture_logs() as logs:
        async with pair(TcpBackend, backend="ucx") as p:
            assert await until_open(p) == {"TcpLane": 3}
            await p.send()
            assert fallbacks(p.near) == fallbacks(p.far) == {"not_here": 1}
    warnings = [entry["reason"] for entry in logs if entry["event"] == "kv backend"]
    assert len(warnings) == 2
    assert all("pip install" in warning for warning in warnings)


@needs_ucx
async def test_a_peer_that_restarts_has_another_port() -> None:
    """The session's next lanes ask anew, so they go over UCX again."""
    async with pair(TcpBackend, backend="ucx") as p:
        await until_open(p)
        address = p.far.addresses[0]
        await p.far.aclose()
        p.far = p.endpoint("far", bind=f"{address.host}:{address.port}")
        await p.far.start()
        assert await until_open(p) == {"TcpLane": 1, "UcxLane": 2}
        await p.send()
        assert fallbacks(p.near) == {}


@needs_ucx
async def test_lanes_over_ucx_that_die_leave_the_transfer_to_tcp() -> None:
    """Both are lost in the middle of it: what was on them is sent again, on the first lane."""
    async with pair(TcpBackend, backend="ucx") as p:
        await until_open(p)
        transfer = p.offer(spec_of(p.layout, (0, 5000)))
        await transfer.sender.open()
        transfer.put_all()
        for channel in p.far.accepted_from("near").channels():
            if channel.index:
                channel.abort("a test")
        await transfer.complete()


@pytest.mark.parametrize(
    ("settings", "text"),
    [({"tls.ca_file": "ca.pem"}, "can't be encrypted"), ({"transport.lanes": "1"}, "first lane is always TCP")],
)
def test_settings_that_do_not_go_with_it(settings: dict[str, str], text: str) -> None:
    """Told at start, with the others."""
    with pytest.raises(ConfigError, match=text):
        load({}, {}, {"transport.backend": "ucx", **settings})
    assert load({}, {}, {"transport.backend": "ucx"}).transport == TransportConfig(backend="ucx")
