"""Every conformance test runs under uvloop, which the services use, and under plain asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
import uvloop
from prfaas.common.config import TransportConfig
from prfaas.transport.lanes.api import Backend
from prfaas.transport.lanes.memory import MemoryNetwork
from prfaas.transport.lanes.tcp import TcpBackend
from prfaas.transport.lanes.ucx import make_ucx_backend
from prfaas.transport.lanes.ucx_binding import ucx_problem

from tests.conformance.kv_harness import SECRET, FaultyBackend, MakeBackend


def pytest_asyncio_loop_factories(config: object, item: object) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}


UCX = pytest.param("ucx", marks=pytest.mark.skipif(ucx_problem() is not None, reason=str(ucx_problem())))


@pytest.fixture(params=["memory", "tcp", UCX])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def backend(kind: str) -> MakeBackend:
    makers: dict[str, MakeBackend] = {
        "memory": lambda _config: MemoryNetwork(),
        "tcp": TcpBackend,
        "ucx": lambda config: make_ucx_backend(config, SECRET),
    }
    return makers[kind]


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
