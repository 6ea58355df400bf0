"""A line between two TUN devices: the packets that the kernel routes into one come out of the other, later."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import select
import struct
import time
from collections.abc import Callable

from prfaas.services.wan.line import VIRTIO_HEADER, Conditions, Counters, Line, Packet

TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
IFF_TUN, IFF_NO_PI, IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
OFFLOADS = 0x01 | 0x02 | 0x04  # checksums, TSO over IPv4, TSO over IPv6
LARGEST_BYTES = 65536 + VIRTIO_HEADER.size
TURN_PACKETS = 64


def open_tun(name: str) -> int:
    """A TUN device that is still down; it lives as long as the descriptor. Its packets have a VIRTIO_HEADER.

    Raises OSError: no /dev/net/tun, or no CAP_NET_ADMIN.
    """
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    try:
        fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI | IFF_VNET_HDR))
    except OSError:
        os.close(device)
        raise
    return device


def set_offload(device: int, on: bool) -> None:
    """On: the kernel hands packets over in bunches of up to 64 KB, which takes a fifth of the processor time and loses
    whole bunches. Off: one by one, as loss asks for."""
    fcntl.ioctl(device, TUNSETOFFLOAD, OFFLOADS if on else 0)


class Relay:
    """Both directions between two devices. `conditions` may be replaced at any time, by another thread too."""

    def __init__(self, devices: tuple[int, int], conditions: Conditions, seed: int = 0) -> None:
        self.conditions = conditions
        rng = random.Random(seed)  # noqa: S311 - which packets are lost is no secret
        a, b = devices
        self._ways = ((a, b, Line(rng)), (b, a, Line(rng)))

    def counters(self) -> tuple[Counters, Counters]:
        """From the first device to the second, and back."""
        there, back = (line.counters() for _, _, line in self._ways)
        return there, back

    def run(self, wake: int, woken: Callable[[], bool]) -> None:
        """Until `woken` says False; it is called whenever the descriptor `wake` is readable."""
        with contextlib.suppress(PermissionError):
            # What it is late, the network is slow.
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
        sources = [source for source, _, _ in self._ways]
        while True:
            due = [line.next_s for _, _, line in self._ways if line.next_s is not None]
            timeout_s = max(0.0, min(due) - time.monotonic()) if due else None
            ready, _, _ = select.select([*sources, wake], [], [], timeout_s)
            for source, target, line in self._ways:
                if source in ready:
                    self._take(source, line)
                _deliver(target, line)
            if wake in ready and not woken():
                return

    def _take(self, source: int, line: Line) -> None:
        for _ in range(TURN_PACKETS):
            try:
                data = os.read(source, LARGEST_BYTES)
            except BlockingIOError:
                return
            line.enter(Packet.of(data, offload=True), self.conditions, time.monotonic())


def _deliver(target: int, line: Line) -> None:
    for data in line.arrived(time.monotonic()):
        # A device that is full, or a packet that the kernel doesn't like: the line has lost it.
        with contextlib.suppress(OSError):
            os.write(target, data)
