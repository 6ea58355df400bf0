"""What only the live router asks of policies: pools of nodes, local prefill, pinned routes, jitter, full memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prfaas.common.perfmodel.curves import Curve, Surface
from prfaas.common.perfmodel.profiles import NodeProfile
from prfaas.common.scheduling.least_loaded import LeastLoaded
from prfaas.common.scheduling.policies import (
    ADMIT_ALL,
    AdaptiveThreshold,
    Admission,
    HomogeneousPd,
    OffloadAll,
    RoundRobin,
    StaticThreshold,
)
from prfaas.common.scheduling.routes import RouteSettings
from prfaas.common.scheduling.types import (
    ROLE_DECODE,
    ROLE_PREFILL,
    ClusterSnapshot,
    Decision,
    LinkColumns,
    PrefixMatches,
    Refused,
    RequestSnapshot,
)

HOME, AWAY = 0, 1
LAB = NodeProfile(
    "lab",
    "m",
    "h",
    1,
    Curve((0.0, 1000.0), (0.0, 1.0)),
    Curve((0.0, 1000.0), (0.0, 1e6)),
    Surface((1.0,), (0.0,), ((0.02,),)),
    max_batch=8,
)
"""1,000 tokens a second, 1,000 bytes a token."""
LIVE = RouteSettings(local_prefill=True, queue_for_memory=True)
DECODE, LOCAL, FAR = (HOME, ROLE_DECODE, {}), (HOME, ROLE_PREFILL, {}), (AWAY, ROLE_PREFILL, {})
POLICIES = (AdaptiveThreshold, StaticThreshold, HomogeneousPd, OffloadAll, RoundRobin)


def cluster(*nodes: tuple[int, int, dict[str, Any]], bandwidth: float = 1e9) -> ClusterSnapshot:
    links = LinkColumns.none(2)
    links.bandwidth_bytes_per_s[:] = bandwidth

    def column(name: str, default: Any, kind: Any) -> Any:
        return np.array([node[2].get(name, default) for node in nodes], kind)

    return ClusterSnapshot(
        names=[str(i) for i in range(len(nodes))],
        region=np.array([node[0] for node in nodes], np.int32),
        region_names=["home", "away"],
        role=np.array([node[1] for node in nodes], np.int8),
        usable=column("usable", True, np.bool_),
        inflight_requests=column("inflight", 0, np.int64),
        inflight_tokens=np.zeros(len(nodes), np.int64),
        free_kv_bytes=column("free_kv", 1 << 50, np.int64),
        profile=np.zeros(len(nodes), np.int32),
        profiles=[LAB],
        prefill_free_at_s=column("free_at", 0.0, np.float64),
        decode_free_at_s=np.zeros(len(nodes)),
        max_inflight_requests=column("most", 1 << 40, np.int64),
        links=links,
    )


def held(snapshot: ClusterSnapshot, tokens: dict[int, int]) -> PrefixMatches:
    """tokens: by row, of nodes with pools of their own."""
    rows = sorted(tokens, key=lambda row: -tokens[row])
    found = np.array(rows, np.int32)
    lengths = np.array([tokens[row] for row in rows], np.int64)
    regions, first = np.unique(snapshot.region[found], return_index=True)
    return PrefixMatches(regions, lengths[first], found, lengths, found[first])


def request(tokens: int, **more: Any) -> RequestSnapshot:
    return RequestSnapshot("r", tokens, 16, tokens, **more)


# -- pools of nodes ---------------------------------------------------------------------------------------------------


def test_a_nodes_prefix_is_its_own() -> None:
    """A neighbour's doesn't count as held: to a decode node without it everything is sent."""
    snapshot = cluster(DECODE, (HOME, ROLE_DECODE, {"inflight": 8, "most": 8}), FAR)
    decision = OffloadAll(ADMIT_ALL)(request(2000, prefixes=held(snapshot, {1: 1900})), snapshot)
    assert isinstance(decision, Decision)
    assert (decision.decode_node, decision.token_start, decision.wire_bytes) == (0, 0, pytest.approx(2e6))


def test_the_decode_node_that_holds_the_prefix_is_sent_the_rest_alone() -> None:
    """Though it is busier; not if it has no room or may not be used."""
    snapshot = cluster(DECODE, (HOME, ROLE_DECODE, {"inflight": 3}), FAR)
    ask = request(2000, prefixes=held(snapshot, {1: 1900}))
    decision = OffloadAll(ADMIT_ALL)(ask, snapshot)
    assert isinstance(decision, Decision)
    assert (decision.decode_node, decision.token_start, decision.wire_bytes) == (1, 1900, pytest.approx(1e5))
    snapshot.max_inflight_requests[1] = 3
    assert OffloadAll(ADMIT_ALL)(ask, snapshot).decode_node == 0  # type: ignore[union-attr]


def test_a_holder_that_is_much_later_is_not_waited_for() -> None:
    """A place in its batch would come later than the bytes take."""
    snapshot = cluster(DECODE, (HOME, ROLE_DECODE, {"inflight": 3}), LOCAL)
    snapshot.decode_free_at_s[1] = 60.0
    ask = request(2000, prefixes=held(snapshot, {1: 1900}))
    assert HomogeneousPd(ADMIT_ALL)(ask, snapshot).decode_node == 0  # type: ignore[union-attr]


def test_with_all_held_there_is_nothing_to_prefill() -> None:
    """The decode node computes the last token itself."""
    snapshot = cluster(DECODE, LOCAL, FAR)
    for policy in POLICIES[:4]:
        decision = policy(ADMIT_ALL, LIVE)(request(129, prefixes=held(snapshot, {0: 128})), snapshot)
        assert isinstance(decision, Decision)
        assert (decision.prefill_node, decision.token_start, decision.reason) == (None, 128, "nothing_to_prefill")


def test_a_fetch_names_the_node_that_holds_most_and_needs_bandwidth() -> None:
    """Above the bandwidth at which moving the prefix is sooner than computing it, and not below."""
    decisions = []
    for bandwidth in (1e5, 9e5, 1.1e6, 1e9):
        snapshot = cluster(DECODE, LOCAL, (AWAY, ROLE_PREFILL, {"free_at": 99.0}), bandwidth=bandwidth)
        decisions.append(HomogeneousPd(ADMIT_ALL)(request(2000, prefixes=held(snapshot, {2: 1900})), snapshot))
    assert [d.fetch_node for d in decisions] == [None, None, 2, 2]  # type: ignore[union-attr]
    assert [d.prefill_start for d in decisions] == [0, 0, 1900, 1900]  # type: ignore[union-attr]


def test_a_neighbour_in_the_same_region_can_be_asked_too() -> None:
    """Its own queue is long, the idle node fetches from it."""
    snapshot = cluster(DECODE, LOCAL, (HOME, ROLE_PREFILL, {"free_at": 99.0}))
    decision = HomogeneousPd(ADMIT_ALL)(request(2000, prefixes=held(snapshot, {2: 1900})), snapshot)
    assert isinstance(decision, Decision)
    assert (decision.prefill_node, decision.fetch_node, decision.fetch_region) == (1, 2, HOME)


# -- local prefill, pins, memory, jitter ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [AdaptiveThreshold, StaticThreshold])
def test_short_prompts_stay_where_home_has_no_prefill_node(kind: Any) -> None:
    """At or below the threshold the decode node prefills them itself; threshold 0: all go."""
    snapshot = cluster(DECODE, FAR)
    threshold = {"planned_tokens": 500} if kind is AdaptiveThreshold else {"threshold_tokens": 500}
    policy = kind(ADMIT_ALL, LIVE, **threshold)
    assert (policy(request(500), snapshot).prefill_node, policy(request(500), snapshot).reason) == (
        None,
        "below_threshold",
    )
    assert (policy(request(501), snapshot).prefill_node, policy(request(501), snapshot).reason) == (1, "offloaded")
    assert kind(ADMIT_ALL, LIVE)(request(2), snapshot).prefill_node == 1


def test_local_prefill_counts_what_the_decode_node_holds() -> None:
    """A second turn is short."""
    snapshot = cluster(DECODE, FAR)
    policy = AdaptiveThreshold(ADMIT_ALL, LIVE, planned_tokens=500)
    decision = policy(request(2000, prefixes=held(snapshot, {0: 1900})), snapshot)
    assert isinstance(decision, Decision)
    assert (decision.prefill_node, decision.token_start, decision.reason) == (None, 1900, "below_threshold")


def test_a_late_offload_stays_at_home_if_that_is_in_time() -> None:
    """And a local prefill that would be late goes away."""
    policy = AdaptiveThreshold(Admission(), LIVE, planned_tokens=500)
    late_away = cluster(DECODE, (AWAY, ROLE_PREFILL, {"free_at": 60.0}))
    assert policy(request(1000), late_away).reason == "offload_late"
    late_home = cluster((HOME, ROLE_DECODE, {"free_at": 60.0}), FAR)
    assert policy(request(100), late_home).reason == "home_late"


@pytest.mark.parametrize("kind", [*POLICIES, LeastLoaded])
def test_a_pinned_route_is_taken_by_every_policy(kind: Any) -> None:
    """Or refused as pinned, where it isn't there."""
    policy = kind()
    snapshot = cluster(DECODE, LOCAL, FAR)
    nodes = {route: policy(request(50, pinned_route=route), snapshot).prefill_node for route in ("home", "offload")}
    assert nodes == {"home": 1, "offload": 2}
    local = policy(request(50, pinned_route="local"), snapshot)
    assert (local.prefill_node, local.reason) == (None, "pinned")
    assert policy(request(50, pinned_route="offload"), cluster(DECODE, LOCAL)).reason == "pinned"
    assert isinstance(policy(request(50, pinned_route="home"), cluster(DECODE, FAR)), Refused)


def test_a_request_that_was_admitted_is_not_refused_for_being_late() -> None:
    """It is routed again after a failure: its client has an answer coming."""
    snapshot = cluster(DECODE, (HOME, ROLE_PREFILL, {"free_at": 60.0}))
    assert HomogeneousPd()(request(100), snapshot).reason == "deadline"
    assert HomogeneousPd()(request(100, admitted=True, remaining_s=0.1), snapshot).reason == "home"


def test_without_free_memory_a_request_waits_at_a_node_if_it_may() -> None:
    """A live node takes it when it can; the simulator's are full."""
    snapshot = cluster((HOME, ROLE_DECODE, {"free_kv": 0}), LOCAL)
    assert HomogeneousPd(ADMIT_ALL)(request(100), snapshot).reason == "full"
    assert HomogeneousPd(ADMIT_ALL, LIVE)(request(100), snapshot).decode_node == 0  # type: ignore[union-attr]
    snapshot.max_inflight_requests[0] = 0
    assert HomogeneousPd(ADMIT_ALL, LIVE)(request(100), snapshot).reason == "full"


def test_jitter_tells_nodes_apart_and_changes_no_prediction() -> None:
    """Of nodes that look alike the one with the least jitter is taken; the time to the first token is the node's."""
    snapshot = cluster(DECODE, DECODE, LOCAL, LOCAL)
    plain = HomogeneousPd(ADMIT_ALL)(request(100), snapshot)
    snapshot.prefill_jitter_s = np.array([0.0, 0.0, 0.3, 0.1])
    snapshot.decode_jitter = np.array([2.0, 1.0, 0.0, 0.0])
    spread = HomogeneousPd(ADMIT_ALL)(request(100), snapshot)
    assert isinstance(plain, Decision)
    assert isinstance(spread, Decision)
    assert (plain.prefill_node, plain.decode_node) == (2, 0)
    assert (spread.prefill_node, spread.decode_node) == (3, 1)
    assert spread.predicted_ttft_s == pytest.approx(plain.predicted_ttft_s)
    snapshot.prefill_free_at_s[3] = 5.0
    assert HomogeneousPd(ADMIT_ALL)(request(100), snapshot).prefill_node == 2  # type: ignore[union-attr]


NODES = st.lists(
    st.tuples(
        st.sampled_from([HOME, AWAY]),
        st.sampled_from([ROLE_PREFILL, ROLE_DECODE]),
        st.fixed_dictionaries(
            {
                "usable": st.booleans(),
                "inflight": st.integers(0, 6),
                "most": st.sampled_from([4, 1 << 40]),
                "free_kv": st.sampled_from([0, 1 << 50]),
                "free_at": st.floats(0, 30),
            }
        ),
    ),
    min_size=1,
    max_size=10,
)


@settings(max_examples=300, deadline=None)
@given(NODES, st.sampled_from(POLICIES), st.integers(2, 5000), st.data())
def test_what_a_decision_says_of_prefixes_is_what_the_nodes_hold(
    nodes: list[tuple[int, int, dict[str, Any]]], kind: Any, tokens: int, data: st.DataObject
) -> None:
    """token_start is the decode node's own; prefill_start the prefill node's own or what fetch_node holds, which is
    another node; and no node is taken that must not be."""
    snapshot = cluster(*nodes)
    rows = [row for row in range(len(nodes)) if snapshot.usable[row]]
    have = {row: data.draw(st.integers(1, 5000)) for row in rows if data.draw(st.booleans())}
    prefixes = held(snapshot, have) if have else None
    decision = kind(ADMIT_ALL, LIVE)(request(tokens, prefixes=prefixes), snapshot)
    if isinstance(decision, Refused):
        return
    most = tokens - 1
    assert decision.token_start == min(have.get(decision.decode_node, 0), most)
    for row, role in ((decision.decode_node, ROLE_DECODE), (decision.prefill_node, ROLE_PREFILL)):
        if row is not None:
            assert snapshot.usable[row]
            assert snapshot.role[row] == role
            assert snapshot.inflight_requests[row] < snapshot.max_inflight_requests[row]
    server = decision.decode_node if decision.prefill_node is None else decision.prefill_node
    if decision.fetch_node is None:
        assert decision.prefill_start == min(have.get(server, 0), most)
    else:
        assert decision.fetch_node != server
        assert decision.prefill_start == min(have[decision.fetch_node], most) > min(have.get(server, 0), most)
        assert decision.fetch_region == snapshot.region[decision.fetch_node]
