"""UCX waits for minutes on a peer that was stopped, killed or cut off. A lane over it must not: each becomes one error
of that lane by its deadline, the event loop goes on meanwhile, and the process ends at once afterwards."""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import IO

import pytest
from prfaas.transport.lanes.ucx_binding import ucx_problem

from tests.e2e.test_partition import NODE, Network

pytestmark = pytest.mark.skipif(ucx_problem() is not None, reason=str(ucx_problem()))

GUARD_S = 20.0
"""A hang is told after this; by itself UCX takes more than five times as long."""


class Process:
    """A `ucx_peer`, with its lines as they come."""

    def __init__(self, command: list[str]) -> None:
        self.popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.popen.stdout is not None
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, args=(self.popen.stdout,))
        self._reader.start()

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self._lines.put(line.strip())

    def hear(self, start: str) -> str:
        """The next line that starts so; what comes before it is passed over, except `lost`."""
        while True:
            line = self._lines.get(timeout=GUARD_S)
            if line.startswith(start):
                return line
            assert not line.startswith("lost"), line

    def ping(self) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write("ping\n")
        self.popen.stdin.flush()

    def end(self) -> None:
        self.popen.kill()
        self._reader.join()
        with self.popen, contextlib.suppress(BrokenPipeError):
            pass


@pytest.fixture
def start() -> Iterator[Callable[[list[str]], Process]]:
    started: list[Process] = []

    def begin(command: list[str]) -> Process:
        started.append(Process(command))
        return started[-1]

    yield begin
    for process in started:
        process.end()


def command(role: str, host: str, port: str, traffic: str) -> list[str]:
    return [sys.executable, "-m", "tests.transport.ucx_peer", role, host, port, traffic]


def flowing(
    start: Callable[[list[str]], Process], traffic: str, host: str = "127.0.0.1", network: Network | None = None
) -> tuple[Process, Process]:
    """(the one that survives, its peer), with a lane between them that is open and busy."""

    def at(place: str, role: str, port: str) -> list[str]:
        made = command(role, host, port, traffic)
        return made if network is None else network.command(place, *made)

    peer = start(at("b", "listen", "0"))
    port = peer.hear("port").split()[1]
    survivor = start(at("a", "dial", port))
    for process in (survivor, peer):
        process.hear("open")
        process.hear("flowing")
    return survivor, peer


TRAFFIC = pytest.mark.parametrize("traffic", ["none", "listener", "dialler"])


@TRAFFIC
def test_a_stopped_peer(start: Callable[[list[str]], Process], traffic: str) -> None:
    """SIGSTOP: its kernel still acknowledges, UCX notices nothing; the lane is lost with a TimeoutError."""
    survivor, peer = flowing(start, traffic)
    peer.popen.send_signal(signal.SIGSTOP)
    survivor.ping()
    survivor.hear("pong")
    assert survivor.hear("lost").startswith("lost TimeoutError")
    assert survivor.popen.wait(GUARD_S) == 0


@TRAFFIC
def test_a_killed_peer(start: Callable[[list[str]], Process], traffic: str) -> None:
    """SIGKILL: the lane is lost with an error, not closed in order."""
    survivor, peer = flowing(start, traffic)
    peer.popen.kill()
    assert not survivor.hear("lost").startswith("lost None")
    assert survivor.popen.wait(GUARD_S) == 0


@pytest.mark.netns
@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("bridge"),
    reason="needs root and iproute2 (network namespaces)",
)
@TRAFFIC
def test_a_blackholed_peer(start: Callable[[list[str]], Process], traffic: str) -> None:
    """Every packet is dropped, with no word of it: the lane is lost with a TimeoutError, at both ends."""
    network = Network()
    with contextlib.closing(network):
        survivor, peer = flowing(start, traffic, NODE, network)
        network.cut()
        survivor.ping()
        survivor.hear("pong")
        for process in (survivor, peer):
            assert process.hear("lost").startswith("lost TimeoutError")
            assert process.popen.wait(GUARD_S) == 0


@TRAFFIC
def test_a_process_that_is_told_to_end(start: Callable[[list[str]], Process], traffic: str) -> None:
    """SIGINT with an open lane: it exits at once, however busy UCX is, and its peer's lane is lost."""
    survivor, peer = flowing(start, traffic)
    survivor.popen.send_signal(signal.SIGINT)
    assert survivor.popen.wait(GUARD_S) == -signal.SIGINT
    peer.hear("lost")
    assert peer.popen.wait(GUARD_S) == 0
