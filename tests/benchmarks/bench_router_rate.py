"""How many short requests a second go through the router, and what bounds it.

    python -m tests.benchmarks.bench_router_rate [--processes 1] [--seconds 10] [--json]

Real processes on loopback: the router (so many processes behind one port), emulated decode nodes, and this client,
which speaks just enough HTTP/1.1 to cost little. Prompts of 32 ids, one token of output, prefilled at home; a closed
loop. Every process' CPU is read from /proc: on a machine whose cores all of them share, the rate is what the cores
give to the sum, and the router's own ceiling is one core over its CPU a request, which is printed beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import secrets
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import uvloop
from prfaas.services.commands.demo.cluster import Child

HOST = "127.0.0.1"
TARGET_PER_S = 1000
PROMPT_TOKENS = 32
WARM_S = 2.0
READY_S = 60.0
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def free_run_of_ports(count: int) -> int:
    """The first of so many neighbours that nobody listens on now."""
    while True:
        with contextlib.ExitStack() as held:
            first: int = held.enter_context(socket.create_server((HOST, 0))).getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                for port in range(first + 1, first + count):
                    held.enter_context(socket.create_server((HOST, port)))
                return first


def cpu_s(pid: int) -> float:
    """Of a process and its children."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    own = (int(fields[11]) + int(fields[12])) * TICK_S
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return own + sum(cpu_s(int(child)) for child in children)


@contextlib.contextmanager
def cluster(options: argparse.Namespace) -> Iterator[tuple[int, Child, list[Child]]]:
    """(API port, the router, the nodes), ready."""
    folder = Path(tempfile.mkdtemp(prefix="router-rate-"))
    env = {**os.environ, "PRFAAS_CLUSTER_SECRET": secrets.token_hex(8), "PRFAAS_LOG_LEVEL": options.log_level}
    api, own = free_run_of_ports(1), free_run_of_ports(options.processes)
    url = f"http://{HOST}:{api}"

    def child(name: str, *words: str) -> Child:
        return Child(name, [sys.executable, "-m", "prfaas.services", *words], folder, env)

    router = child(
        "router",
        *("router", "--bind", f"{HOST}:{api}", "--model", "bytes", "--threshold", "4096"),
        *("--router-processes", str(options.processes), "--router-node-port", str(own)),
    )
    nodes = [
        child(
            f"decode-{i}",
            *("decode", "--name", f"decode-{i}", "--routers", url, "--engine", "emulated"),
            *("--engine-decode-step-s", "0.002", "--engine-max-batch", "4096", "--engine-prefill-tokens-per-s", "1e8"),
            *("--engine-prefix-bytes", "0", "--engine-arena-bytes", "256M"),
        )
        for i in range(options.nodes)
    ]
    try:
        until_s = time.monotonic() + READY_S
        ports = [api] if options.processes == 1 else range(own, own + options.processes)
        while not all(_knows(port, options.nodes) for port in ports):
            for each in (router, *nodes):
                each.check()
            if time.monotonic() > until_s:
                raise SystemExit(f"the cluster did not get ready; logs are in {folder}")
            time.sleep(0.1)
        yield api, router, nodes
    finally:
        for each in (router, *nodes):
            each.stop()
        for each in (router, *nodes):
            each.reap(time.monotonic() + 5.0)


def _knows(port: int, nodes: int) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=2.0)
    try:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        return f'prfaas_router_nodes{{role="decode",state="usable"}} {nodes}.0' in text
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


class Connection(asyncio.Protocol):
    """One request after the other."""

    def __init__(self, request: bytes, latencies_s: list[float], failures: list[bytes]) -> None:
        self._request = request
        self._latencies_s = latencies_s
        self._failures = failures
        self._data = b""
        self._sent_s = 0.0
        self.stopping = False
        self.over = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]
        self._send()

    def _send(self) -> None:
        self._sent_s = time.perf_counter()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, found, body = self._data.partition(b"\r\n\r\n")
        if not found:
            return
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        if len(body) < length:
            return
        self._latencies_s.append(time.perf_counter() - self._sent_s)
        if not head.startswith(b"HTTP/1.1 200"):
            self._failures.append(head.partition(b"\r\n")[0])
        self._data = b""
        if self.stopping:
            self._transport.close()
        else:
            self._send()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.over.done():
            self.over.set_result(None)


async def drive(api: int, options: argparse.Namespace, router: Child, nodes: list[Child]) -> dict[str, Any]:
    body = json.dumps(
        {"model": "emulated", "prompt": list(range(32, 32 + PROMPT_TOKENS)), "max_tokens": 1, "temperature": 0}
    ).encode()
    request = (
        b"POST /v1/completions HTTP/1.1\r\nhost: router\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%b" % (len(body), body)
    )
    latencies_s: list[float] = []
    failures: list[bytes] = []
    loop = asyncio.get_running_loop()
    connections: list[Connection] = []
    for _ in range(options.concurrency):
        _, made = await loop.create_connection(lambda: Connection(request, latencies_s, failures), HOST, api)
        connections.append(made)
    await asyncio.sleep(WARM_S)
    latencies_s.clear()
    before = [cpu_s(router.pid), sum(cpu_s(node.pid) for node in nodes), time.process_time()]
    started_s = time.perf_counter()
    await asyncio.sleep(options.seconds)
    seconds, done = time.perf_counter() - started_s, len(latencies_s)
    after = [cpu_s(router.pid), sum(cpu_s(node.pid) for node in nodes), time.process_time()]
    shown_s = sorted(latencies_s)
    for connection in connections:
        connection.stopping = True
    await asyncio.gather(*(connection.over for connection in connections))
    router_s, nodes_s, client_s = ((late - early) / done for late, early in zip(after, before, strict=True))
    return {
        "requests_per_s": round(done / seconds, 1),
        "failures": len(failures),
        "latency_median_ms": round(median(shown_s) * 1e3, 2),
        "latency_p99_ms": round(shown_s[int(len(shown_s) * 0.99)] * 1e3, 2),
        "cpu_us_a_request": {
            "router": round(router_s * 1e6),
            "nodes": round(nodes_s * 1e6),
            "client": round(client_s * 1e6),
        },
        "cores_busy": round((router_s + nodes_s + client_s) * done / seconds, 2),
        "cores": os.cpu_count(),
        "one_router_process_ceiling_per_s": round(1 / router_s),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="of the router, one run each")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--log-level", default="info")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    made: dict[str, Any] = {"target_per_s": TARGET_PER_S}
    for processes in options.processes:
        options.processes = processes
        with cluster(options) as (api, router, nodes):
            made[f"{processes}_processes"] = uvloop.run(drive(api, options, router, nodes))
    print(json.dumps(made, indent=None if options.json else 1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
