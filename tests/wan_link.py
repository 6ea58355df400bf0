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

import collections
import contextlib
import ctypes
import fcntl
import json
import os
import random
import select
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class Conditions:
    """The same in both directions."""

    rate_bits_per_s: float = 1e9
    delay_s: float = 0.0
    """One way."""
    jitter_s: float = 0.0
    """Each packet waits up to so much longer, but never overtakes another."""
    loss: float = 0.0
    """Share of packets."""
    queue_bytes: int = 0
    """Before the bottleneck; packets beyond it are dropped."""
    down: bool = False
    """Every packet is dropped."""


@dataclass(frozen=True)
class Counters:
    """Of one direction, since the link is there."""

    packets: int
    """That arrived; segments that the kernel hands over as one count one by one."""
    packet_bytes: int
    """Of these, IP headers included."""
    lost: int
    overflowed: int
    latest_s: float
    """By how much the relay itself was late at most: what the machine's load adds to the emulation."""


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

TUNSETIFF, TUNSETOFFLOAD, TUNSETVNETHDRSZ = 0x400454CA, 0x400454D0, 0x400454D8
IFF_TUN, IFF_NO_PI, IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
OFFLOADS = 0x01 | 0x02 | 0x04  # checksums, TSO over IPv4, TSO over IPv6
VIRTIO_HEADER = struct.Struct("=BBHHHH")
"""flags, gso_type, hdr_len, gso_size, csum_start, csum_offset: before each packet where offload is on."""
LARGEST_BYTES = 65536 + VIRTIO_HEADER.size
QUEUE_PACKETS = 10000
TURN_PACKETS = 64


def open_tun(name: str, namespace: str, address: str, offload: bool) -> int:
    """A TUN device, up, with the address, in the namespace; it lives as long as the descriptor."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    flags = IFF_TUN | IFF_NO_PI | (IFF_VNET_HDR if offload else 0)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    if offload:
        fcntl.ioctl(device, TUNSETVNETHDRSZ, struct.pack("i", VIRTIO_HEADER.size))
        fcntl.ioctl(device, TUNSETOFFLOAD, OFFLOADS)
    ip = ("ip", "-n", namespace)
    _run("ip", "link", "set", name, "netns", namespace)
    _run(*ip, "address", "add", f"{address}/24", "dev", name)
    # No packets of IPv6's own (its router solicitations) among those that tests count.
    _run(*ip, "link", "set", name, "addrgenmode", "none")
    _run(*ip, "link", "set", name, "mtu", str(MTU_BYTES), "txqueuelen", str(QUEUE_PACKETS), "up")
    return device


class Direction:
    """Packets from one device to the other."""

    def __init__(self, source: int, target: int, offload: bool, rng: random.Random) -> None:
        self.source = source
        self._target = target
        self._header_bytes = VIRTIO_HEADER.size if offload else 0
        self._rng = rng
        self._under_way: collections.deque[tuple[float, bytes, int, int]] = collections.deque()
        self._free_s = 0.0
        """When the bottleneck has sent all that waits before it."""
        self.packets = self.packet_bytes = self.lost = self.overflowed = 0
        self.latest_s = 0.0

    @property
    def next_s(self) -> float | None:
        return self._under_way[0][0] if self._under_way else None

    def take(self, conditions: Conditions) -> None:
        for _ in range(TURN_PACKETS):
            try:
                packet = os.read(self.source, LARGEST_BYTES)
            except BlockingIOError:
                return
            self._enter(packet, conditions, time.monotonic())

    def _enter(self, packet: bytes, conditions: Conditions, now_s: float) -> None:
        nbytes, segments = self._on_the_wire(packet)
        if conditions.down or (conditions.loss and self._rng.random() >= (1 - conditions.loss) ** segments):
            self.lost += segments
            return
        start_s = max(self._free_s, now_s)
        if (start_s - now_s) * conditions.rate_bits_per_s / 8 > conditions.queue_bytes:
            self.overflowed += segments
            return
        self._free_s = start_s + nbytes * 8 / conditions.rate_bits_per_s
        due_s = self._free_s + conditions.delay_s + self._rng.random() * conditions.jitter_s
        if self._under_way:
            due_s = max(due_s, self._under_way[-1][0])
        self._under_way.append((due_s, packet, nbytes, segments))

    def _on_the_wire(self, packet: bytes) -> tuple[int, int]:
        """Bytes and packets that the kernel's bunch will be."""
        nbytes = len(packet) - self._header_bytes
        if not self._header_bytes:
            return nbytes, 1
        _, gso_type, header_bytes, segment_bytes, _, _ = VIRTIO_HEADER.unpack_from(packet)
        if not gso_type or not segment_bytes:
            return nbytes, 1
        segments = max(1, -(-(nbytes - header_bytes) // segment_bytes))
        return nbytes + (segments - 1) * header_bytes, segments

    def deliver(self) -> None:
        now_s = time.monotonic()
        under_way = self._under_way
        while under_way and under_way[0][0] <= now_s:
            due_s, packet, nbytes, segments = under_way.popleft()
            try:
                os.write(self._target, packet)
            except OSError:
                self.overflowed += segments
                continue
            self.packets += segments
            self.packet_bytes += nbytes
            self.latest_s = max(self.latest_s, now_s - due_s)

    def counters(self) -> dict[str, float]:
        return asdict(Counters(self.packets, self.packet_bytes, self.lost, self.overflowed, self.latest_s))


def relay(options: dict[str, Any]) -> None:
    """Until stdin closes."""
    offload, conditions = options["offload"], Conditions(**options["conditions"])
    devices = [
        open_tun(f"wan{os.getpid()}-{end}", namespace, address, offload)
        for namespace, (end, address) in zip(options["namespaces"], _ENDS, strict=True)
    ]
    rng = random.Random(0)
    there, back = Direction(*devices, offload, rng), Direction(*devices[::-1], offload, rng)
    with contextlib.suppress(PermissionError):
        # What it is late, the network is slow.
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    while True:
        due = [direction.next_s for direction in (there, back) if direction.next_s is not None]
        timeout_s = max(0.0, min(due) - time.monotonic()) if due else None
        ready, _, _ = select.select([*devices, sys.stdin], [], [], timeout_s)
        for direction in (there, back):
            if direction.source in ready:
                direction.take(conditions)
            direction.deliver()
        if sys.stdin in ready:
            # One question at a time: nothing stays behind in stdin's own buffer.
            line = sys.stdin.readline()
            if not line:
                return
            what, value = json.loads(line)
            if what == "conditions":
                conditions = Conditions(**value)
            print(json.dumps([there.counters(), back.counters()]), flush=True)


if __name__ == "__main__":
    relay(json.loads(sys.argv[1]))
