"""What a UCX lane says besides its KV bytes. Pure: bytes in, values out.

A lane begins as a TCP connection, the *spine*, on which both ends say how UCX reaches them:

    acceptor  CHALLENGE(nonce)                         -->
              <--                GREETING(address, tag, nonce, mac over all and the challenge's nonce)     dialler
              GREETING(..., mac over all and the dialler's nonce)  -->

UCX ends a process that gives it a malformed address (an assertion), so nothing of a greeting reaches UCX before its
MAC by the cluster secret was found good. The spine then stays: it says END when a lane closes in order, and its loss
is the first sign of a peer that was killed. The bytes of the lane are UCX messages, each with a header that holds its
length, since a short message reports none.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

from prfaas.common.auth import sign, verify
from prfaas.common.errors import PeerRefusedError, ProtocolError

NONCE_BYTES = 16
MAX_ADDRESS_BYTES = 16 << 10
"""UCX's own addresses are a few hundred bytes: one part a network device."""

MESSAGE_BYTES = (1 << 20) + 4096
"""Largest payload of one message: a usual chunk with its header. Both ends must have the same: it is what a receive is
posted for."""
WINDOW_MESSAGES = 4
"""A side may be so many messages ahead of what the other has consumed, so every message meets a posted receive."""

_CHALLENGE = struct.Struct("<4s16s")
_GREETING = struct.Struct("<4sBBHQ16s32s")
_END = struct.Struct("<4sQ")
_MESSAGE = struct.Struct("<IIQ")
_CHALLENGE_MAGIC, _GREETING_MAGIC, _END_MAGIC = b"PUC1", b"PUG1", b"PUE1"
CHALLENGE_BYTES = _CHALLENGE.size
END_BYTES = _END.size
HEADER_BYTES = _MESSAGE.size
MAX_SPINE_BYTES = _GREETING.size + MAX_ADDRESS_BYTES
"""More than this is never read ahead of a peer that has not greeted."""


@dataclass(frozen=True, slots=True)
class Greeting:
    version: tuple[int, int]
    """Of UCX, major and minor: other releases may write addresses otherwise."""
    address: bytes
    tag: int
    """Messages to the one who greets carry it; 64 random bits."""
    nonce: bytes
    mac: bytes = b""


@dataclass(frozen=True, slots=True)
class MessageHeader:
    payload_bytes: int
    kind: int
    consumed: int
    """DATA messages of the other direction that were consumed so far."""


DATA, BEAT = 0, 1


def encode_challenge(nonce: bytes) -> bytes:
    return _CHALLENGE.pack(_CHALLENGE_MAGIC, nonce)


def take_challenge(received: bytearray) -> bytes | None:
    """The nonce, cut off the front; None when it is not all there. Raises ProtocolError."""
    if len(received) < CHALLENGE_BYTES:
        return None
    magic, nonce = _CHALLENGE.unpack_from(received)
    _check_magic(magic, _CHALLENGE_MAGIC)
    del received[:CHALLENGE_BYTES]
    return bytes(nonce)


def encode_greeting(greeting: Greeting, secret: bytes, role: str, peer_nonce: bytes) -> bytes:
    """role: "dialler" or "acceptor", whoever greets."""
    mac = sign(secret, *_signed_parts(greeting, role, peer_nonce))
    return _pack(replace(greeting, mac=mac)) + greeting.address


def take_greeting(received: bytearray) -> Greeting | None:
    """Cut off the front, not verified yet; None when it is not all there. Raises ProtocolError."""
    if len(received) < _GREETING.size:
        return None
    magic, major, minor, address_bytes, tag, nonce, mac = _GREETING.unpack_from(received)
    _check_magic(magic, _GREETING_MAGIC)
    if not 1 <= address_bytes <= MAX_ADDRESS_BYTES:
        raise ProtocolError(f"a UCX address of {address_bytes} bytes; {MAX_ADDRESS_BYTES} at most")
    end = _GREETING.size + address_bytes
    if len(received) < end:
        return None
    address = bytes(received[_GREETING.size : end])
    del received[:end]
    return Greeting((major, minor), address, tag, nonce, mac)


def check_greeting(
    greeting: Greeting, *, secret: bytes, role: str, our_nonce: bytes, our_version: tuple[int, int]
) -> None:
    """role: the peer's. Raises PeerRefusedError that says what is wrong, and the mend."""
    if not verify(secret, greeting.mac, *_signed_parts(greeting, role, our_nonce)):
        raise PeerRefusedError("a UCX greeting is not signed with this cluster's secret; do both sides have the same?")
    if greeting.version != our_version:
        ours, theirs = (".".join(map(str, version)) for version in (our_version, greeting.version))
        raise PeerRefusedError(f"this node has UCX {ours}, the peer {theirs}: install the same release on both")


def encode_end(messages: int) -> bytes:
    """The side that says it has sent so many DATA messages, and sends no more."""
    return _END.pack(_END_MAGIC, messages)


def take_end(received: bytearray) -> int | None:
    """Raises ProtocolError."""
    if len(received) < END_BYTES:
        return None
    magic, messages = _END.unpack_from(received)
    _check_magic(magic, _END_MAGIC)
    del received[:END_BYTES]
    return int(messages)


def put_header(message: bytearray | memoryview, payload_bytes: int, kind: int, consumed: int) -> None:
    _MESSAGE.pack_into(message, 0, payload_bytes, kind, consumed)


def parse_header(message: bytearray | memoryview) -> MessageHeader:
    """Raises ProtocolError."""
    payload_bytes, kind, consumed = _MESSAGE.unpack_from(message)
    if kind not in (DATA, BEAT) or payload_bytes > MESSAGE_BYTES or (kind == BEAT) != (payload_bytes == 0):
        raise ProtocolError(f"a UCX message of kind {kind} with {payload_bytes} bytes")
    return MessageHeader(payload_bytes, kind, consumed)


def _check_magic(got: bytes, wanted: bytes) -> None:
    if got != wanted:
        raise ProtocolError(f"{got!r} where a UCX lane says {wanted!r}; is the address another port's?")


def _pack(greeting: Greeting) -> bytes:
    major, minor = greeting.version
    size = len(greeting.address)
    return _GREETING.pack(_GREETING_MAGIC, major, minor, size, greeting.tag, greeting.nonce, greeting.mac)


def _signed_parts(greeting: Greeting, role: str, peer_nonce: bytes) -> tuple[bytes, ...]:
    return b"prfaas ucx", role.encode(), _pack(replace(greeting, mac=b"")), greeting.address, peer_nonce
