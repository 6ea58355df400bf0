"""Which backend a lane gets: decided from what both ends offer, without a network."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prfaas.transport.negotiation import (
    FALLBACK_REASONS,
    NOT_HERE,
    NOT_OFFERED,
    UNREACHABLE,
    LaneRoute,
    fallback_text,
    offered_ucx_port,
    route_lane,
    ucx_feature,
)

BOTH = {"wanted": "ucx", "have_ucx": True, "peer_features": ("resume", ucx_feature(7300))}


@given(st.integers(1, 65535))
def test_an_offer_is_read_as_it_was_written(port: int) -> None:
    """Whatever else the list holds."""
    assert offered_ucx_port(["ucx", "fetch", ucx_feature(port)]) == port


@pytest.mark.parametrize("feature", ["ucx=", "ucx=0", "ucx=65536", "ucx=-1", "ucx=７３００", "ucx=7300x", "UCX=7300"])
def test_a_malformed_offer_is_none(feature: str) -> None:
    """Also digits of another script and ports that are none."""
    assert offered_ucx_port([feature]) is None
    assert offered_ucx_port([]) is None


@given(st.lists(st.text()))
def test_no_list_of_features_raises(features: list[str]) -> None:
    """They come from the wire."""
    port = offered_ucx_port(features)
    assert port is None or 1 <= port <= 65535


def test_lanes_after_the_first_go_over_ucx_where_both_have_it() -> None:
    """Lane 0 is TCP: liveness, and what the session falls back to."""
    assert route_lane(0, **BOTH) == LaneRoute("tcp", None)
    assert route_lane(1, **BOTH) == route_lane(7, **BOTH) == LaneRoute("ucx", 7300)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"have_ucx": False}, NOT_HERE),
        ({"peer_features": ()}, NOT_OFFERED),
        ({"peer_features": None}, NOT_OFFERED),
        ({"ucx_failures": 2}, UNREACHABLE),
        ({"wanted": "tcp"}, None),
    ],
)
def test_else_they_go_over_tcp_and_say_why(change: dict[str, object], reason: str | None) -> None:
    """No reason where nobody asked for UCX; one of the metric's labels else, with a text that names the mend."""
    assert route_lane(1, **{**BOTH, **change}) == LaneRoute("tcp", None, reason)  # type: ignore[arg-type]
    if reason is not None:
        assert reason in FALLBACK_REASONS
        assert "TCP, not UCX" in fallback_text(reason, "decode-1", "detail")


def test_one_failure_is_tried_again() -> None:
    """A peer that restarts must not cost the session its UCX lanes."""
    assert route_lane(1, **BOTH, ucx_failures=1).backend == "ucx"  # type: ignore[arg-type]
