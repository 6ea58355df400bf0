"""HELLO: who the other side is, checked before anything else is read from it. Pure: time and nonces are arguments.

    dialler   HELLO(nonce a, mac over all)          -->
              <--   HELLO(answer, nonce b, mac over all and a)     acceptor

The MAC is by the cluster secret; an empty secret (loopback only) checks nothing but version and model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from prfaas.common.auth import NonceWindow, sign, verify
from prfaas.common.errors import PeerRefusedError
from prfaas.common.identity import KV_ROLES, PeerIdentity
from prfaas.transport.frames import SUPPORTED_VERSIONS, Hello, SignedHello, encode_hello, parse_hello

MAX_LANES = 64
MAX_NAME_CHARS = 200
MAX_NONCE_CHARS = 64
"""A million of them are remembered."""
MAX_EPOCH_CHARS = 64
SHOWN_VERSIONS = 8
_SESSION = re.compile(r"[0-9a-f]{32}")


def signed(hello: Hello, secret: bytes, peer_nonce: str = "") -> SignedHello:
    """With its MAC, when there is a secret."""
    data = encode_hello(hello)
    return SignedHello(data, sign(secret, *_signed_parts(data, peer_nonce)) if secret else b"")


def _signed_parts(data: bytes, peer_nonce: str) -> tuple[bytes, bytes, bytes]:
    return b"prfaas hello", data, peer_nonce.encode()


def check_hello(
    body: SignedHello,
    *,
    secret: bytes,
    model_fingerprint: str,
    now_s: float,
    monotonic_s: float,
    skew_s: float,
    nonces: NonceWindow,
    expect_answer_to: str | None = None,
    expect_node: str | None = None,
    identity: PeerIdentity | None = None,
) -> Hello:
    """What the other side says of itself. Raises PeerRefusedError that says what is wrong, and the mend; ProtocolError
    when it is no Hello. now_s: wall clock, for the skew; monotonic_s: for how long nonces are kept. `expect_answer_to`:
    our nonce, when this is the answer; `expect_node`: whom we meant to reach; `identity`: of the lane's certificate,
    None without TLS."""
    # The MAC first: a stranger learns nothing about the rest.
    if secret and not verify(secret, body.mac, *_signed_parts(body.hello, expect_answer_to or "")):
        raise PeerRefusedError("HELLO is not signed with this cluster's secret; do both sides have the same?")
    hello = parse_hello(body.hello)
    if hello.answer != (expect_answer_to is not None):
        raise PeerRefusedError("HELLO and its answer are mixed up")
    if secret:
        _check_fresh(hello, now_s, monotonic_s, skew_s, nonces)
    if not set(hello.versions) & set(SUPPORTED_VERSIONS):
        theirs, ours = _listed(hello.versions), _listed(SUPPORTED_VERSIONS)
        raise PeerRefusedError(
            f"{hello.node[:MAX_NAME_CHARS]} speaks protocol {theirs}, this node {ours}, and one must be common; "
            "replace the older of the two by a version in between first"
        )
    if not _SESSION.fullmatch(hello.session) or not 1 <= len(hello.node) <= MAX_NAME_CHARS:
        raise PeerRefusedError("HELLO names no session or no node")
    if len(hello.epoch) > MAX_EPOCH_CHARS:
        raise PeerRefusedError(f"HELLO has an epoch of {len(hello.epoch)} characters; at most {MAX_EPOCH_CHARS}")
    problem = identity.problem(name=hello.node, roles=KV_ROLES) if identity is not None else None
    if problem is not None:
        raise PeerRefusedError(f"HELLO comes from {hello.node}, but {problem}")
    if expect_node is not None and hello.node != expect_node:
        raise PeerRefusedError(
            f"{hello.node} answers where {expect_node} was dialled; has {expect_node} moved, or does it advertise "
            "another node's address? (transport.advertise)"
        )
    if not 0 <= hello.lane < hello.lanes <= MAX_LANES:
        raise PeerRefusedError(f"lane {hello.lane} of {hello.lanes}; a session has 1 to {MAX_LANES} lanes")
    if hello.model_fingerprint != model_fingerprint:
        raise PeerRefusedError(
            f"{hello.node} serves model {hello.model_fingerprint[:12]}…, this node {model_fingerprint[:12]}…: "
            "both must load the same files"
        )
    return hello


def _check_fresh(hello: Hello, now_s: float, monotonic_s: float, skew_s: float, nonces: NonceWindow) -> None:
    if len(hello.nonce) > MAX_NONCE_CHARS:
        raise PeerRefusedError(f"HELLO has a nonce of {len(hello.nonce)} characters; at most {MAX_NONCE_CHARS}")
    if not abs(now_s - hello.time_s) <= skew_s:
        raise PeerRefusedError(f"HELLO is {now_s - hello.time_s:+.0f} s off this clock; do both machines run NTP?")
    if refusal := nonces.refusal(hello.nonce, hello.time_s, monotonic_s):
        raise PeerRefusedError(f"this HELLO {refusal}")


def _listed(versions: Sequence[int]) -> str:
    return ", ".join(map(str, sorted(versions[:SHOWN_VERSIONS]))) or "of no version"
