"""Processes of the previous version and of this one side by side, replaced one by one under load.

The previous version is what the repository's history has at PREVIOUS: its services run as they were.
"""

from __future__ import annotations

import asyncio
import io
import json
import random
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import pytest
from prfaas.services.engine.emulated.output import OutputTokens

from tests.e2e.conftest import Process, free_ports

PREVIOUS = "c3e85e6a5eca9b1742aece19b3b0800a89c9b2a2"
"""The commit of the version before; moved on with each release."""
ROOT = Path(__file__).parents[2]
HERE = "127.0.0.1"
ENGINE = ["--engine", "emulated", "--engine-decode-step-s", "0.01", "--engine-prefill-tokens-per-s", "20000"]
ENGINE += ["--engine-arena-bytes", "64M", "--engine-prefix-bytes", "8M", "--node-heartbeat-s", "0.25"]
NODES = {"p1": "prefill", "p2": "prefill", "d1": "decode", "d2": "decode"}
ROUTERS = ("r1", "r2")
AT_ONCE, TOKENS = 6, 24
STREAMS_EACH = 20
"""That end with each mix of versions."""


def git(*arguments: str) -> bytes:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True).stdout


def no_history() -> str | None:
    try:
        git("cat-file", "-e", f"{PREVIOUS}^{{commit}}")
    except (OSError, subprocess.CalledProcessError):
        return f"no history here that has {PREVIOUS[:7]}: versions side by side were NOT tested"
    return None


pytestmark = [pytest.mark.deploy, pytest.mark.skipif(no_history() is not None, reason=str(no_history()))]


@pytest.fixture
def previous(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH under which `prfaas` is the previous version."""
    package = tmp_path / "previous" / "prfaas"
    package.mkdir(parents=True)
    with tarfile.open(fileobj=io.BytesIO(git("archive", PREVIOUS, "common", "transport", "services"))) as archive:
        archive.extractall(package, filter="data")
    program = "import prfaas.common, prfaas.services, prfaas.transport as t; print(t.__file__)"
    command = ["env", f"PYTHONPATH={package.parent}", sys.executable, "-c", program]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.startswith(str(package))
    return package.parent


class Versions:
    """Two routers and four nodes, each of either version."""

    def __init__(self, cluster, previous: Path) -> None:
        self.cluster, self.previous = cluster, previous
        names = [*ROUTERS, *NODES]
        self._ports = dict(zip(names, free_ports(len(names)), strict=True))
        self.urls = [self.url(router) for router in ROUTERS]
        cluster.router_url = self.urls[0]

    def url(self, name: str) -> str:
        return f"http://{HERE}:{self._ports[name]}"

    def start(self, name: str, *, old: bool) -> None:
        path = [f"PYTHONPATH={self.previous}"] if old else []
        command = ["env", *path, sys.executable, "-m", "prfaas.services", *self._arguments(name)]
        log = self.cluster.folder / f"{name}.log"
        self.cluster.processes[name] = Process(name, command, self.url(name), log, own=True)

    def _arguments(self, name: str) -> Sequence[str]:
        bind = ["--bind", f"{HERE}:{self._ports[name]}", "--name", name, *self.cluster._secret]
        if name in ROUTERS:
            return ["router", *bind, "--model", "bytes", "--planner-mode", "off"]
        role = NODES[name]
        region = "away" if role == "prefill" else "home"
        return [role, *bind, "--region", region, "--kv-bind", f"{HERE}:0", "--routers", ",".join(self.urls), *ENGINE]

    async def ready(self) -> None:
        for router in ROUTERS:
            await self.cluster.wait_for(
                lambda m: sum(n for k, n in m["prfaas_router_nodes"].items() if "usable" in k) == len(NODES), router
            )

    async def replace(self, name: str, *, old: bool) -> None:
        """As rollout.sh does: ask it to end, start the other version in its place, wait until all are usable."""
        assert await asyncio.to_thread(self.cluster.processes[name].stop) == 0
        self.start(name, old=old)
        await self.ready()


@dataclass
class Clients:
    """Streams through either router; one that doesn't answer, or can't now, leaves them to the other."""

    cluster: object
    urls: list[str]
    rng: random.Random
    ended: int = 0
    news: asyncio.Event = field(default_factory=asyncio.Event)
    stop: bool = False

    async def run(self) -> None:
        while not self.stop:
            prompt = [self.rng.randrange(32, 127) for _ in range(self.rng.randrange(50, 1500))]
            output = OutputTokens(prompt, None)
            assert await self._text(prompt) == bytes(output.token(i) for i in range(TOKENS)).decode()
            self.ended += 1
            self.news.set()

    async def _text(self, prompt: list[int]) -> str:
        body = {"model": "emulated", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "stream": True}
        for _ in range(1000):
            url = self.rng.choice(self.urls)
            try:
                response = await self.cluster.session.post(f"{url}/v1/completions", json=body)
            except aiohttp.ClientConnectionError:  # nobody there, or a connection that was idle and is closed
                await asyncio.sleep(0.02)
                continue
            async with response:
                if response.status == 200:
                    return await self._read(response)
                assert response.status == 503, await response.text()
            await asyncio.sleep(0.02)
        raise AssertionError("no router answered")

    async def _read(self, response: aiohttp.ClientResponse) -> str:
        text, last = "", b""
        async for line in response.content:
            if line.startswith(b"data: {"):
                chunk = json.loads(line[6:])
                assert "error" not in chunk, f"{chunk}\n{self.cluster.logs()}"
                text += chunk["choices"][0]["text"]
            last = line.strip() or last
        assert last == b"data: [DONE]", self.cluster.logs()
        return text

    async def more(self, streams: int) -> None:
        until = self.ended + streams
        while self.ended < until:
            self.news.clear()
            await self.news.wait()


async def failed_early(clients: list[asyncio.Task[None]], doing) -> None:
    """`doing`, unless a client fails before it is done."""
    task = asyncio.ensure_future(doing)
    await asyncio.wait([task, *clients], return_when=asyncio.FIRST_COMPLETED)
    for client in clients:
        if client.done():
            task.cancel()
            client.result()
    await task


@pytest.mark.timeout(180)
async def test_versions_side_by_side_and_one_by_one_replaced_lose_nothing(cluster, previous: Path) -> None:
    """From all of the previous version to all of this one, a node and a router of each at a time, and one node back:
    every stream has the tokens of an undisturbed run, and prompts go on to be prefilled in the other region."""
    versions = Versions(cluster, previous)
    for name in (*ROUTERS, *NODES):
        versions.start(name, old=True)
    await versions.ready()
    clients = Clients(cluster, versions.urls, random.Random(6))
    running = [asyncio.create_task(clients.run()) for _ in range(AT_ONCE)]
    try:
        await failed_early(running, clients.more(STREAMS_EACH))
        for name, old in [*((name, False) for name in ("d1", "p1", "r1", "p2", "d2", "r2")), ("d1", True)]:
            await failed_early(running, versions.replace(name, old=old))
            await failed_early(running, clients.more(STREAMS_EACH))
    finally:
        clients.stop = True
        await asyncio.wait(running, timeout=30)
    for client in running:
        client.result()
    for router in ROUTERS:
        counted = (await cluster.metrics(router))["prfaas_router_decisions_total"]
        assert counted.get('reason="offloaded"', 0) > 0
        assert not counted.get('reason="prefill_failed"'), cluster.logs()
