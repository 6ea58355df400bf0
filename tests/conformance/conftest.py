"""Every conformance test runs over every backend under uvloop, which the services use; plain TCP also under plain
asyncio. UCX is one of them where it is installed (tests/transport says that it was skipped where it is not)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import uvloop
from prfaas.common.config import TransportConfig
from prfaas.transport.lanes.api import Backend, LaneHandler, Listener
from prfaas.transport.lanes.memory import MemoryNetwork
from prfaas.transport.lanes.tcp import TcpBackend
from prfaas.transport.lanes.ucx import make_ucx_backend
from prfaas.transport.lanes.ucx_binding import ucx_problem
from prfaas.transport.tls import Tls

from tests.certificates import make_certificates
from tests.conformance.kv_harness import SECRET, FaultyBackend, MakeBackend


def pytest_asyncio_loop_factories(config: object, item: object) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of the other backends a second loop would show nothing new: memory has no sockets, TLS and UCX do their own work
    below the lane."""
    others = ("[asyncio-memory", "[asyncio-tls", "[asyncio-ucx")
    dropped = [item for item in items if any(kind in item.nodeid for kind in others)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in set(dropped)]


@pytest.fixture(params=["memory", "tcp", "tls", *([] if ucx_problem() else ["ucx"])])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def backend(kind: str, tmp_path: Path) -> MakeBackend:
    makers: dict[str, MakeBackend] = {
        "memory": lambda _config: MemoryNetwork(),
        "tcp": TcpBackend,
        "tls": lambda config: TlsNetwork(config, tmp_path),
        "ucx": lambda config: make_ucx_backend(config, SECRET),
    }
    return makers[kind]


class TlsNetwork:
    """TCP with TLS; each node has its own certificate, of one CA."""

    def __init__(self, config: TransportConfig, directory: Path) -> None:
        self._config = config
        self._directory = directory
        self._nodes: dict[str, TcpBackend] = {}

    def of(self, node: str) -> Backend:
        if node not in self._nodes:
            made = make_certificates(self._directory, f"{node}:prefill+decode", force=True)
            self._nodes[node] = TcpBackend(self._config, Tls(made[node]))
        return self._nodes[node]

    async def listen(self, host: str, port: int, handler: Callable[[], LaneHandler]) -> Listener:
        return await self.of("listener").listen(host, port, handler)

    async def dial(self, host: str, port: int, handler: LaneHandler) -> None:
        await self.of("dialler").dial(host, port, handler)


@pytest.fixture
def faults() -> list[FaultyBackend]:
    return []


@pytest.fixture
def faulty(backend: MakeBackend, faults: list[FaultyBackend]) -> MakeBackend:
    """The same backend with `faults[0]` to damage what arrives."""

    def make(config: TransportConfig) -> Backend:
        faults.append(FaultyBackend(backend(config)))
        return faults[0]

    return make
