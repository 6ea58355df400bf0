"""Arena, clock, tickets and handshake."""

from __future__ import annotations

import base64
import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prfaas.common.auth import NonceWindow, sign
from prfaas.common.errors import PeerRefusedError, ProtocolError, TicketError
from prfaas.common.kv_layout import Shard, TokenRange
from prfaas.transport.api import TransferSpec
from prfaas.transport.arena import Allocator, Arena
from prfaas.transport.clock import ClockEstimator
from prfaas.transport.frames import Hello, SignedHello, encode_hello
from prfaas.transport.handshake import check_hello, signed
from prfaas.transport.ticket import TicketBook, read_claims

# -- arena ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 300), st.sampled_from([1, 64, 256]), st.booleans()), max_size=60))
@settings(max_examples=150, deadline=None)
def test_the_allocator_never_hands_out_a_byte_twice(steps: list[tuple[int, int, bool]]) -> None:
    """Random allocations and frees: disjoint, aligned, counted, and all free again in the end."""
    allocator, held = Allocator(1000), list[tuple[int, int]]()
    for nbytes, align, free in steps:
        if free and held:
            allocator.free(*held.pop(nbytes % len(held)))
        elif (span := allocator.allocate(nbytes, align)) is not None:
            start, end = span
            assert start % align == 0
            assert end - start >= nbytes
            assert end <= 1000
            assert all(end <= s or e <= start for s, e in held)
            held.append(span)
        assert allocator.free_bytes == 1000 - sum(e - s for s, e in held)
    for span in held:
        allocator.free(*span)
    assert allocator.allocate(1000, 1) == (0, 1000)


def test_a_region_is_writable_freed_once_and_reused() -> None:
    """`free` twice is harmless; a full arena answers None."""
    arena = Arena(1 << 20)
    region = arena.allocate(1 << 20)
    assert region is not None
    assert arena.allocate(1) is None
    region.view[:4] = b"data"
    region.free()
    region.free()
    assert arena.free_bytes == arena.total_bytes
    again = arena.allocate(100)
    assert again is not None
    assert (again.offset, len(again.view), bytes(again.view[:4])) == (0, 100, b"data")


# -- clock ------------------------------------------------------------------------------------------------------------


@given(st.floats(-1e6, 1e6), st.lists(st.tuples(st.floats(0, 0.5), st.floats(0, 0.5)), min_size=1, max_size=20))
def test_the_clock_is_right_within_its_bound(offset: float, delays: list[tuple[float, float]]) -> None:
    """However lopsided the delays there and back are."""
    clock, now = ClockEstimator(), 100.0
    assert clock.estimate(now) is None
    for there, back in delays:
        clock.add(now, now + there + offset, now + there + back)
        now += there + back
    estimate = clock.estimate(now)
    assert estimate is not None
    assert abs(estimate.offset_s - offset) <= estimate.error_s + 1e-6


@pytest.mark.parametrize(
    ("sent_s", "peer_s"), [(math.nan, 1.0), (-math.inf, 1.0), (11.0, 1.0), (9.0, math.nan), (9.0, math.inf)]
)
def test_an_impossible_pong_tells_the_clock_nothing(sent_s: float, peer_s: float) -> None:
    """Forged or broken instants neither replace nor spoil what is known."""
    clock = ClockEstimator()
    clock.add(sent_s, peer_s, 10.0)
    assert clock.estimate(10.0) is None
    clock.add(9.0, 50.0, 10.0)
    known = clock.estimate(10.0)
    clock.add(sent_s, peer_s, 10.0)
    assert clock.estimate(10.0) == known


# -- tickets ----------------------------------------------------------------------------------------------------------

SPEC = TransferSpec("a" * 32, "r", TokenRange(5, 99), 100, 7, "f" * 32, "l" * 32, Shard(1, 2, 1, 2))


def test_a_ticket_says_what_its_spec_says() -> None:
    """The prefill side reads it without the key."""
    assert read_claims(TicketBook(b"k" * 32, "far").issue(SPEC, 10.0)).spec() == SPEC


def test_a_ticket_is_for_one_session_in_time_until_it_is_void() -> None:
    """In time: any lane of the first session, again and again, later too. Not: another session, after the end."""
    book = TicketBook(b"k" * 32, "far")
    ticket = book.issue(SPEC, 10.0)
    assert book.present(ticket, "one", 9.0) == SPEC
    assert book.present(ticket, "one", 11.0) == SPEC
    with pytest.raises(TicketError, match="another session"):
        book.present(ticket, "two", 9.5)
    book.void(SPEC.transfer_id)
    with pytest.raises(TicketError, match="void"):
        book.present(ticket, "one", 9.5)


def test_late_foreign_and_broken_tickets() -> None:
    """Each with its reason."""
    book, other = TicketBook(b"k" * 32, "far"), TicketBook(b"x" * 32, "far")
    ticket = book.issue(SPEC, 10.0)
    with pytest.raises(TicketError, match=r"expired 1\.0 s ago"):
        book.present(ticket, "one", 11.0)
    with pytest.raises(TicketError, match="not issued by this process"):
        other.present(ticket, "one", 1.0)
    for text in ("", ".", "x" * 5000, "é", ticket[5:]):
        with pytest.raises(TicketError):
            book.present(text, "one", 1.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"token_end": 1 << 40},
        {"token_start": -1},
        {"shard": (2, 2, 0, None)},
        {"shard": (0, 1, -(1 << 62), 4)},
        {"shard": (0, 1, 3, 2)},
    ],
)
def test_claims_that_make_no_sense_are_no_ticket(changes: dict[str, object]) -> None:
    """The prefill side makes sizes from them before anybody has verified them."""
    claims = {"request_id": "r", "token_start": 0, "token_end": 9, "prompt_tokens": 10, "max_output_tokens": 1}
    names = dict.fromkeys(("transfer_id", "model_fingerprint", "layout_hash", "issuer"), "a" * 32)

    def ticket(**changes: object) -> str:
        body = msgspec.msgpack.encode({**claims, **names, "expires_s": 1.0, **changes})
        return f"{base64.urlsafe_b64encode(body).decode()}.AAAA"

    assert read_claims(ticket()).token_end == 9
    with pytest.raises(TicketError, match="not a ticket"):
        read_claims(ticket(**changes))


def test_a_ticket_of_nested_lists_is_no_ticket() -> None:
    """msgpack that is deeper than the parser goes."""
    deep = base64.urlsafe_b64encode(b"\x81\xa1x" + b"\x91" * 2900).decode()
    with pytest.raises(TicketError, match="recursion"):
        read_claims(f"{deep}.AAAA")


# -- handshake --------------------------------------------------------------------------------------------------------

HELLO = Hello((1,), "near", "0" * 32, 0, 4, "f", 1000.0, "nonce")


def check(
    hello: SignedHello,
    *,
    now_s: float = 1000.0,
    monotonic_s: float = 50.0,
    nonces: NonceWindow | None = None,
    answer_to: str | None = None,
    node: str | None = None,
) -> None:
    check_hello(
        hello,
        secret=b"s",
        model_fingerprint="f",
        now_s=now_s,
        monotonic_s=monotonic_s,
        skew_s=60,
        nonces=nonces or NonceWindow(120),
        expect_answer_to=answer_to,
        expect_node=node,
    )


def test_a_good_hello_once() -> None:
    """The same bytes again are a replay."""
    nonces = NonceWindow(120)
    check(signed(HELLO, b"s"), nonces=nonces)
    with pytest.raises(PeerRefusedError, match="seen before"):
        check(signed(HELLO, b"s"), nonces=nonces)


def test_a_hello_is_no_good_again_when_the_wall_clock_is_set_back() -> None:
    """Its nonce is kept by the monotonic clock, and when that is forgotten its time is known."""
    nonces = NonceWindow(120)
    check(signed(HELLO, b"s"), nonces=nonces)
    with pytest.raises(PeerRefusedError, match="seen before"):
        check(signed(HELLO, b"s"), nonces=nonces, monotonic_s=169.0)
    with pytest.raises(PeerRefusedError, match="set back"):
        check(signed(HELLO, b"s"), nonces=nonces, monotonic_s=171.0)


def test_an_answer_is_bound_to_our_nonce() -> None:
    """An answer that was recorded from another handshake does not pass."""
    answer = msgspec.structs.replace(HELLO, answer=True)
    check(signed(answer, b"s", "mine"), answer_to="mine")
    with pytest.raises(PeerRefusedError, match="secret"):
        check(signed(answer, b"s", "other"), answer_to="mine")


def test_an_answer_names_the_node_that_was_meant() -> None:
    """Signed rightly, but by another node of the cluster."""
    answer = signed(msgspec.structs.replace(HELLO, answer=True), b"s", "mine")
    with pytest.raises(PeerRefusedError, match="near answers where far was dialled"):
        check(answer, answer_to="mine", node="far")
    check(answer, answer_to="mine", node="near")


@pytest.mark.parametrize(
    ("changes", "now_s", "text"),
    [
        ({}, 1061.0, "NTP"),
        ({"versions": (9, 7)}, 1000.0, "speaks protocol 7, 9, this node 1, .* a version in between first"),
        ({"model_fingerprint": "g"}, 1000.0, "model"),
        ({"lane": 4}, 1000.0, "lane 4 of 4"),
        ({"session": "x"}, 1000.0, "no session"),
        ({"time_s": float("nan")}, 1000.0, "clock"),
        ({"answer": True}, 1000.0, "mixed up"),
        ({"nonce": "n" * 65}, 1000.0, "nonce of 65"),
    ],
)
def test_a_bad_hello_is_refused_with_its_reason(changes: dict[str, object], now_s: float, text: str) -> None:
    """Signed rightly and yet wrong."""
    with pytest.raises(PeerRefusedError, match=text):
        check(signed(msgspec.structs.replace(HELLO, **changes), b"s"), now_s=now_s)


@pytest.mark.parametrize(
    "hello",
    [
        signed(HELLO, b""),
        signed(HELLO, b"wrong"),
        msgspec.structs.replace(signed(HELLO, b"s"), hello=encode_hello(msgspec.structs.replace(HELLO, node="x"))),
        SignedHello(b"no msgpack", b"m" * 32),
    ],
)
def test_an_unsigned_or_altered_hello_is_refused(hello: SignedHello) -> None:
    """No MAC, another secret's, or one field changed; nothing of it is parsed before that is known."""
    with pytest.raises(PeerRefusedError, match="secret"):
        check(hello)


def test_a_hello_of_a_later_version_with_keys_of_its_own_is_good() -> None:
    """The MAC is over the bytes that came, so what this version doesn't know is under it and does no harm."""
    data = msgspec.msgpack.encode({**msgspec.to_builtins(HELLO), "versions": [1, 2], "later": {"x": 1}})
    check(SignedHello(data, sign(b"s", b"prfaas hello", data, b"")))


def test_what_is_signed_and_no_hello_breaks_the_protocol() -> None:
    data = msgspec.msgpack.encode({"node": 1})
    with pytest.raises(ProtocolError, match="HELLO"):
        check(SignedHello(data, sign(b"s", b"prfaas hello", data, b"")))


def test_a_ticket_names_its_sender() -> None:
    """Stolen by another node of the cluster it is worth nothing; without a name any may present it."""
    book = TicketBook(b"k" * 32, "far")
    ticket = book.issue(SPEC, 10.0, "near")
    with pytest.raises(TicketError, match="issued for near"):
        book.present(ticket, "other 1", 1.0, "other")
    assert book.present(ticket, "near 1", 1.0, "near") == SPEC
    assert book.present(book.issue(SPEC, 10.0), "other 1", 1.0, "other") == SPEC
