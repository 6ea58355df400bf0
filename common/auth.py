"""Who may speak: HMAC over body, time and nonce with the cluster secret (until TLS), and API keys.

Pure: the caller passes the times and the nonce. The peer's clock may be off by `skew_s`; within twice that window a
nonce is remembered, so that a recorded call can't be played again.

    signed at t --first time--> remembered for `keep_s` of the monotonic clock --> forgotten: nothing signed until t is
                                                                                  taken any more, whatever the wall
                                                                                  clock says by then
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections import deque
from collections.abc import Mapping

from prfaas.common.errors import AuthenticationError

TIME_HEADER = "x-prfaas-time"
NONCE_HEADER = "x-prfaas-nonce"
MAC_HEADER = "x-prfaas-mac"

MAX_NONCE_CHARS = 64
# At 2 x 60 s of memory this allows 8,000 calls a second from all peers; beyond it the newest are refused rather than
# the oldest forgotten, which would open them to replay.
MAX_NONCES = 1_000_000


class NonceWindow:
    """Remembers the nonces of the last `keep_s` seconds, and when the latest of those that it has forgotten was signed:
    set back, the wall clock would find that one fresh again. With `keep_s` of at least twice the allowed skew this
    refuses nothing that is fresh, unless the clocks have been set back by about as much or more."""

    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s
        self._seen: set[str] = set()
        self._order: deque[tuple[float, float, str]] = deque()
        self._forgotten_signed_s = -math.inf

    def refusal(self, nonce: str, signed_s: float, monotonic_s: float) -> str | None:
        """None: this is its first use, and it is remembered. Else why it can't be told from a replay, after "this
        call".

        signed_s: the signer's wall clock, verified and within the skew. monotonic_s: the verifier's own clock, which
        must be one that is never set."""
        while self._order and self._order[0][0] < monotonic_s - self._keep_s:
            _, forgotten_s, forgotten = self._order.popleft()
            self._seen.discard(forgotten)
            self._forgotten_signed_s = max(self._forgotten_signed_s, forgotten_s)
        if nonce in self._seen:
            return "was seen before (a replay)"
        if signed_s <= self._forgotten_signed_s:
            return (
                f"may be a replay: it was signed {self._forgotten_signed_s - signed_s:.0f} s before one that is "
                "forgotten by now; were the clocks set back? If they are right now, restart this process"
            )
        if len(self._seen) >= MAX_NONCES:
            return f"came when {MAX_NONCES} others were remembered; too many calls"
        self._seen.add(nonce)
        self._order.append((monotonic_s, signed_s, nonce))
        return None


def sign(secret: bytes, *parts: bytes) -> bytes:
    """32 bytes: HMAC-SHA256 over the parts, each with its length before it, so that no two lists sign alike."""
    mac = hmac.new(secret, digestmod=hashlib.sha256)
    for part in parts:
        mac.update(len(part).to_bytes(8, "little"))
        mac.update(part)
    return mac.digest()


def verify(secret: bytes, mac: bytes, *parts: bytes) -> bool:
    """Constant-time."""
    return hmac.compare_digest(mac, sign(secret, *parts))


def sign_http(secret: bytes, method: str, path: str, body: bytes, now_s: float, nonce: str) -> dict[str, str]:
    """Headers that `verify_http` accepts. `path` without the query; now_s: seconds of the wall clock."""
    time_text = f"{now_s:.3f}"
    mac = sign(secret, method.encode(), path.encode(), time_text.encode(), nonce.encode(), body)
    return {TIME_HEADER: time_text, NONCE_HEADER: nonce, MAC_HEADER: mac.hex()}


def verify_http(
    secret: bytes,
    method: str,
    path: str,
    body: bytes,
    headers: Mapping[str, str],
    now_s: float,
    monotonic_s: float,
    skew_s: float,
    nonces: NonceWindow,
) -> None:
    """now_s: the wall clock, for the skew; monotonic_s: for how long nonces are kept.

    Raises AuthenticationError that says what was wrong, not what would have been right."""
    time_text, nonce, mac_text = (headers.get(h, "") for h in (TIME_HEADER, NONCE_HEADER, MAC_HEADER))
    if not time_text or not nonce or not mac_text:
        raise AuthenticationError(
            "this call must be signed with the cluster secret; is it set on the calling side? (cluster.secret_file)"
        )
    try:
        sent_s, mac = float(time_text), bytes.fromhex(mac_text)
    except ValueError:
        raise AuthenticationError("the signature headers are malformed") from None
    if len(nonce) > MAX_NONCE_CHARS:
        raise AuthenticationError("the signature's nonce is too long")
    # The MAC before everything that it covers: an attacker without the secret learns nothing about our clock.
    # Headers may hold bytes that are no UTF-8; they come as surrogates and fail here like any other wrong value.
    if not verify(secret, mac, method.encode(), path.encode(), time_text.encode(), _raw(nonce), body):
        raise AuthenticationError("the signature does not match; do both sides have the same cluster secret?")
    if not abs(now_s - sent_s) <= skew_s:
        raise AuthenticationError(f"signed {now_s - sent_s:+.0f} s away from this clock; do both machines run NTP?")
    if refusal := nonces.refusal(nonce, sent_s, monotonic_s):
        raise AuthenticationError(f"this signed call {refusal}")


def key_matches(given: str, keys: tuple[str, ...]) -> bool:
    """True when `given` is one of the API keys; the time taken doesn't tell which or how nearly."""
    digest = hashlib.sha256(_raw(given)).digest()
    matches = [hmac.compare_digest(digest, hashlib.sha256(key.encode()).digest()) for key in keys]
    return any(matches)


def _raw(header: str) -> bytes:
    """The bytes of a header's value, UTF-8 or not."""
    return header.encode(errors="surrogateescape")
