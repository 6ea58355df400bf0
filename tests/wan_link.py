"""A WAN between two hosts on this machine, for tests and benchmarks; needs root.

    with wan_link(rate_bits_per_s=1e9, rtt_s=0.08) as link:
        server = link.near.start(sys.executable, "server.py", link.near.address)
        client = link.far.start(sys.executable, "client.py", link.near.address)
        ...
        link.change(rate_bits_per_s=2e8, loss=0.01)

Each host is a network namespace with one TUN device. A relay process of ours (this module, run as a program) reads the
packets of one device and writes them into the other after what the link does to them: a queue that overflows, the time
that the rate needs, delay, jitter, loss. netem would do as well, but not every kernel has it, and this runs the same on
all. The rate counts whole IP packets, so TCP's payload share of it is 1448/1500 over the usual MTU.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from prfaas.services.wan.line import Conditions, Counters
from prfaas.services.wan.tun import Relay, open_tun, set_offload

MTU_BYTES = 1500
TCP_PAYLOAD_SHARE = 1448 / MTU_BYTES
"""Of the link's rate, over IPv4 with timestamps."""
NEAR_ADDRESS, FAR_ADDRESS = "10.88.0.1", "10.88.0.2"
LEAST_QUEUE_BYTES = 256 << 10
CLONE_NEWNET = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)


def missing() -> str | None:
    """Why there can be no link here, or None."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        return "needs root and iproute2 (network namespaces)"
    if not Path("/dev/net/tun").exists():
        return "needs /dev/net/tun"
    return None


class Host:
    def __init__(self, namespace: str, address: str) -> None:
        self.namespace = namespace
        self.address = address

    def command(self, *arguments: str) -> list[str]:
        return ["ip", "netns", "exec", self.namespace, *arguments]

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        """As subprocess.Popen, in text mode, on this host. The caller ends it."""
        return subprocess.Popen(self.command(*arguments), text=True, **options)

    def enter(self) -> None:
        """The calling thread is on this host from now on, for good: sockets that it opens, processes that it starts."""
        with Path("/run/netns", self.namespace).open() as namespace:
            if _libc.setns(namespace.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"can't enter the network namespace {self.namespace}")

    def socket(self, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
        """An IPv4 socket on this host for the caller, who is not."""
        made: list[socket.socket] = []

        def make() -> None:
            self.enter()
            made.append(socket.socket(socket.AF_INET, kind))

        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        return made[0]


class WanLink:
    """Made by `wan_link`."""

    def __init__(self, near: Host, far: Host, conditions: Conditions, relay: subprocess.Popen[str]) -> None:
        self.near = near
        self.far = far
        self.conditions = conditions
        self._relay = relay

    def change(self, **changes: Any) -> None:
        """Fields of `Conditions`, from now on; packets under way keep their time. Loss is per packet only on a link
        that was made with `offload=False`."""
        self.conditions = replace(self.conditions, **changes)
        self._ask("conditions", asdict(self.conditions))

    def cut(self) -> None:
        """Every packet is dropped from now on; nobody is told."""
        self.change(down=True)

    def heal(self) -> None:
        self.change(down=False)

    def counters(self) -> tuple[Counters, Counters]:
        """From near to far, and back."""
        there, back = self._ask("counters", None)
        return Counters(**there), Counters(**back)

    def _ask(self, what: str, value: Any) -> Any:
        assert self._relay.stdin is not None
        assert self._relay.stdout is not None
        print(json.dumps([what, value]), file=self._relay.stdin, flush=True)
        answer = self._relay.stdout.readline()
        if not answer:
            raise RuntimeError(f"the relay of the emulated link has ended with status {self._relay.wait()}")
        return json.loads(answer)


@contextlib.contextmanager
def wan_link(
    *,
    rate_bits_per_s: float = 1e9,
    rtt_s: float = 0.0,
    jitter_s: float = 0.0,
    loss: float = 0.0,
    queue_bytes: int | None = None,
    offload: bool | None = None,
) -> Iterator[WanLink]:
    """`queue_bytes`: one bandwidth-delay product unless given. `offload`: the kernel hands packets over in bunches of
    up to 64 KB, which takes a fifth of the processor time and loses whole bunches; by default where there is no loss.

    Raises RuntimeError where `missing` says why.
    """
    reason = missing()
    if reason:
        raise RuntimeError(f"no emulated WAN here: {reason}")
    if queue_bytes is None:
        queue_bytes = max(LEAST_QUEUE_BYTES, int(rate_bits_per_s / 8 * rtt_s))
    conditions = Conditions(rate_bits_per_s, rtt_s / 2, jitter_s, loss, queue_bytes)
    near, far = (Host(f"prfaas-{os.getpid()}-{end}", address) for end, address in _ENDS)
    with contextlib.ExitStack() as made:
        for host in (near, far):
            _namespace(made, host)
        options = {
            "namespaces": [near.namespace, far.namespace],
            "offload": loss == 0 if offload is None else offload,
            "conditions": asdict(conditions),
        }
        relay = made.enter_context(
            subprocess.Popen(
                [sys.executable, __file__, json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        made.callback(relay.terminate)
        link = WanLink(near, far, conditions, relay)
        link.counters()  # it answers: both devices are up
        yield link


_ENDS = (("near", NEAR_ADDRESS), ("far", FAR_ADDRESS))


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def _namespace(made: contextlib.ExitStack, host: Host) -> None:
    _run("ip", "netns", "add", host.namespace)
    made.callback(subprocess.run, ["ip", "netns", "delete", host.namespace], check=False, capture_output=True)
    _run("ip", "-n", host.namespace, "link", "set", "lo", "up")
    # What the kernel remembers of an earlier connection would decide how the next one starts.
    _run(*host.command("sysctl", "-qw", "net.ipv4.tcp_no_metrics_save=1"))


# -- the relay process ------------------------------------------------------------------------------------------------

QUEUE_PACKETS = 10000


def _device(name: str, namespace: str, address: str, offload: bool) -> int:
    """A TUN device, up, with the address, in the namespace."""
    device = open_tun(name)
    set_offload(device, offload)
    ip = ("ip", "-n", namespace)
    _run("ip", "link", "set", name, "netns", namespace)
    _run(*ip, "address", "add", f"{address}/24", "dev", name)
    # No packets of IPv6's own (its router solicitations) among those that tests count.
    _run(*ip, "link", "set", name, "addrgenmode", "none")
    _run(*ip, "link", "set", name, "mtu", str(MTU_BYTES), "txqueuelen", str(QUEUE_PACKETS), "up")
    return device


def relay(options: dict[str, Any]) -> None:
    """Until stdin closes."""
    near, far = (
        _device(f"wan{os.getpid()}-{end}", namespace, address, options["offload"])
        for namespace, (end, address) in zip(options["namespaces"], _ENDS, strict=True)
    )
    running = Relay((near, far), Conditions(**options["conditions"]))

    def asked() -> bool:
        # One question at a time: nothing stays behind in stdin's own buffer.
        line = sys.stdin.readline()
        if not line:
            return False
        what, value = json.loads(line)
        if what == "conditions":
            running.conditions = Conditions(**value)
        print(json.dumps([asdict(counters) for counters in running.counters()]), flush=True)
        return True

    running.run(sys.stdin.fileno(), asked)


if __name__ == "__main__":
    relay(json.loads(sys.argv[1]))
