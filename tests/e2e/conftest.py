"""A cluster of real processes in two regions, joined by an emulated WAN, that tests can start, stop and kill."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

START_S = 60.0
LANES = 4


def _candidates() -> Iterator[int]:
    """Below the ports that the kernel gives to outgoing connections, which would take one between here and its bind;
    each once in this process, and others in the test processes beside it."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8
    size = (31_000 - 12_000) // 8
    first, begin = 12_000 + worker * size, random.SystemRandom().randrange(size)
    return itertools.cycle(first + (begin + i) % size for i in range(size))


_PORTS = _candidates()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, all different."""
    found: list[int] = []
    while len(found) < count:
        port = next(_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
    return found


class Process:
    """One service; its output goes to a file, which a failing test prints."""

    def __init__(self, name: str, arguments: list[str], url: str, log: Path, *, own: bool = False) -> None:
        """arguments: a module and its arguments, or (own) a program and its."""
        self.name, self.url, self.log = name, url, log
        self._command = arguments if own else [sys.executable, "-m", *arguments]
        self.start()

    def start(self) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PRFAAS_")} | {"OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as out:
            self._popen = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=environment,
            )

    def signal(self, number: signal.Signals) -> None:
        self._popen.send_signal(number)

    def kill(self) -> None:
        self._popen.kill()
        self._popen.wait()

    def stop(self) -> int:
        """SIGTERM and wait; the exit status."""
        self._popen.terminate()
        return self.wait()

    def wait(self) -> int:
        """The exit status, once it ends by itself."""
        try:
            return self._popen.wait(20)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            raise

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def alive(self) -> bool:
        return self._popen.poll() is None

    def tail(self, lines: int = 15) -> str:
        if not self.log.is_file():
            return f"(its log is {self.log})"
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


class Cluster:
    """prefill region --WAN-- home region (router, decode). All processes by name in `processes`."""

    start_s = START_S
    """For all nodes to be there."""

    def __init__(self, folder: Path, session: aiohttp.ClientSession) -> None:
        self.folder, self.session = folder, session
        self.logs_to: dict[str, Path] = {}
        """Where a process's output goes, if not to a file of its own."""
        self.processes: dict[str, Process] = {}
        self.router_url = ""
        secret = folder / "secret"
        secret.write_text("e2e-" + os.urandom(16).hex())
        self._secret = ["--secret-file", str(secret)]

    def _add(self, name: str, arguments: list[str], url: str) -> Process:
        process = self.processes[name] = Process(
            name, arguments, url, self.logs_to.get(name, self.folder / f"{name}.log")
        )
        return process

    async def start(
        self,
        engine: list[str],
        router: list[str],
        *,
        heartbeat_s: float = 0.5,
        rate_mbit: float = 500,
        delay_ms: float = 5,
        prefill: list[str] | None = None,
        decode: list[str] | None = None,
    ) -> None:
        """One router, one prefill node, one decode node. `engine`: flags of both nodes."""
        router_port, prefill_port, decode_port, kv_port, wan_router, wan_prefill, wan_kv = free_ports(7)
        self.router_url = f"http://127.0.0.1:{router_port}"
        here = "127.0.0.1"
        engine = [*engine, "--node-heartbeat-s", str(heartbeat_s)]
        self._add(
            "wan",
            [
                "prfaas.services.wan.proxy",
                "--rate-mbit",
                str(rate_mbit),
                "--delay-ms",
                str(delay_ms),
                "--forward",
                f"{here}:{wan_router}={here}:{router_port}",
                "--forward",
                f"{here}:{wan_kv}={here}:{kv_port}",
                "--backward",
                f"{here}:{wan_prefill}={here}:{prefill_port}",
            ],
            "",
        )
        self._add(
            "router",
            ["prfaas.services", "router", "--bind", f"{here}:{router_port}", *self._secret, *router],
            self.router_url,
        )
        self._add(
            "decode",
            [
                "prfaas.services",
                "decode",
                "--name",
                "decode-1",
                "--region",
                "home",
                "--bind",
                f"{here}:{decode_port}",
                "--routers",
                self.router_url,
                "--kv-bind",
                f"{here}:{kv_port}",
                "--kv-advertise",
                f"{here}:{wan_kv}",
                *self._secret,
                *engine,
                *(decode or []),
            ],
            f"http://{here}:{decode_port}",
        )
        self._add(
            "prefill",
            [
                "prfaas.services",
                "prefill",
                "--name",
                "prefill-1",
                "--region",
                "dense",
                "--bind",
                f"{here}:{prefill_port}",
                "--advertise",
                f"http://{here}:{wan_prefill}",
                "--routers",
                f"http://{here}:{wan_router}",
                *self._secret,
                *engine,
                *(prefill or []),
            ],
            f"http://{here}:{prefill_port}",
        )
        await self.wait_for(
            lambda m: (
                m.get("prfaas_router_nodes", {}).get('role="prefill",state="usable"', 0) == 1
                and m["prfaas_router_nodes"].get('role="decode",state="usable"', 0) == 1
            ),
            timeout_s=self.start_s,
        )
        # Lanes are opened before they are needed; the tests that count them start from a settled state.
        await self.wait_for(lambda m: m["prfaas_transport_lanes"][""] == LANES, "decode")

    async def metrics(self, name: str = "router") -> dict[str, dict[str, float]]:
        """{metric: {labels: value}} of one process; empty while it does not answer."""
        try:
            async with self.session.get(self.processes[name].url + "/metrics") as response:
                text = await response.text()
        except aiohttp.ClientError:
            return {}
        parsed: dict[str, dict[str, float]] = {}
        for line in text.splitlines():
            if line and not line.startswith("#"):
                key, value = line.rsplit(" ", 1)
                metric, _, labels = key.partition("{")
                parsed.setdefault(metric, {})[labels.rstrip("}")] = float(value)
        return parsed

    async def wait_for(
        self, condition: Callable[[dict[str, dict[str, float]]], bool], name: str = "router", timeout_s: float = START_S
    ) -> None:
        """Until a process's metrics fulfil `condition`; fails the test with all logs' ends otherwise."""
        deadline = time.monotonic() + timeout_s
        seen: dict[str, dict[str, float]] = {}
        while time.monotonic() < deadline:
            seen = await self.metrics(name)
            if seen and condition(seen):
                return
            dead = [p.name for p in self.processes.values() if not p.alive]
            if name in dead:
                break
            # A poll, since a process's state can only be asked for.
            await asyncio.sleep(0.05)
        pytest.fail(f"{name} did not come to the expected state; it shows {seen}\n{self.logs()}")

    def logs(self) -> str:
        return "\n".join(f"--- {p.name} (alive: {p.alive})\n{p.tail()}" for p in self.processes.values())

    async def models(self) -> str:
        async with self.session.get(self.router_url + "/v1/models") as response:
            return str((await response.json())["data"][0]["id"])

    async def complete(self, prompt: Any, max_tokens: int = 16, **fields: Any) -> dict[str, Any]:
        """A whole completion; raises on any status but 200."""
        body = {"model": await self.models(), "prompt": prompt, "max_tokens": max_tokens, "temperature": 0} | fields
        async with self.session.post(self.router_url + "/v1/completions", json=body) as response:
            answer = await response.json()
            assert response.status == 200, f"{response.status}: {answer}\n{self.logs()}"
            return dict(answer) | {"headers": {k.lower(): v for k, v in response.headers.items()}}

    async def stream(self, prompt: Any, max_tokens: int = 16, **fields: Any) -> AsyncIterator[dict[str, Any]]:
        """The chunks of a streamed completion, errors included; ends at [DONE] or at the end of the body."""
        body = {
            "model": await self.models(),
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
        } | fields
        async with self.session.post(self.router_url + "/v1/completions", json=body) as response:
            assert response.status == 200, f"{await response.text()}\n{self.logs()}"
            async for line in response.content:
                if line.startswith(b"data: ") and line != b"data: [DONE]\n":
                    yield json.loads(line[6:])

    def close(self) -> None:
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.signal(signal.SIGCONT)
                process.signal(signal.SIGKILL)
        for process in self.processes.values():
            process.kill()


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    """A cluster that the test starts; every process is gone afterwards."""
    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        made = Cluster(tmp_path, session)
        try:
            yield made
        finally:
            made.close()
