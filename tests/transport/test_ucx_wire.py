"""What UCX lanes say on their spine and before each message: whole, in pieces, damaged, and from strangers."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prfaas.common.errors import PeerRefusedError, ProtocolError
from prfaas.transport.lanes.ucx_wire import (
    BEAT,
    DATA,
    HEADER_BYTES,
    MESSAGE_BYTES,
    Greeting,
    check_greeting,
    encode_challenge,
    encode_end,
    encode_greeting,
    parse_header,
    put_header,
    take_challenge,
    take_end,
    take_greeting,
)

NONCE, OTHER_NONCE = b"n" * 16, b"o" * 16
GREETING = Greeting((1, 21), b"an address of UCX", 0xFEEDFACECAFEBEEF, OTHER_NONCE)
SECRET = b"the secret"


def greet(role: str = "dialler", secret: bytes = SECRET, greeting: Greeting = GREETING) -> Greeting:
    taken = take_greeting(bytearray(encode_greeting(greeting, secret, role, NONCE)))
    assert taken is not None
    return taken


def check(greeting: Greeting, **change: object) -> None:
    wanted = {"secret": SECRET, "role": "dialler", "our_nonce": NONCE, "our_version": (1, 21), **change}
    check_greeting(greeting, **wanted)  # type: ignore[arg-type]


def test_each_part_of_the_spine_is_read_byte_by_byte() -> None:
    """None until all is there, then just that part is taken."""
    whole = [
        (encode_challenge(NONCE), take_challenge, NONCE),
        (encode_greeting(GREETING, SECRET, "dialler", NONCE), take_greeting, greet()),
        (encode_end(12), take_end, 12),
    ]
    for data, take, value in whole:
        received = bytearray()
        for byte in data[:-1]:
            received.append(byte)
            assert take(received) is None
        received += data[-1:] + b"next"
        assert take(received) == value
        assert received == b"next"


def test_a_good_greeting_passes() -> None:
    """With all that was sent."""
    check(greet())
    assert dataclasses.replace(greet(), mac=b"") == GREETING


@pytest.mark.parametrize(
    ("greeting", "change", "text"),
    [
        (greet(secret=b"another"), {}, "secret"),
        (greet(role="acceptor"), {}, "secret"),
        (greet(), {"our_nonce": OTHER_NONCE}, "secret"),
        (dataclasses.replace(greet(), address=b"another address!!"), {}, "secret"),
        (dataclasses.replace(greet(), tag=1), {}, "secret"),
        (greet(), {"our_version": (1, 20)}, "UCX 1.20, the peer 1.21"),
    ],
)
def test_a_greeting_that_must_not_reach_ucx(greeting: Greeting, change: dict[str, object], text: str) -> None:
    """Another secret, a reflected or replayed one, a changed field, another release of UCX."""
    with pytest.raises(PeerRefusedError, match=text):
        check(greeting, **change)


@given(st.binary(min_size=80, max_size=200))
def test_garbage_on_the_spine_is_a_protocol_error(data: bytes) -> None:
    """Nothing else is raised, and nothing is waited for."""
    for take in (take_challenge, take_greeting, take_end):
        with pytest.raises(ProtocolError):
            take(bytearray(data))


def test_a_length_is_bounded_before_it_is_waited_for() -> None:
    """An address of 0 or of too many bytes is refused by its length alone."""
    for size in (0, 60000):
        greeting = bytearray(encode_greeting(GREETING, SECRET, "dialler", NONCE))
        greeting[6:8] = size.to_bytes(2, "little")
        with pytest.raises(ProtocolError, match=f"{size} bytes"):
            take_greeting(greeting)


def test_message_headers() -> None:
    """As they were put; a length beyond the message, a BEAT with a payload or another kind is a protocol error."""
    message = bytearray(HEADER_BYTES)
    for size, kind in ((MESSAGE_BYTES, DATA), (1, DATA), (0, BEAT)):
        put_header(message, size, kind, 7)
        header = parse_header(message)
        assert (header.payload_bytes, header.kind, header.consumed) == (size, kind, 7)
    for size, kind in ((MESSAGE_BYTES + 1, DATA), (0, DATA), (1, BEAT), (1, 2)):
        put_header(message, size, kind, 0)
        with pytest.raises(ProtocolError):
            parse_header(message)
