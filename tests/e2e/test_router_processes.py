"""Several router processes behind one port, real processes: `router.processes`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import aiohttp
import pytest

FAST = ["--engine", "emulated", "--engine-decode-step-s", "0.005", "--engine-arena-bytes", "64M"]
PROMPT = list(range(32, 127)) * 2
PROCESSES = 2


def free_run_of_ports(count: int) -> int:
    """The first of so many neighbours that nobody listens on now."""
    while True:
        with contextlib.ExitStack() as held:
            first = held.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                for port in range(first + 1, first + count):
                    held.enter_context(socket.create_server(("127.0.0.1", port)))
                return first


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def start(cluster):
    """A router of two processes, and one node that both know. The URLs of the processes."""
    api, first = free_run_of_ports(1), free_run_of_ports(PROCESSES)
    here = "127.0.0.1"
    cluster.router_url = f"http://{here}:{api}"
    router = ["prfaas.services", "router", "--bind", f"{here}:{api}", "--model", "bytes"]
    router += ["--router-processes", str(PROCESSES), "--router-node-port", str(first), *cluster._secret]
    cluster._add("router", router, f"http://{here}:{api}")
    node = ["prfaas.services", "decode", "--name", "d1", "--routers", cluster.router_url, "--node-heartbeat-s", "0.2"]
    cluster._add("decode", [*node, *cluster._secret, *FAST], "")
    urls = [f"http://{here}:{first + i}" for i in range(PROCESSES)]
    for i, url in enumerate(urls):
        # For `wait_for`; it is the router's process that lives or dies with them.
        cluster.processes[f"router#{i + 1}"] = _Seen(cluster.processes["router"], url)
    for i in range(PROCESSES):
        await cluster.wait_for(knows_the_node, f"router#{i + 1}")
    return urls


class _Seen:
    """One of the router's processes."""

    def __init__(self, parent, url):
        self._parent, self.url, self.name, self.log = parent, url, url, parent.log

    @property
    def alive(self) -> bool:
        return self._parent.alive

    def tail(self, lines: int = 15) -> str:
        return self._parent.tail(lines)

    def signal(self, number) -> None:
        """The parent's signal is its, too."""

    def kill(self) -> None:
        """With the parent."""


def knows_the_node(metrics):
    return metrics.get("prfaas_router_nodes", {}).get('role="decode",state="usable"', 0) == 1


async def served(url: str) -> float:
    async with aiohttp.ClientSession() as session, session.get(url + "/metrics") as response:
        lines = (await response.text()).splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("prfaas_router_requests_total{"))


async def complete_on_a_new_connection(url: str) -> tuple[int, str]:
    """The status and the request's id. A new connection, which the kernel gives to one process or another."""
    body = {"model": "emulated", "prompt": PROMPT, "max_tokens": 4, "temperature": 0}
    async with aiohttp.ClientSession() as session, session.post(url + "/v1/completions", json=body) as response:
        await response.read()
        return response.status, response.headers["x-request-id"]


async def test_processes_share_the_port_and_each_knows_every_node(cluster):
    """Every request is answered, whichever process took it, and both take some; a timeline is found through the shared
    port although one process alone keeps it; the node was told of both and leases to both."""
    urls = await start(cluster)
    answers = await asyncio.gather(*(complete_on_a_new_connection(cluster.router_url) for _ in range(40)))
    assert {status for status, _ in answers} == {200}
    shares = [await served(url) for url in urls]
    assert sum(shares) == 40
    assert min(shares) > 0, "40 connections all went to one process"
    for _, request_id in answers:
        async with aiohttp.ClientSession() as session:
            found = await session.get(f"{cluster.router_url}/requests/{request_id}/timeline")
            assert found.status == 200
            assert (await found.json())["request_id"] == request_id
    async with aiohttp.ClientSession() as session:
        nobodys = await session.get(f"{cluster.router_url}/requests/nobody/timeline")
        assert nobodys.status == 404


async def test_a_process_that_dies_is_started_again(cluster):
    """The others serve meanwhile; the new one hears of the nodes, and SIGTERM ends all of them in order."""
    await start(cluster)
    parent = cluster.processes["router"]
    before = children_of(parent._popen.pid)
    assert len(before) == PROCESSES
    os.kill(before[0], signal.SIGKILL)
    await cluster.wait_for(lambda _: len(set(children_of(parent._popen.pid)) - set(before)) == 1, "router#2")
    for i in range(PROCESSES):
        await cluster.wait_for(knows_the_node, f"router#{i + 1}")
    status, _ = await complete_on_a_new_connection(cluster.router_url)
    assert status == 200
    now = children_of(parent._popen.pid)
    assert parent.stop() == 0
    assert not [pid for pid in now if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--bind", "127.0.0.1:0"], "router.bind has port 0"),
        (["--bind", "0.0.0.0:8000", "--cluster-secret", "x"], "router.advertise"),
        (["--bind", "127.0.0.1:8000", "--router-node-port", "7999"], "router.node_port"),
    ],
)
def test_settings_that_several_processes_cannot_have(flags, said):
    """One line that names the setting, exit status 2."""
    command = [sys.executable, "-m", "prfaas.services", "router", "--model", "bytes", "--router-processes", "2", *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert ended.returncode == 2
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr
