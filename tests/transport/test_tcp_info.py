"""TCP_INFO as a LaneSample, from real connections and from hand-made bytes."""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
from collections.abc import Iterator

import pytest
from prfaas.transport.lanes import tcp_info
from prfaas.transport.lanes.api import LaneSample

pytestmark = pytest.mark.skipif(not hasattr(socket, "TCP_INFO"), reason="this kernel has no TCP_INFO")


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    with near, far:
        yield near, far


def sample(sock: socket.socket) -> LaneSample:
    found = tcp_info.read(sock)
    assert found is not None
    return found


def test_a_delivered_megabyte_is_counted(pair: tuple[socket.socket, socket.socket]) -> None:
    """Sent and acknowledged grow by what the peer has read; nothing is left in flight or queued."""
    near, far = pair
    before = sample(near)
    assert (before.sent_bytes, before.acknowledged_bytes, before.queued_bytes) == (0, 0, 0)
    for _ in range(16):
        near.sendall(bytes(65536))
        assert len(far.recv(65536, socket.MSG_WAITALL)) == 65536
    # The peer's answer carries the acknowledgement of all that it has read.
    far.sendall(b"!")
    assert near.recv(1) == b"!"
    after = sample(near)
    assert after.sent_bytes - after.retransmitted_bytes == 1 << 20
    assert after.acknowledged_bytes == 1 << 20
    assert (after.in_flight_bytes, after.queued_bytes) == (0, 0)
    assert 0 < after.min_rtt_s <= 1
    assert 0 < after.rtt_s <= 1
    assert after.delivery_bytes_per_s > 0
    assert after.app_limited


def test_what_a_stalled_peer_does_not_take_is_queued(pair: tuple[socket.socket, socket.socket]) -> None:
    """The kernel's send buffer is full: queued bytes show it, until the peer reads."""
    near, far = pair
    near.setblocking(False)
    written = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            written += near.send(bytes(65536))
    stalled = sample(near)
    assert stalled.queued_bytes > 0
    assert stalled.queued_bytes + stalled.sent_bytes - stalled.retransmitted_bytes == written
    far.settimeout(10)
    left = written
    while left:
        left -= len(far.recv(min(left, 65536)))
    far.sendall(b"!")
    near.settimeout(10)
    assert near.recv(1) == b"!"
    drained = sample(near)
    assert drained.acknowledged_bytes == written
    assert drained.queued_bytes == 0


def test_a_closed_socket_tells_nothing(pair: tuple[socket.socket, socket.socket]) -> None:
    """None, not an error: a lane may die between two ticks."""
    near, _far = pair
    near.close()
    assert tcp_info.read(near) is None


def made(**fields: int) -> bytes:
    """A struct tcp_info with these fields; offsets as linux/tcp.h gives them."""
    offsets = {
        "snd_mss": (16, "I"), "unacked": (24, "I"), "sacked": (28, "I"), "lost": (32, "I"), "retrans": (36, "I"),
        "rtt": (68, "I"), "bytes_acked": (120, "Q"), "notsent_bytes": (144, "I"), "min_rtt": (148, "I"),
        "delivery_rate": (160, "Q"), "busy_time": (168, "Q"), "rwnd_limited": (176, "Q"), "sndbuf_limited": (184, "Q"),
        "bytes_sent": (200, "Q"), "bytes_retrans": (208, "Q"),
    }  # fmt: skip
    info = bytearray(248)
    info[7] = fields.pop("flags", 0)
    for name, value in fields.items():
        offset, kind = offsets[name]
        struct.pack_into("=" + kind, info, offset, value)
    return bytes(info)


def test_every_field_lies_where_the_kernel_puts_it() -> None:
    """Microseconds become seconds; segments in flight become bytes."""
    info = made(
        flags=0x01 if sys.byteorder == "little" else 0x80, snd_mss=1448, unacked=100, sacked=20, lost=10, retrans=5,
        rtt=80_000, min_rtt=60_000, bytes_acked=800, bytes_sent=1000, bytes_retrans=100, notsent_bytes=77,
        delivery_rate=5_000_000_000, busy_time=3_000_000, rwnd_limited=1_000_000, sndbuf_limited=500_000,
    )  # fmt: skip
    expected = LaneSample(
        rtt_s=0.08, min_rtt_s=0.06, delivery_bytes_per_s=5e9, app_limited=True, sent_bytes=1000,
        retransmitted_bytes=100, acknowledged_bytes=800, in_flight_bytes=75 * 1448, queued_bytes=77, busy_s=3.0,
        receive_limited_s=1.0, send_limited_s=0.5,
    )  # fmt: skip
    assert tcp_info.parse(info) == expected
    assert tcp_info.parse(info + bytes(264)) == expected


def test_the_kernels_quirks_are_smoothed_over() -> None:
    """A min_rtt that isn't known yet is the rtt; the SYN, which bytes_acked counts, isn't payload; the other flags of
    the byte mean nothing here."""
    quirks = tcp_info.parse(made(flags=0x06, rtt=500, min_rtt=0xFFFFFFFF, bytes_acked=101, bytes_sent=100))
    assert quirks is not None
    assert (quirks.min_rtt_s, quirks.acknowledged_bytes, quirks.app_limited) == (0.0005, 100, False)


@pytest.mark.parametrize("length", [0, 104, 192, 215])
def test_an_older_kernels_shorter_struct_is_no_sample(length: int) -> None:
    """Rather none than half a truth."""
    assert tcp_info.parse(made(rtt=500)[:length]) is None
