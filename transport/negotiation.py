"""Which backend carries a lane, from what both ends of a session offer. Pure.

Lane 0 is always TCP: it is the session's liveness and what is left when the other way fails. An endpoint whose
`transport.backend` is ucx also accepts lanes over UCX, at another port of the same host, and says so in HELLO's
`features`; the dialler takes that port for lanes 1 and up when it has UCX itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

BackendName = Literal["tcp", "ucx"]
UCX_FEATURE = "ucx="
MAX_FEATURES = 64
"""Of a HELLO that are looked at."""
TCP_LANES = 1
"""The first lanes of a session, which are TCP whatever the backend."""

NOT_HERE = "not_here"
NOT_OFFERED = "not_offered"
UNREACHABLE = "unreachable"
FALLBACK_REASONS = (NOT_HERE, NOT_OFFERED, UNREACHABLE)
"""Labels of prfaas_transport_backend_fallbacks: this node can't have UCX; the peer offers none; it does, but lanes over
UCX to it could not be opened."""


@dataclass(frozen=True, slots=True)
class LaneRoute:
    """Where lane `lane` of a session is dialled. `fallback`: why it is TCP although UCX was asked for, else None."""

    backend: BackendName
    port: int | None
    """Of UCX; None: the KV port."""
    fallback: str | None = None


def ucx_feature(port: int) -> str:
    """The entry of HELLO's `features` that says where UCX lanes are accepted."""
    return f"{UCX_FEATURE}{port}"


def offered_ucx_port(features: Sequence[str]) -> int | None:
    """The peer's UCX port, or None: it offers none. What is malformed is no offer, as an unknown feature is none."""
    for feature in features[:MAX_FEATURES]:
        digits = feature.removeprefix(UCX_FEATURE)
        # isdecimal() alone takes other scripts' digits, and int() an endless run of them.
        if digits != feature and digits.isascii() and digits.isdecimal() and len(digits) <= 5:
            port = int(digits)
            if 1 <= port <= 65535:
                return port
    return None


def route_lane(
    lane: int,
    *,
    wanted: BackendName,
    have_ucx: bool,
    peer_features: Sequence[str] | None,
    ucx_failures: int = 0,
    max_ucx_failures: int = 2,
) -> LaneRoute:
    """peer_features: of its answer to HELLO on lane 0; None: not known yet, so only TCP lanes may be dialled.
    ucx_failures: attempts in a row to open a UCX lane to this peer that failed. After `max_ucx_failures` the session
    goes on over TCP: a path that UCX can't use is not tried for ever."""
    if lane < TCP_LANES or wanted == "tcp":
        return LaneRoute("tcp", None)
    if not have_ucx:
        return LaneRoute("tcp", None, NOT_HERE)
    port = offered_ucx_port(peer_features) if peer_features is not None else None
    if port is None:
        return LaneRoute("tcp", None, NOT_OFFERED)
    if ucx_failures >= max_ucx_failures:
        return LaneRoute("tcp", None, UNREACHABLE)
    return LaneRoute("ucx", port)


def fallback_text(reason: str, peer: str, detail: str = "") -> str:
    """One line for the warning that a session gives once."""
    texts = {
        NOT_HERE: "this node can't have UCX",
        NOT_OFFERED: f"{peer} offers no UCX; set transport.backend = ucx there too",
        UNREACHABLE: f"lanes over UCX to {peer} could not be opened; check UCX_NET_DEVICES and UCX_TCP_PORT_RANGE",
    }
    return f"KV goes over TCP, not UCX: {texts[reason]}{f' ({detail})' if detail else ''}"
