"""The fast policy and the baselines: where requests go, and where they never go."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prfaas.common.perfmodel.curves import Curve, Surface
from prfaas.common.perfmodel.profiles import NodeProfile, shipped
from prfaas.common.scheduling.policies import (
    ADMIT_ALL,
    AdaptiveThreshold,
    Admission,
    HomogeneousPd,
    OffloadAll,
    RoundRobin,
    StaticThreshold,
)
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
SLOW = NodeProfile(
    "slow",
    "m",
    "h",
    1,
    Curve((0.0, 1000.0), (0.0, 1.0)),
    Curve((0.0, 1000.0), (0.0, 1e6)),
    Surface((1.0,), (0.0,), ((0.02,),)),
    max_batch=4,
)
FAST = NodeProfile("fast", "m", "h", 1, Curve((0.0, 1000.0), (0.1, 0.4)), Curve((0.0, 1000.0), (0.0, 1e6)))
"""Twice as fast at 333 tokens and slower below 143."""
POLICIES = (AdaptiveThreshold, StaticThreshold, HomogeneousPd, OffloadAll, RoundRobin)


def cluster(nodes, bandwidth=1e9, queued=0.0, utilisation=0.0, now_s=0.0):
    """nodes: (region, role, and columns that differ from idle)."""
    count = len(nodes)
    links = LinkColumns.none(2)
    links.bandwidth_bytes_per_s[:] = bandwidth
    links.queued_bytes[:] = queued
    links.utilisation[:] = utilisation

    def column(name, default, kind):
        return np.array([node[2].get(name, default) for node in nodes], kind)

    return ClusterSnapshot(
        names=[str(i) for i in range(count)],
        regions=[("home", "away")[node[0]] for node in nodes],
        region=np.array([node[0] for node in nodes], np.int32),
        region_names=["home", "away"],
        role=np.array([node[1] for node in nodes], np.int8),
        usable=column("usable", True, np.bool_),
        inflight_requests=column("inflight", 0, np.int64),
        inflight_tokens=np.zeros(count, np.int64),
        free_kv_bytes=column("free_kv", 1 << 50, np.int64),
        profile=np.array([node[0] for node in nodes], np.int32),
        profiles=[SLOW, FAST],
        prefill_free_at_s=column("free_at", 0.0, np.float64),
        decode_free_at_s=column("place_at", 0.0, np.float64),
        max_inflight_requests=column("most", 1 << 40, np.int64),
        links=links,
        now_s=now_s,
    )


def node(region, role, **columns):
    return region, role, columns


DECODE, LOCAL, FAR = node(HOME, ROLE_DECODE), node(HOME, ROLE_PREFILL), node(AWAY, ROLE_PREFILL)


def request(tokens, **more):
    return RequestSnapshot("r", tokens, 16, tokens, **more)


def matches(home=0, away=0, nodes=()):
    held = [(region, tokens) for region, tokens in ((HOME, home), (AWAY, away)) if tokens]
    return PrefixMatches(
        np.array([region for region, _ in held], np.int32),
        np.array([tokens for _, tokens in held], np.int64),
        np.array([row for row, _ in nodes], np.int32),
        np.array([tokens for _, tokens in nodes], np.int64),
    )


@pytest.mark.parametrize(
    ("policy", "tokens", "expected"),
    [
        (StaticThreshold(threshold_tokens=500), 500, (1, "below_threshold")),
        (StaticThreshold(threshold_tokens=500), 501, (2, "offloaded")),
        (StaticThreshold(threshold_tokens=float("inf")), 9000, (1, "below_threshold")),
        (HomogeneousPd(), 9000, (1, "home")),
        (OffloadAll(), 2, (2, "offloaded")),
    ],
)
def test_baselines(policy, tokens, expected):
    """Each baseline follows its one rule."""
    decision = policy(request(tokens), cluster([DECODE, LOCAL, FAR]))
    assert (decision.prefill_node, decision.reason) == expected


@pytest.mark.parametrize("policy", POLICIES)
def test_without_nodes(policy):
    """No decode node: refused, and says so. No prefill node: the decode node prefills. One side only: that one."""
    assert policy()(request(10), cluster([LOCAL, FAR])) == Refused("no_decode_node", 1.0)
    alone = policy()(request(10), cluster([DECODE]))
    assert (alone.prefill_node, alone.decode_node, alone.reason) == (None, 0, "no_prefill_node")
    assert policy()(request(10), cluster([DECODE, LOCAL])).prefill_node == 1
    assert policy()(request(10), cluster([DECODE, FAR])).prefill_node == 1
    assert policy()(request(10), cluster([DECODE, FAR], bandwidth=0.0)).prefill_node is None


def test_least_loaded_by_predicted_finish():
    """Of equal nodes the one that is free first; of decode nodes the one with the fewest requests for its batch."""
    nodes = [
        node(HOME, ROLE_DECODE, inflight=3),
        node(HOME, ROLE_DECODE, inflight=2),
        node(HOME, ROLE_PREFILL, free_at=3.0),
        node(HOME, ROLE_PREFILL, free_at=1.0),
    ]
    decision = HomogeneousPd()(request(1000), cluster(nodes, now_s=0.5))
    assert (decision.decode_node, decision.prefill_node) == (1, 3)
    # 0.5 s until the node is free, 1 s of prefill, one step.
    assert decision.predicted_ttft_s == pytest.approx(0.5 + 1.0 + 0.02)


@pytest.mark.parametrize("policy", POLICIES)
def test_full_nodes_are_left_out(policy):
    """A node that has as many requests as it takes is never given another, though it would be the least loaded."""
    full = {"inflight": 4, "most": 4}
    nodes = [
        node(HOME, ROLE_DECODE, **full),
        node(HOME, ROLE_DECODE, inflight=9),
        node(HOME, ROLE_PREFILL, **full),
        node(HOME, ROLE_PREFILL, free_at=5.0),
    ]
    decision = policy()(request(100), cluster(nodes))
    assert (decision.decode_node, decision.prefill_node) == (1, 3)
    assert policy()(request(100), cluster([nodes[0], LOCAL])).reason == "full"
    assert policy()(request(100), cluster([nodes[1], nodes[2]])).prefill_node is None


def test_link_and_decode_can_be_what_takes_longest():
    """The first token waits for the slowest of prefill, the bytes ahead on the link, and a place in the batch."""
    away = OffloadAll(ADMIT_ALL)
    free = away(request(1000), cluster([DECODE, FAR])).predicted_ttft_s
    behind = away(request(1000), cluster([DECODE, FAR], queued=4e9)).predicted_ttft_s
    assert free < 0.5
    assert behind == pytest.approx(away.settings.link_margin * (4e9 + 1e6) / 1e9 + 0.02, rel=1e-3)
    full = away(request(1000), cluster([node(HOME, ROLE_DECODE, place_at=7.0), FAR])).predicted_ttft_s
    assert full == pytest.approx(7.02)


def test_adaptive_takes_the_sooner_token_when_idle_and_the_threshold_when_full():
    """π decides how much the threshold counts."""
    policy = AdaptiveThreshold(ADMIT_ALL, planned_tokens=600)
    control = policy.controller(HOME)
    nodes = [DECODE, LOCAL, FAR]
    control.price = 0.0
    assert policy(request(400), cluster(nodes)).reason == "offloaded"  # 0.22 s against 0.4
    control.price = 1e6
    assert policy(request(599), cluster(nodes)).reason == "below_threshold"
    assert policy(request(601), cluster(nodes)).reason == "offloaded"


def test_a_late_request_spills_only_where_it_is_cheap():
    """What would be late at home goes away if the wait there is short, and is refused if everything is full."""
    policy = AdaptiveThreshold(planned_tokens=600)
    policy.controller(HOME).price = 1e6
    late = node(HOME, ROLE_PREFILL, free_at=11.0)
    spilled = policy(request(500), cluster([DECODE, late, FAR]))
    assert (spilled.prefill_node, spilled.reason) == (2, "home_late")
    busy = node(AWAY, ROLE_PREFILL, free_at=9.0)
    assert policy(request(500), cluster([DECODE, late, busy])).reason == "deadline"


def test_admission():
    """Late by the SLO or by the request's own deadline: refused at once, with the time after which it would fit."""
    late = cluster([DECODE, node(HOME, ROLE_PREFILL, free_at=14.0)])
    answer = HomogeneousPd()(request(1000), late)
    assert answer == Refused("deadline", pytest.approx(14.0 + 1.0 + 0.02 - 10.0))
    assert isinstance(HomogeneousPd(ADMIT_ALL)(request(1000), late), Decision)
    # Twice its own 15 s of prefill are allowed to a long prompt.
    assert isinstance(HomogeneousPd()(request(15_000), late), Decision)
    soon = cluster([DECODE, LOCAL])
    assert isinstance(HomogeneousPd()(request(1000, remaining_s=1.1), soon), Decision)
    assert HomogeneousPd()(request(1000, remaining_s=0.5), soon) == Refused("deadline", 1.0)
    assert HomogeneousPd()(request(1000, waited_s=9.5), soon).reason == "deadline"


def test_prefixes_scarce_and_abundant():
    """The paper's two rules: with scarce bandwidth the home cache alone decides; with abundant bandwidth the longest
    cache anywhere, fetched if it lies in the other region."""
    policy = StaticThreshold(threshold_tokens=500)
    ask = request(2000, prefixes=matches(home=400, away=1800))
    scarce = policy(ask, cluster([DECODE, LOCAL, FAR], utilisation=0.9))
    assert (scarce.prefill_node, scarce.prefill_start, scarce.token_start) == (2, 1800, 400)
    abundant = policy(ask, cluster([DECODE, LOCAL, FAR]))
    assert (abundant.prefill_node, abundant.prefill_start, abundant.fetch_region) == (1, 1800, AWAY)
    assert abundant.token_start == 400
    held = policy(request(2000, prefixes=matches(home=1900)), cluster([DECODE, LOCAL, FAR]))
    assert (held.reason, held.prefill_start, held.token_start) == ("below_threshold", 1900, 1900)


def test_a_fetch_that_takes_longer_than_computing_is_not_made():
    """Where the bytes ahead on the link take longer than the prefill that they save."""
    slow = cluster([DECODE, LOCAL], bandwidth=1e6)
    decision = HomogeneousPd()(request(2000, prefixes=matches(away=1800)), slow)
    assert (decision.prefill_start, decision.fetch_region) == (0, None)


def test_cache_affine():
    """A node that holds a longer prefix is taken when it would be done sooner, though it is busier."""
    nodes = [DECODE, LOCAL, node(HOME, ROLE_PREFILL, free_at=0.5)]
    ask = request(2000, prefixes=matches(nodes=[(2, 1500)]))
    decision = HomogeneousPd()(ask, cluster(nodes))
    assert (decision.prefill_node, decision.prefill_start) == (2, 1500)
    nodes[2] = node(HOME, ROLE_PREFILL, free_at=1.9)
    assert HomogeneousPd()(ask, cluster(nodes)).prefill_node == 1
    nodes[2] = node(HOME, ROLE_PREFILL, usable=False)
    assert HomogeneousPd()(ask, cluster(nodes)).prefill_node == 1


def test_a_whole_cached_prompt_still_computes_its_last_token():
    """The n−1 rule."""
    decision = HomogeneousPd()(request(512, prefixes=matches(home=512)), cluster([DECODE, LOCAL]))
    assert (decision.prefill_start, decision.token_start) == (511, 511)


def test_home_region_is_kept():
    """A request whose home is given decodes there."""
    nodes = [node(HOME, ROLE_DECODE, inflight=3), node(AWAY, ROLE_DECODE), LOCAL]
    snapshot = cluster(nodes)
    snapshot.profile[:] = 0
    for policy in POLICIES:
        assert policy()(request(10, home_region=HOME), snapshot).decode_node == 0


def test_round_robin_takes_turns():
    """Prefill and decode nodes each in turn, unusable ones left out."""
    nodes = [DECODE, LOCAL, node(HOME, ROLE_PREFILL, usable=False), FAR, DECODE]
    policy, snapshot = RoundRobin(), cluster(nodes)
    picked = [policy(request(10), snapshot) for _ in range(4)]
    assert [each.prefill_node for each in picked] == [1, 3, 1, 3]
    assert [each.decode_node for each in picked] == [0, 4, 0, 4]


def test_pools_follow_the_layout():
    """A node that changes its role is found in its new pool once the version is raised, also between others."""
    snapshot = cluster([DECODE, LOCAL, DECODE, LOCAL])
    assert HomogeneousPd()(request(10), snapshot).prefill_node == 1
    snapshot.role[1], snapshot.role[2] = ROLE_DECODE, ROLE_PREFILL
    snapshot.prefill_free_at_s[2] = 5.0
    snapshot.layout_version += 1
    assert HomogeneousPd()(request(10), snapshot).prefill_node == 3
    snapshot.usable[3] = False
    assert HomogeneousPd()(request(10), snapshot).prefill_node == 2


NODES = st.lists(
    st.tuples(
        st.sampled_from([HOME, AWAY]),
        st.sampled_from([ROLE_PREFILL, ROLE_DECODE]),
        st.fixed_dictionaries(
            {
                "usable": st.booleans(),
                "inflight": st.integers(0, 6),
                "most": st.sampled_from([4, 1 << 40]),
                "free_kv": st.sampled_from([0, 10_000, 1 << 50]),
                "free_at": st.floats(0, 30),
                "place_at": st.floats(0, 30),
            }
        ),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=400, deadline=None)
@given(
    NODES,
    st.sampled_from(POLICIES),
    st.integers(1, 5000),
    st.one_of(st.none(), st.floats(0, 20)),
    st.sampled_from([0.0, 1e5, 1e9]),
    st.sampled_from([0.0, 1e10]),
    st.one_of(st.none(), st.tuples(st.integers(0, 4000), st.integers(0, 4000))),
)
def test_never_a_node_that_must_not_be_taken(nodes, policy, tokens, remaining_s, bandwidth, queued, held):
    """Whatever the cluster: nodes of the right role that are usable, not full, reachable, and in time."""
    snapshot = cluster(nodes, bandwidth=bandwidth, queued=queued)
    snapshot.profiles = [SLOW, shipped_with_decode()]
    prefixes = None if held is None else matches(min(held[0], tokens), min(held[1], tokens))
    ask = request(tokens, remaining_s=remaining_s, prefixes=prefixes)
    admission = Admission()
    answer = policy(admission)(ask, snapshot)
    if isinstance(answer, Refused):
        assert admission.min_retry_after_s <= answer.retry_after_s <= admission.max_retry_after_s
        if answer.reason == "no_decode_node":
            assert not (snapshot.usable & (snapshot.role == ROLE_DECODE)).any()
        return
    check_node(snapshot, answer.decode_node, ROLE_DECODE)
    profile = snapshot.profiles[snapshot.profile[answer.decode_node]]
    assert snapshot.free_kv_bytes[answer.decode_node] >= profile.kv_bytes.at(tokens + 16)
    if answer.prefill_node is not None:
        check_node(snapshot, answer.prefill_node, ROLE_PREFILL)
        same = snapshot.region[answer.prefill_node] == snapshot.region[answer.decode_node]
        assert same or bandwidth > 0
    assert 0 <= answer.prefill_start < tokens
    assert 0 <= answer.token_start < tokens
    server = answer.decode_node if answer.prefill_node is None else answer.prefill_node
    bare_s = snapshot.profiles[snapshot.profile[server]].prefill_s.at(tokens - answer.prefill_start)
    assert answer.predicted_ttft_s <= admission.limit_s(bare_s) + 1e-9
    assert answer.predicted_ttft_s >= bare_s
    if remaining_s is not None:
        assert answer.predicted_ttft_s <= remaining_s + 1e-9


def check_node(snapshot, row, role):
    assert snapshot.usable[row]
    assert snapshot.role[row] == role
    assert snapshot.inflight_requests[row] < snapshot.max_inflight_requests[row]


def shipped_with_decode():
    return shipped("paper-h20")
