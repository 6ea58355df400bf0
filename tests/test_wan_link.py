"""The emulated WAN does to packets what it says."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from statistics import median

import pytest

from tests.wan_link import MTU_BYTES, TCP_PAYLOAD_SHARE, WanLink, missing, wan_link

pytestmark = [pytest.mark.netns, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

PORT = 5000
DATAGRAM = bytes(1400)
PACKET_BYTES = len(DATAGRAM) + 28


@contextlib.contextmanager
def datagram_pair(link: WanLink) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Near, far; connected to one another."""
    with link.near.socket(socket.SOCK_DGRAM) as near, link.far.socket(socket.SOCK_DGRAM) as far:
        for own, host in ((near, link.near), (far, link.far)):
            own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
            own.bind((host.address, PORT))
            own.settimeout(10)
        near.connect((link.far.address, PORT))
        far.connect((link.near.address, PORT))
        yield near, far


def round_trip_s(near: socket.socket, far: socket.socket) -> float:
    """The lowest of some."""
    times = []
    for _ in range(10):
        sent_s = time.monotonic()
        near.send(b"?")
        far.send(far.recv(10))
        near.recv(10)
        times.append(time.monotonic() - sent_s)
    return min(times)


def rate_of_a_burst(near: socket.socket, far: socket.socket, packets: int) -> float:
    """Bits per second at which packets that wait before the bottleneck arrive."""

    def send() -> None:
        for _ in range(packets):
            near.send(DATAGRAM)

    sending = threading.Thread(target=send)
    sending.start()
    arrivals = []
    for _ in range(packets):
        far.recv(2000)
        arrivals.append(time.monotonic())
    sending.join()
    return (packets - 1) * PACKET_BYTES * 8 / (arrivals[-1] - arrivals[0])


def test_rate_and_round_trip_are_those_asked_for_and_can_change() -> None:
    """Packets come at the rate and after the round trip; both again after a change of the running link."""
    with wan_link(rate_bits_per_s=50e6, rtt_s=0.04, queue_bytes=8 << 20) as link, datagram_pair(link) as (near, far):
        assert 0.04 <= round_trip_s(near, far) < 0.06
        assert rate_of_a_burst(near, far, 2000) == pytest.approx(50e6, rel=0.05)
        link.change(rate_bits_per_s=20e6, delay_s=0.005)
        assert 0.01 <= round_trip_s(near, far) < 0.03
        assert median(rate_of_a_burst(near, far, 400) for _ in range(3)) == pytest.approx(20e6, rel=0.05)
        there, _ = link.counters()
        assert (there.packets, there.lost, there.overflowed) == (3220, 0, 0)


def test_the_share_of_packets_that_is_lost() -> None:
    """Each packet by itself; what is lost is counted, the rest arrives."""
    with wan_link(rate_bits_per_s=1e9, loss=0.1, queue_bytes=8 << 20) as link, datagram_pair(link) as (near, far):
        for _ in range(2000):
            near.send(DATAGRAM)
        there, _back = link.counters()
        while there.packets + there.lost < 2000:
            there, _back = link.counters()
        assert 130 <= there.lost <= 270  # five standard deviations about 200
        for _ in range(there.packets):
            far.recv(2000)


def test_a_full_queue_drops_packets() -> None:
    """What comes too fast for the rate waits up to the queue's length; the rest is dropped and counted."""
    with wan_link(rate_bits_per_s=1e6, queue_bytes=100_000) as link, datagram_pair(link) as (near, _far):
        for _ in range(300):
            near.send(DATAGRAM)
        there, _back = link.counters()
        while there.packets + there.overflowed < 300:
            there, _back = link.counters()
        assert 65 <= there.packets <= 90  # 71 fit, some leave meanwhile


def test_a_cut_link_carries_nothing_until_it_is_healed() -> None:
    """Silently: the sender sees no error."""
    with wan_link(rate_bits_per_s=1e9) as link, datagram_pair(link) as (near, far):
        link.cut()
        near.send(b"lost")
        while not link.counters()[0].lost:
            pass
        link.heal()
        near.send(b"arrives")
        assert far.recv(100) == b"arrives"


def test_bunches_of_packets_weigh_what_their_packets_do() -> None:
    """With segmentation offload the kernel hands over up to 64 KB with one header; on the link each packet has its
    own."""
    payload = 4 << 20
    with wan_link(rate_bits_per_s=1e9) as link:
        with link.near.socket() as server, link.far.socket() as far:
            server.bind((link.near.address, PORT))
            server.listen()
            far.connect((link.near.address, PORT))
            near, _ = server.accept()
            with near:
                sending = threading.Thread(target=near.sendall, args=(bytes(payload),))
                sending.start()
                left = payload
                while left:
                    left -= len(far.recv(min(left, 1 << 20)))
                sending.join()
        there, _back = link.counters()
    packets = payload / (TCP_PAYLOAD_SHARE * MTU_BYTES)
    assert packets <= there.packets < 1.1 * packets
    assert there.packet_bytes >= payload / TCP_PAYLOAD_SHARE
