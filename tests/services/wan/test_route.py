"""`prfaas wan` between three network namespaces: two networks, and the machine that joins them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.wan_link import Host, missing

pytestmark = [pytest.mark.deploy, pytest.mark.netns, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

DELAY_MS = 25
FIRST, SECOND = "10.89.1", "10.89.2"


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Joined:
    """Two hosts, each with the gateway of its network as default route, and the machine between them."""

    def __init__(self, made: contextlib.ExitStack, folder: Path) -> None:
        names = [f"prfaas-route-{os.getpid()}-{what}" for what in ("first", "second", "wan")]
        self.first, self.second = Host(names[0], f"{FIRST}.10"), Host(names[1], f"{SECOND}.10")
        self.wan = Host(names[2], f"{FIRST}.1")
        self.control = folder / "control"
        for host in (self.first, self.second, self.wan):
            ip("netns", "add", host.namespace)
            made.callback(subprocess.run, ["ip", "netns", "delete", host.namespace], check=False)
            ip("-n", host.namespace, "link", "set", "lo", "up")
        for host, prefix, device in ((self.first, FIRST, "eth0"), (self.second, SECOND, "eth1")):
            peer = ("peer", "name", device, "netns", self.wan.namespace)
            ip("link", "add", "eth0", "netns", host.namespace, "type", "veth", *peer)
            for namespace, name, address in ((host.namespace, "eth0", 10), (self.wan.namespace, device, 1)):
                ip("-n", namespace, "address", "add", f"{prefix}.{address}/24", "dev", name)
                ip("-n", namespace, "link", "set", name, "up")
            ip("-n", host.namespace, "route", "add", "default", "via", f"{prefix}.254")
        for setting in ("ip_forward=1", "conf.all.rp_filter=0", "conf.default.rp_filter=0"):
            subprocess.run(self.wan.command("sysctl", "-qw", f"net.ipv4.{setting}"), check=True)

    def prfaas(self, *arguments: str) -> list[str]:
        return self.wan.command(sys.executable, "-m", "prfaas.services", "wan", *arguments)

    def route(self, *arguments: str) -> list[str]:
        gateways = ("--gateways", f"{FIRST}.254/24", f"{SECOND}.254/24")
        return self.prfaas("route", *gateways, "--control", str(self.control), *arguments)

    def ask(self, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        full = self.prfaas(command, "--control", str(self.control), *arguments)
        return subprocess.run(full, capture_output=True, text=True)

    def state(self) -> dict[str, dict[str, float]]:
        done = self.ask("show", "--json")
        assert done.returncode == 0, done.stderr
        found: dict[str, dict[str, float]] = json.loads(done.stdout)
        return found

    def connect_s(self) -> float:
        """How long TCP's handshake takes from the first network to the second."""
        with self.second.socket() as listener, self.first.socket() as client:
            listener.bind((self.second.address, 0))
            listener.listen()
            client.settimeout(20)
            began_s = time.monotonic()
            client.connect(listener.getsockname())
            return time.monotonic() - began_s


@contextlib.contextmanager
def running(joined: Joined, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(joined.route(*arguments), stderr=subprocess.PIPE, text=True) as process:
        try:
            until_s = time.monotonic() + 30
            while joined.ask("show").returncode != 0:
                assert process.poll() is None, process.communicate()[1]
                assert time.monotonic() < until_s
            yield process
        finally:
            process.terminate()


@pytest.fixture
def joined(tmp_path: Path) -> Iterator[Joined]:
    with contextlib.ExitStack() as made:
        yield Joined(made, tmp_path)


def test_what_crosses_has_the_round_trip_and_changes_with_the_line(joined: Joined) -> None:
    """And the counters say what crossed; a line that is cut carries nothing until it is healed."""
    with running(joined, "--delay-ms", str(DELAY_MS)):
        assert joined.connect_s() >= 2 * DELAY_MS / 1e3
        before = joined.state()["there"]["packets"]
        assert before >= 2
        done = joined.ask("set", "--delay-ms", "100", "--rate-mbit", "40")
        assert done.returncode == 0, done.stderr
        assert "40 Mbit/s, 100 ms one way" in done.stdout
        assert joined.connect_s() >= 0.2
        assert joined.ask("set", "--down").returncode == 0
        healed = threading.Timer(0.5, lambda: joined.ask("set", "--up", "--delay-ms", "1"))
        healed.start()
        assert joined.connect_s() >= 0.5  # the kernel sends its SYN again after a second
        healed.join()
        assert joined.state()["there"]["lost"] >= 1


def test_bunches_and_single_packets_arrive_whole(joined: Joined) -> None:
    """The bytes are the same with loss and without."""
    data = os.urandom(1 << 20)
    with running(joined, "--delay-ms", "1", "--rate-mbit", "1000"):
        for loss in ("0", "2"):
            assert joined.ask("set", "--loss-percent", loss).returncode == 0
            assert sent(joined, data) == data
        assert joined.state()["there"]["lost"] > 0


def sent(joined: Joined, data: bytes) -> bytes:
    with joined.second.socket() as listener, joined.first.socket() as client:
        listener.bind((joined.second.address, 0))
        listener.listen()
        client.settimeout(30)
        client.connect(listener.getsockname())
        server, _ = listener.accept()
        with server:
            server.settimeout(30)

            def send() -> None:
                client.sendall(data)
                client.shutdown(socket.SHUT_WR)

            sender = threading.Thread(target=send)
            sender.start()
            got = b"".join(iter(lambda: server.recv(1 << 16), b""))
            sender.join()
    return got


def test_nothing_crosses_but_over_the_line(joined: Joined) -> None:
    """Without the process there is no way, though the machine forwards; and a killed one can be followed by another."""
    with running(joined, "--delay-ms", "0") as process:
        joined.connect_s()
        process.send_signal(signal.SIGKILL)
        process.wait(20)
        with joined.first.socket() as client:
            client.settimeout(1)
            with pytest.raises(OSError, match=r"timed out|unreachable|No route"):
                client.connect((joined.second.address, 9))
    with running(joined, "--delay-ms", "0"):
        joined.connect_s()


def test_the_process_gives_up_what_it_was(joined: Joined) -> None:
    with running(joined, "--user", "nobody") as process:
        status = Path(f"/proc/{child_of(process.pid)}/status").read_text()
        fields = dict(line.split(":\t") for line in status.splitlines() if ":\t" in line)
        assert "0" not in fields["Uid"].split()
        assert int(fields["CapEff"], 16) == 0
        assert joined.ask("set", "--delay-ms", "3").returncode == 0


def child_of(pid: int) -> int:
    """`ip netns exec` becomes the program that it starts."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0]) if children else pid


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["route"], "--gateways"),
        (["route", "--gateways", "10.0.0.1/24", "10.0.0.2/24"], "overlap"),
        (["route", "--gateways", "10.0.0.1", "10.0.1.2/24"], "must name its network too"),
        (["route", "--gateways", "a", "10.0.1.2/24"], "must look like 10.0.0.254/24"),
        (["route", "--gateways", "10.1.0.1/24", "10.1.1.2/24", "--loss-percent", "101"], "from 0 to 100"),
        (["set"], "name what to change"),
        (["set", "--rate-mbit", "0"], "must be a number from 0.01"),
        (["set", "--down", "--up"], "not allowed with"),
        (["sett"], "did you mean prfaas wan set?"),
    ],
)
def test_wrong_arguments_are_usage_errors(arguments: list[str], complaint: str) -> None:
    done = subprocess.run([sys.executable, "-m", "prfaas.services", "wan", *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_missing_is_said(joined: Joined, tmp_path: Path) -> None:
    """No line that runs, a network not here, no such user, no right, a machine that forwards nothing."""
    done = joined.ask("show")
    assert (done.returncode, "no line answers" in done.stderr) == (1, True)
    elsewhere = joined.prfaas(
        "route", "--gateways", "10.77.0.1/24", f"{SECOND}.254/24", "--control", str(tmp_path / "c")
    )
    assert "no device of this machine is in the network 10.77.0.0/24" in failed(elsewhere)
    assert "there is no user prfaas-nobody" in failed(joined.route("--user", "prfaas-nobody"))
    powerless = joined.wan.command("setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin")
    assert "CAP_NET_ADMIN" in failed([*powerless, *joined.route()[4:]])
    subprocess.run(joined.wan.command("sysctl", "-qw", "net.ipv4.ip_forward=0"), check=True)
    assert "sysctl -w net.ipv4.ip_forward=1" in failed(joined.route())


def failed(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done.stderr
