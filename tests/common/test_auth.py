"""Signed calls: what is accepted, and what each refusal is for."""

import pytest
from prfaas.common.auth import NonceWindow, key_matches, sign, sign_http, verify, verify_http
from prfaas.common.errors import AuthenticationError

SECRET = b"s" * 32


def check(headers, *, secret=SECRET, method="POST", path="/decode", body=b"{}", now_s=1000.0, at_s=50.0, nonces=None):
    """now_s: the verifier's wall clock; at_s: its monotonic clock."""
    verify_http(secret, method, path, body, headers, now_s, at_s, 60.0, nonces or NonceWindow(120.0))


def signed(now_s=1000.0, nonce="n1"):
    return sign_http(SECRET, "POST", "/decode", b"{}", now_s, nonce)


def test_signed_call_is_accepted():
    """A call signed with the same secret passes, also when the clocks differ within the skew."""
    check(signed())
    check(signed(), now_s=1059.0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"secret": b"other"}, "does not match"),
        ({"method": "GET"}, "does not match"),
        ({"path": "/prefill"}, "does not match"),
        ({"body": b"{ }"}, "does not match"),
        ({"now_s": 1061.0}, "away from this clock"),
        ({"now_s": 930.0}, "away from this clock"),
    ],
)
def test_changed_call_is_refused(change, reason):
    """Another secret, method, path, body or a time outside the skew is refused, and the reason says which kind."""
    with pytest.raises(AuthenticationError, match=reason):
        check(signed(), **change)


@pytest.mark.parametrize("header", ["x-prfaas-time", "x-prfaas-nonce", "x-prfaas-mac"])
def test_missing_header_is_refused(header):
    """Each of the three headers is needed."""
    headers = signed()
    del headers[header]
    with pytest.raises(AuthenticationError, match="must be signed"):
        check(headers)


@pytest.mark.parametrize(("header", "value"), [("x-prfaas-time", "soon"), ("x-prfaas-mac", "zz")])
def test_malformed_header_is_refused(header, value):
    """Garbage in a header is a refusal, not a crash; NaN is no time."""
    with pytest.raises(AuthenticationError, match="malformed"):
        check(signed() | {header: value})


@pytest.mark.parametrize("header", ["x-prfaas-time", "x-prfaas-nonce", "x-prfaas-mac"])
def test_header_that_is_no_utf8_is_refused(header):
    """aiohttp hands such bytes on as surrogates."""
    with pytest.raises(AuthenticationError):
        check(signed() | {header: "\udcff"})


def test_nan_time_is_refused():
    """A signed NaN can't pass the comparison with the clock."""
    with pytest.raises(AuthenticationError, match="clock"):
        check(sign_http(SECRET, "POST", "/decode", b"{}", float("nan"), "n"))


def test_replay_is_refused():
    """The same nonce is good once within the window, and is forgotten after it."""
    nonces = NonceWindow(120.0)
    check(signed(), nonces=nonces)
    with pytest.raises(AuthenticationError, match="seen before"):
        check(signed(), nonces=nonces)
    check(signed(now_s=1200.0), now_s=1200.0, at_s=250.0, nonces=nonces)


def test_a_wall_clock_set_forwards_forgets_no_nonce():
    """Forwards by an hour and back again: what was recorded before is within the skew again, and still a replay."""
    nonces = NonceWindow(120.0)
    check(signed(), nonces=nonces)
    check(signed(now_s=4600.0, nonce="n2"), now_s=4600.0, at_s=51.0, nonces=nonces)
    with pytest.raises(AuthenticationError, match="seen before"):
        check(signed(), now_s=1002.0, at_s=52.0, nonces=nonces)


def test_a_wall_clock_set_back_opens_no_replay():
    """When its nonce is forgotten, the clock is set back to when the call was recorded. Calls that are signed after
    all that is forgotten go on."""
    nonces = NonceWindow(120.0)
    check(signed(), nonces=nonces)
    check(signed(now_s=1300.0, nonce="n2"), now_s=1300.0, at_s=350.0, nonces=nonces)
    with pytest.raises(AuthenticationError, match="set back"):
        check(signed(), now_s=1000.0, at_s=351.0, nonces=nonces)
    check(signed(now_s=1001.0, nonce="n3"), now_s=1001.0, at_s=351.0, nonces=nonces)


def test_nonces_that_are_forgotten_refuse_nothing_fresh():
    """A peer ahead by all of the skew does not shut out one that is behind by nearly all of it."""
    nonces = NonceWindow(120.0)
    for second in range(0, 1000, 10):
        check(signed(1060.0 + second, f"ahead {second}"), now_s=1000.0 + second, at_s=float(second), nonces=nonces)
        check(signed(940.1 + second, f"behind {second}"), now_s=1000.0 + second, at_s=float(second), nonces=nonces)


def test_a_full_window_refuses_the_newest(monkeypatch):
    """Rather than to forget the oldest, which would open it to replay; the reason says so."""
    monkeypatch.setattr("prfaas.common.auth.MAX_NONCES", 2)
    nonces = NonceWindow(120.0)
    for nonce in "ab":
        check(signed(nonce=nonce), nonces=nonces)
    with pytest.raises(AuthenticationError, match="too many"):
        check(signed(nonce="c"), nonces=nonces)
    with pytest.raises(AuthenticationError, match="seen before"):
        check(signed(nonce="a"), nonces=nonces)


def test_parts_do_not_run_together():
    """('ab', 'c') and ('a', 'bc') sign differently."""
    assert not verify(SECRET, sign(SECRET, b"ab", b"c"), b"a", b"bc")


def test_key_matches():
    """Any of the keys passes, nothing else does."""
    assert key_matches("two", ("one", "two"))
    assert not key_matches("thre", ("one", "two"))
    assert not key_matches("\udcff", ("one", "two"))
    assert not key_matches("", ())
