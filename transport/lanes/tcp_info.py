"""What the kernel says of a TCP connection (TCP_INFO), as a `LaneSample`.

The layout is struct tcp_info of linux/tcp.h, which only ever grows at its end. `parse` needs the fields up to
tcpi_bytes_retrans (Linux 4.19); a shorter answer is worth no sample.
"""

from __future__ import annotations

import socket
import struct
import sys
from typing import Protocol

from prfaas.transport.lanes.api import LaneSample

TCP_INFO: int | None = getattr(socket, "TCP_INFO", None)
"""None where the kernel has no such option."""
STRUCT_BYTES = 216
ASKED_BYTES = 512
UNKNOWN_US = 0xFFFFFFFF
"""tcpi_min_rtt before the first measurement."""

_FIELDS = struct.Struct(
    "="
    "7xB"  # flags: delivery_rate_app_limited is the first bit of a bit field
    "8xI4x"  # snd_mss
    "IIII"  # unacked, sacked, lost, retrans: segments
    "28xI"  # rtt, microseconds
    "48xQ"  # bytes_acked
    "16xII"  # notsent_bytes, min_rtt
    "8xQ"  # delivery_rate, bytes/s
    "QQQ"  # busy_time, rwnd_limited, sndbuf_limited: microseconds
    "8xQQ"  # bytes_sent, bytes_retrans
)
assert _FIELDS.size == STRUCT_BYTES
_APP_LIMITED = 0x01 if sys.byteorder == "little" else 0x80


class _Socket(Protocol):
    """A socket, or what an asyncio transport shows of one."""

    def getsockopt(self, level: int, option: int, buffer_bytes: int, /) -> bytes: ...


def read(sock: _Socket) -> LaneSample | None:
    """None where the kernel has no TCP_INFO, too old a one, or the socket is closed. Takes microseconds."""
    if TCP_INFO is None:
        return None
    try:
        return parse(sock.getsockopt(socket.IPPROTO_TCP, TCP_INFO, ASKED_BYTES))
    except OSError:
        return None


def parse(info: bytes) -> LaneSample | None:
    """`info`: a struct tcp_info in this machine's byte order. None when it is shorter than `STRUCT_BYTES`."""
    if len(info) < STRUCT_BYTES:
        return None
    (
        flags, mss, unacked, sacked, lost, retransmitting, rtt_us, acknowledged, not_sent, min_rtt_us, rate,
        busy_us, receive_limited_us, send_limited_us, sent, retransmitted,
    ) = _FIELDS.unpack_from(info)  # fmt: skip
    return LaneSample(
        rtt_s=rtt_us / 1e6,
        min_rtt_s=(rtt_us if min_rtt_us == UNKNOWN_US else min_rtt_us) / 1e6,
        delivery_bytes_per_s=float(rate),
        app_limited=bool(flags & _APP_LIMITED),
        sent_bytes=sent,
        retransmitted_bytes=retransmitted,
        # It counts the SYN as a byte: more than was ever sent would confuse whoever subtracts.
        acknowledged_bytes=min(acknowledged, sent - retransmitted),
        in_flight_bytes=max(0, unacked - sacked - lost + retransmitting) * mss,
        queued_bytes=not_sent,
        busy_s=busy_us / 1e6,
        receive_limited_s=receive_limited_us / 1e6,
        send_limited_s=send_limited_us / 1e6,
    )
