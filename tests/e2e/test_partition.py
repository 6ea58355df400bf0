"""A network that drops every packet, between two hosts in network namespaces: nobody hears anything, no RST, no FIN."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(
        os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("bridge"),
        reason="needs root and iproute2 (network namespaces)",
    ),
]

ROUTER, NODE = "10.77.0.1", "10.77.0.2"
FETCH = "import sys,urllib.request as u; sys.stdout.write(u.urlopen(sys.argv[1],timeout=3).read().decode())"
# Starts an endless stream and says so at its first byte.
STREAM = """
import json, sys, urllib.request as u
body = {"model": "emulated", "prompt": [65] * 50, "max_tokens": 8000, "stream": True}
request = u.Request(sys.argv[1] + "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"})
response = u.urlopen(request, timeout=120)
response.readline()
print("streaming", flush=True)
while response.read(4096):
    pass
"""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Network:
    """Hosts `a` and `b`, each in a namespace, on a switch in a third one."""

    def __init__(self) -> None:
        self._names = {host: f"prfaas-{os.getpid()}-{host}" for host in "abs"}
        for name in self._names.values():
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        switch = self._names["s"]
        ip("-n", switch, "link", "add", "sw", "type", "bridge")
        ip("-n", switch, "link", "set", "sw", "up")
        for host, address in (("a", ROUTER), ("b", NODE)):
            name = self._names[host]
            ip("-n", name, "link", "add", "eth", "type", "veth", "peer", "name", f"port-{host}", "netns", switch)
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth")
            ip("-n", name, "link", "set", "eth", "up")
            ip("-n", switch, "link", "set", f"port-{host}", "master", "sw", "up")

    def command(self, host: str, *arguments: str) -> list[str]:
        return ["ip", "netns", "exec", self._names[host], *arguments]

    def cut(self) -> None:
        """From now on the switch drops what b sends and what is sent to b; both links stay up."""
        self._port_state("disabled")

    def heal(self) -> None:
        self._port_state("forwarding")

    def _port_state(self, state: str) -> None:
        number = {"disabled": "0", "forwarding": "3"}[state]
        command = self.command("s", "bridge", "link", "set", "dev", "port-b", "state", number)
        subprocess.run(command, check=True, capture_output=True)

    def close(self) -> None:
        for name in self._names.values():
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


@pytest.fixture
def network() -> Iterator[Network]:
    made = Network()
    try:
        yield made
    finally:
        made.close()


def wait_for(what: str, condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {timeout_s:g} s: {what}")
        # Another process's state can only be asked for.
        time.sleep(0.1)


def test_blackholed_router_loses_its_leases(network: Network, tmp_path: Path) -> None:
    """Every packet between router and decode node is dropped mid-stream: within 15 s the node has freed the request;
    when the network heals, it is registered again and serves."""
    secret = tmp_path / "secret"
    secret.write_text("partition-" + os.urandom(8).hex())

    def metric(host: str, url: str, line: str) -> float | None:
        done = subprocess.run(
            network.command(host, sys.executable, "-c", FETCH, f"{url}/metrics"), capture_output=True, text=True
        )
        values = [text.rsplit(" ", 1)[1] for text in done.stdout.splitlines() if text.startswith(line + " ")]
        return float(values[0]) if values else None

    router_url, node_url = f"http://{ROUTER}:8000", f"http://{NODE}:8100"
    prfaas = [sys.executable, "-m", "prfaas.services"]
    with contextlib.ExitStack() as running:

        def start(host: str, *arguments: str, **options: object) -> subprocess.Popen[str]:
            log = running.enter_context((tmp_path / f"{host}.log").open("a"))
            process = subprocess.Popen(
                network.command(host, *arguments),
                stderr=log,
                stdout=options.get("stdout", log),
                text=True,  # type: ignore[call-overload]
            )
            running.enter_context(process)  # waits and closes its pipes
            running.callback(process.kill)
            return process

        start("a", *prfaas, "router", "--model", "bytes", "--bind", f"{ROUTER}:8000", "--secret-file", str(secret))
        start(
            "b", *prfaas, "decode", "--engine", "emulated", "--bind", f"{NODE}:8100", "--kv-bind", f"{NODE}:8200",
            "--routers", router_url, "--secret-file", str(secret), "--engine-arena-bytes", "64M",
            "--node-heartbeat-s", "0.5",
        )  # fmt: skip
        usable = 'prfaas_router_nodes{role="decode",state="usable"}'
        wait_for("the node is registered", lambda: metric("a", router_url, usable) == 1, 30)
        client = start("a", sys.executable, "-c", STREAM, router_url, stdout=subprocess.PIPE)
        assert client.stdout is not None
        assert client.stdout.readline() == "streaming\n"
        assert metric("b", node_url, "prfaas_node_running_requests") == 1

        network.cut()
        wait_for("the lease is freed", lambda: metric("b", node_url, "prfaas_node_running_requests") == 0, 15)

        network.heal()
        wait_for("the node is registered again", lambda: metric("a", router_url, usable) == 1, 30)
        again = start("a", sys.executable, "-c", STREAM, router_url, stdout=subprocess.PIPE)
        assert again.stdout is not None
        assert again.stdout.readline() == "streaming\n"
