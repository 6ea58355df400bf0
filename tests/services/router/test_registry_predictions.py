"""What the registry predicts between heartbeats: queues, places, memory, links, profiles, regions."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prfaas.common.errors import RequestError
from prfaas.common.perfmodel.curves import Curve, Surface
from prfaas.common.perfmodel.profiles import NodeProfile, dumps, profile_id
from prfaas.common.scheduling.types import ROLE_DECODE, ROLE_PREFILL
from prfaas.services.messages import Heartbeat, KvAddressMessage, LinkMessage, LoadMessage
from prfaas.services.router import registry as registry_module
from prfaas.services.router.profiles import MAX_PROFILES
from prfaas.services.router.registry import LEASE_S, Node, Registry
from prfaas.services.router.share import Share

PROFILE = NodeProfile(
    "lab",
    "m",
    "h",
    1,
    Curve((1.0, 1000.0), (0.001, 1.0), "linear"),
    Curve((0.0, 1.0), (0.0, 1000.0), "linear"),
    Surface((1.0,), (0.0,), ((0.01,),)),
    max_batch=2,
)
"""1,000 tokens a second, 1,000 bytes a token."""


def beat(node: str = "p", role: str = "prefill", region: str = "away", **changes: Any) -> Heartbeat:
    message = Heartbeat(
        node=node,
        epoch="1",
        region=region,
        role=role,
        url="http://127.0.0.1:1",
        kv_addresses=[KvAddressMessage("h", 1)],
        model="m",
        model_fingerprint="f",
        layout_hash="l",
        max_model_tokens=1 << 20,
        load=LoadMessage(),
    )
    return msgspec.structs.replace(message, **changes)


def with_profile(message: Heartbeat, profile: NodeProfile = PROFILE) -> Heartbeat:
    data = dumps(profile)
    return msgspec.structs.replace(message, profile_id=profile_id(data), profile=data.decode())


def register(registry: Registry, message: Heartbeat, now_s: float = 0.0) -> Node:
    node = registry.heartbeat(message, now_s).node
    assert node is not None
    return node


def free_in_s(registry: Registry, node: Node, now_s: float) -> float:
    """How long the node will be busy with prefill, as predicted."""
    return max(0.0, float(registry.snapshot(now_s).prefill_free_at_s[node.row]) - now_s)


# -- prefill queues ---------------------------------------------------------------------------------------------------


def test_a_reported_queue_takes_its_profile_time() -> None:
    """Two requests of 2,000 tokens each at 1,000 tokens/s; time that passes is no longer to wait for."""
    registry = Registry()
    load = LoadMessage(queued_requests=1, queued_tokens=4000, running_requests=1)
    node = register(registry, with_profile(beat(load=load)), 10.0)
    assert free_in_s(registry, node, 10.0) == pytest.approx(4.0)
    assert free_in_s(registry, node, 13.0) == pytest.approx(1.0)


def test_own_prefills_queue_until_they_end() -> None:
    """One behind the other; one that ends early leaves its time to the others, one that ends as predicted changes
    nothing for them."""
    registry = Registry()
    node = register(registry, with_profile(beat()))
    registry.snapshot(0.0)
    first = registry.dispatched(node, 3000, Share(3000, prefill_s=3.0))
    second = registry.dispatched(node, 2000, Share(2000, prefill_s=2.0))
    first.__enter__()
    second.__enter__()
    assert free_in_s(registry, node, 0.0) == pytest.approx(5.0)
    registry.snapshot(3.0)
    first.__exit__(None, None, None)
    assert free_in_s(registry, node, 3.0) == pytest.approx(2.0)
    second.__exit__(None, None, None)
    assert free_in_s(registry, node, 3.0) == 0.0


def test_a_heartbeat_corrects_the_prediction_and_knows_what_is_running() -> None:
    """The node reports its one request whole, but it has run for two seconds already; a request that the heartbeat
    crossed on its way still counts."""
    registry = Registry()
    node = register(registry, with_profile(beat()))
    registry.snapshot(0.0)
    reported = with_profile(beat(load=LoadMessage(running_requests=1, queued_tokens=3000)))
    with registry.dispatched(node, 3000, Share(3000, prefill_s=3.0)):
        registry.heartbeat(reported, 2.0)
        assert free_in_s(registry, node, 2.0) == pytest.approx(1.0)
        with registry.dispatched(node, 2000, Share(2000, prefill_s=2.0)):
            registry.heartbeat(reported, 2.1)
            assert free_in_s(registry, node, 2.1) == pytest.approx(0.9 + 2.0)
    registry.heartbeat(with_profile(beat()), 3.0)
    assert free_in_s(registry, node, 3.0) == 0.0


def test_own_prefills_of_different_lengths_keep_their_times() -> None:
    """The node reports how many tokens in all, which says too little where a long prompt takes more than its share;
    what other routers have sent beside them is reckoned by its mean length."""
    squares = tuple(float(n * n) for n in range(11))
    slow = dataclasses.replace(PROFILE, prefill_s=Curve(tuple(1000.0 * n for n in range(1, 11)), squares[1:]))
    registry = Registry()
    node = register(registry, with_profile(beat(), slow))
    registry.snapshot(0.0)
    with (
        registry.dispatched(node, 9000, Share(9000, prefill_s=81.0)),
        registry.dispatched(node, 1000, Share(1000, prefill_s=1.0)),
    ):
        load = LoadMessage(queued_requests=1, running_requests=1, queued_tokens=10_000)
        registry.heartbeat(with_profile(beat(load=load), slow), 0.0)
        assert free_in_s(registry, node, 0.0) == pytest.approx(82.0)
        load = LoadMessage(queued_requests=3, running_requests=1, queued_tokens=14_000)
        registry.heartbeat(with_profile(beat(load=load), slow), 1.0)
        assert free_in_s(registry, node, 1.0) == pytest.approx(81.0 + 2 * 4.0)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0.01, 5), st.floats(0, 3), st.booleans()), max_size=20))
def test_a_node_is_free_again_when_all_has_ended(events: list[tuple[float, float, bool]]) -> None:
    """Whatever was dispatched and ended in whatever order: nothing of it is left, and no column is negative."""
    registry = Registry()
    node = register(registry, with_profile(beat()))
    target = register(registry, with_profile(beat("d", "decode", "home")))
    pair = node.region_index, target.region_index
    now_s, open_ = 0.0, []
    for seconds, passes_s, ends in events:
        now_s += passes_s
        snapshot = registry.snapshot(now_s)
        share = Share(100, prefill_s=seconds, kv_bytes=10, link=pair, wire_bytes=seconds * 1e9)
        open_.append(registry.dispatched(node, 100, share))
        open_[-1].__enter__()
        if ends:
            open_.pop(0).__exit__(None, None, None)
        assert snapshot.links.queued_bytes[pair] >= 0
        assert snapshot.inflight_requests[node.row] == len(open_)
        assert free_in_s(registry, node, now_s) <= sum(own.prefill_s for own in node.own) + 1e-9
    for each in open_:
        each.__exit__(None, None, None)
    snapshot = registry.snapshot(now_s)
    assert free_in_s(registry, node, now_s) == 0.0
    assert snapshot.inflight_tokens[node.row] == snapshot.inflight_requests[node.row] == 0
    assert snapshot.links.queued_bytes[pair] == pytest.approx(0.0, abs=1e-3)


# -- decode nodes -----------------------------------------------------------------------------------------------------


def test_a_place_is_waited_for_as_long_as_the_requests_there_stay() -> None:
    """Short answers came before; long ones fill the batch now: that is what counts. As requests end sooner than they
    might, less is expected of the next."""
    registry = Registry()
    node = register(registry, with_profile(beat("d", "decode", "home")))
    for i in range(60):
        registry.snapshot(float(i))
        with registry.dispatched(node, 10, Share(10, stay_s=0.5)):
            registry.snapshot(i + 0.5)
    with registry.dispatched(node, 10, Share(10, stay_s=8.0)), registry.dispatched(node, 10, Share(10, stay_s=4.0)):
        snapshot = registry.snapshot(60.0)
        assert snapshot.decode_free_at_s[node.row] - snapshot.now_s == pytest.approx(6.0 / 2, abs=0.6)
    for i in range(100):
        registry.snapshot(100.0 + i)
        with registry.dispatched(node, 10, Share(10, stay_s=1.0)):
            registry.snapshot(100.5 + i)
    registry.snapshot(300.0)
    with registry.dispatched(node, 10, Share(10, stay_s=8.0)), registry.dispatched(node, 10, Share(10, stay_s=4.0)):
        assert registry.snapshot(300.0).decode_free_at_s[node.row] - 300.0 == pytest.approx(3.0 / 2, abs=0.05)


def test_places_and_memory_of_a_decode_node() -> None:
    """A full batch has no place until one of it has left; memory is what no dispatched request will need. Both come
    back when the request ends."""
    registry = Registry()
    load = LoadMessage(free_kv_bytes=10_000, max_requests=3)
    node = register(registry, with_profile(beat("d", "decode", load=load)), 5.0)
    row, snapshot = node.row, registry.snapshot(5.0)
    assert (snapshot.max_inflight_requests[row], snapshot.decode_free_at_s[row]) == (3, 0.0)
    with (
        registry.dispatched(node, 10, Share(10, kv_bytes=4000)),
        registry.dispatched(node, 10, Share(10, kv_bytes=4000)),
    ):
        assert snapshot.free_kv_bytes[row] == 2000
        assert snapshot.decode_free_at_s[row] > 5.0
        # The node has carved memory for one; the other's comes later.
        later = LoadMessage(running_requests=2, free_kv_bytes=6000, max_requests=3)
        registry.heartbeat(with_profile(beat("d", "decode", load=later)), 6.0)
        assert snapshot.free_kv_bytes[row] == 2000
    assert snapshot.decode_free_at_s[row] == 0.0


def test_a_node_without_a_bound_takes_many() -> None:
    """max_requests 0: no such bound."""
    registry = Registry()
    node = register(registry, beat("d", "decode"))
    assert registry.snapshot(0.0).max_inflight_requests[node.row] > 1 << 50


# -- profiles ---------------------------------------------------------------------------------------------------------


def test_a_profile_is_asked_for_once_and_shared() -> None:
    """Until it comes the node has a nominal one. A second node with the same id needs to send nothing."""
    registry = Registry()
    full = with_profile(beat())
    named = msgspec.structs.replace(full, profile="")
    node = register(registry, named)
    assert registry.wants_profile(named)
    assert registry.snapshot(0.0).profiles[node.profile].name == "nominal"
    version = registry.snapshot(0.0).layout_version
    registry.heartbeat(full, 1.0)
    snapshot = registry.snapshot(1.0)
    assert snapshot.profiles[snapshot.profile[node.row]].name == "lab"
    assert snapshot.layout_version > version
    assert not registry.wants_profile(named)
    other = register(registry, msgspec.structs.replace(named, node="p2"), 1.0)
    assert registry.snapshot(1.0).profiles[other.profile].name == "lab"


@pytest.mark.parametrize("text", ["{}", "", "x" * (1 << 20)])
def test_a_profile_that_is_none_is_refused_once(text: str) -> None:
    """The node stays with a nominal one, and is not asked again."""
    registry = Registry()
    message = beat(profile_id=profile_id(text.encode()), profile=text)
    node = register(registry, message)
    assert registry.snapshot(0.0).profiles[node.profile].name == "nominal"
    assert registry.wants_profile(message) == (text == "")


def test_a_profile_under_a_wrong_id_is_refused() -> None:
    """Else one node could give all others its profile."""
    registry = Registry()
    node = register(registry, msgspec.structs.replace(with_profile(beat()), profile_id="0" * 32))
    assert registry.snapshot(0.0).profiles[node.profile].name == "nominal"


def test_profiles_have_a_bound_and_slots_are_used_again() -> None:
    """Nodes that come and go with a profile of their own each."""
    registry = Registry()
    for i in range(3 * MAX_PROFILES):
        profile = dataclasses.replace(PROFILE, name=f"p{i}", max_batch=i + 1)
        node = register(registry, with_profile(beat(), profile))
        assert registry.snapshot(0.0).profiles[node.profile].name == f"p{i}"
    assert len(registry.snapshot(0.0).profiles) <= MAX_PROFILES
    many = [
        with_profile(
            beat(f"n{i}"),
            dataclasses.replace(PROFILE, name=f"q{i}", max_batch=1000 + i),
        )
        for i in range(2 * MAX_PROFILES)
    ]
    for message in many:
        register(registry, message)
    assert len(registry.snapshot(0.0).profiles) == MAX_PROFILES


def test_nodes_that_are_nearly_alike_share_a_profile() -> None:
    """Each has measured itself, within some percent of the others: they are one pool, and none gets a profile that is
    not its own kind's, however many there are. One that is twice as slow is another kind."""
    registry, rng = Registry(), np.random.default_rng(1)

    def measured(name: str, factor: float) -> NodeProfile:
        times = tuple(factor * value for value in PROFILE.prefill_s.values)
        return dataclasses.replace(PROFILE, name=name, prefill_s=Curve((1.0, 1000.0), times, "linear"))

    nodes = []
    for i in range(3 * MAX_PROFILES):
        factor = (2.0 if i % 10 == 0 else 1.0) * float(rng.uniform(0.96, 1.04))
        nodes.append((factor, register(registry, with_profile(beat(f"n{i}"), measured(f"n{i}", factor)))))
    profiles = registry.snapshot(0.0).profiles
    assert len(profiles) == 2
    for factor, node in nodes:
        assert profiles[node.profile].prefill_s.at(1000.0) == pytest.approx(factor, rel=0.09)


def test_a_profile_without_decode_serves_a_node_that_decodes() -> None:
    """A node may take either role, and the policy asks for its decode step."""
    registry = Registry()
    prefills = NodeProfile("fast", "m", "h", 1, PROFILE.prefill_s, PROFILE.kv_bytes)
    node = register(registry, with_profile(beat("d", "decode"), prefills))
    assert registry.snapshot(0.0).profiles[node.profile].step_s(1, 10) > 0


# -- links ------------------------------------------------------------------------------------------------------------


def linked(registry: Registry, source: str = "p", **link: Any) -> None:
    registry.heartbeat(beat(source, links=[LinkMessage("d", **link)]), 0.0)


def between(registry: Registry, column: str) -> float:
    return float(getattr(registry.snapshot(0.0).links, column)[0, 1])


def two_regions(assumed: float = 7e8) -> Registry:
    registry = Registry(assumed)
    for message in (beat(), beat("p2"), beat("d", "decode", "home")):
        register(registry, message)
    return registry


def test_an_unmeasured_link_has_the_assumed_bandwidth() -> None:
    """Unknown is not absent: a session that has carried nothing yet says 0."""
    registry = two_regions()
    assert between(registry, "bandwidth_bytes_per_s") == 7e8
    linked(registry, bandwidth_bytes_per_s=0.0, rtt_s=0.03)
    assert between(registry, "bandwidth_bytes_per_s") == 7e8
    assert between(registry, "rtt_s") == pytest.approx(0.03)


def test_sessions_that_share_a_link_add_up_only_while_they_are_busy() -> None:
    """Two that each had the link alone don't make it twice as wide; two that are busy at once share it."""
    registry = two_regions()
    linked(registry, "p", bandwidth_bytes_per_s=1e9, utilisation=0.0)
    linked(registry, "p2", bandwidth_bytes_per_s=1e9, utilisation=0.0)
    assert between(registry, "bandwidth_bytes_per_s") == pytest.approx(1e9)
    linked(registry, "p", bandwidth_bytes_per_s=6e8, utilisation=1.0)
    linked(registry, "p2", bandwidth_bytes_per_s=6e8, utilisation=1.0)
    assert between(registry, "bandwidth_bytes_per_s") == pytest.approx(1.2e9)
    assert between(registry, "utilisation") == pytest.approx(1.0)


def test_the_estimate_follows_a_link_that_narrows_and_widens() -> None:
    """Down only while a session is busy: an idle one knows nothing of the link now."""
    registry = two_regions()
    linked(registry, bandwidth_bytes_per_s=1e9, utilisation=0.9)
    linked(registry, bandwidth_bytes_per_s=1e8, utilisation=0.1)
    assert between(registry, "bandwidth_bytes_per_s") == pytest.approx(1e9)
    linked(registry, bandwidth_bytes_per_s=1e8, utilisation=1.0)
    assert between(registry, "bandwidth_bytes_per_s") == pytest.approx(1e8)
    linked(registry, bandwidth_bytes_per_s=1e9, utilisation=1.0)
    assert between(registry, "bandwidth_bytes_per_s") == pytest.approx(1e9)


def test_what_an_idle_session_measured_long_ago_does_not_widen_a_link() -> None:
    """It says the same again in every heartbeat, while the busy one finds the link narrow."""
    registry = two_regions()
    for _ in range(3):
        linked(registry, "p2", bandwidth_bytes_per_s=1e9, utilisation=0.0)
        linked(registry, "p", bandwidth_bytes_per_s=1e7, utilisation=1.0)
    linked(registry, "p2", bandwidth_bytes_per_s=1e9, utilisation=0.0)
    assert between(registry, "bandwidth_bytes_per_s") == pytest.approx(1e7)
    linked(registry, "p2", bandwidth_bytes_per_s=5e7, utilisation=0.1)
    assert between(registry, "bandwidth_bytes_per_s") == pytest.approx(5e7)


def test_a_session_that_begins_to_use_a_narrow_link_does_not_widen_it_by_what_it_remembers() -> None:
    """Neither as its bandwidth nor as what it carries, until it has measured it anew."""
    registry = two_regions()
    linked(registry, "p2", bandwidth_bytes_per_s=1e9, utilisation=0.0)
    linked(registry, "p", bandwidth_bytes_per_s=1e7, utilisation=1.0)
    linked(registry, "p2", bandwidth_bytes_per_s=1e9, utilisation=1.0)
    assert between(registry, "bandwidth_bytes_per_s") <= 2e7
    linked(registry, "p2", bandwidth_bytes_per_s=8e8, utilisation=1.0)
    assert between(registry, "bandwidth_bytes_per_s") >= 8e8


def test_a_node_that_goes_takes_its_traffic_along() -> None:
    """What was measured of the link stays."""
    registry = two_regions()
    linked(registry, bandwidth_bytes_per_s=1e9, utilisation=1.0, queued_bytes=5000)
    assert (between(registry, "utilisation"), between(registry, "queued_bytes")) == (1.0, 5000.0)
    registry.heartbeat(beat(leaving=True), 1.0)
    assert (between(registry, "utilisation"), between(registry, "queued_bytes")) == (0.0, 0.0)
    assert between(registry, "bandwidth_bytes_per_s") == pytest.approx(1e9)


def test_compression_makes_a_link_carry_more_kv() -> None:
    """Policies reckon with bytes of KV, sessions with bytes on the wire."""
    registry = two_regions()
    linked(registry, bandwidth_bytes_per_s=1e9, utilisation=1.0)
    for _ in range(100):
        registry.links.compressed(1000, 500)
    linked(registry, bandwidth_bytes_per_s=1e9, utilisation=1.0)
    assert between(registry, "bandwidth_bytes_per_s") == pytest.approx(2e9, rel=1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {"links": [LinkMessage("d", bandwidth_bytes_per_s=float("nan"))]},
        {"links": [LinkMessage("d", rtt_s=-1.0)]},
        {"links": [LinkMessage("d", queued_bytes=1 << 60)]},
        {"routers": 0},
        {"routers": 1 << 30},
        {"profile_id": "x" * 1000},
    ],
    ids=str,
)
def test_a_heartbeat_with_impossible_figures_is_refused(changes: dict[str, Any]) -> None:
    """Sums of them go into every decision."""
    with pytest.raises(RequestError):
        Registry().heartbeat(beat(**changes), 0.0)


# -- roles, rows and regions ------------------------------------------------------------------------------------------


def test_a_node_changes_its_role_within_one_life() -> None:
    """Same process, same row: from its next heartbeat on it is found among the nodes of its new role."""
    registry = Registry()
    node = register(registry, with_profile(beat("n", "decode")))
    version = registry.snapshot(0.0).layout_version
    registered = registry.heartbeat(with_profile(beat("n", "prefill")), 1.0)
    assert (registered.news, registered.node) == ("converted", node)
    snapshot = registry.snapshot(1.0)
    assert snapshot.layout_version > version
    assert snapshot.pools(ROLE_DECODE) == []
    assert [pool.first for pool in snapshot.pools(ROLE_PREFILL)] == [node.row]


def test_rows_are_freed_and_used_again_with_clean_columns() -> None:
    """A node that leaves is in no pool; the next one finds nothing of it in its row, and its holder is forgotten."""
    freed: list[int] = []
    registry = Registry(on_row_free=freed.append)
    busy = LoadMessage(queued_requests=1, queued_tokens=9000, free_kv_bytes=77, max_requests=1)
    node = register(registry, with_profile(beat(load=busy)))
    registry.heartbeat(with_profile(beat(load=busy, leaving=True)), 1.0)
    assert freed == [node.row]
    assert registry.snapshot(1.0).pools(ROLE_PREFILL) == []
    new = register(registry, beat("d", "decode", "elsewhere"), 2.0)
    snapshot = registry.snapshot(2.0)
    assert new.row == node.row
    assert (snapshot.role[0], snapshot.inflight_tokens[0], snapshot.free_kv_bytes[0]) == (ROLE_DECODE, 0, 0)
    assert snapshot.prefill_free_at_s[0] <= 2.0
    assert snapshot.region_names[snapshot.region[0]] == "elsewhere"
    register(registry, beat("d", "decode", "elsewhere", epoch="2"), 3.0)
    assert freed == [0, 0]


def test_regions_have_a_bound_and_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Links are kept by pairs of regions; a new region has nothing of the old one's link."""
    monkeypatch.setattr(registry_module, "MAX_REGIONS", 2)
    registry = two_regions()
    linked(registry, bandwidth_bytes_per_s=1e9, utilisation=1.0)
    with pytest.raises(RequestError, match="regions"):
        registry.heartbeat(beat("x", region="third"), 0.0)
    for name in ("p", "p2"):
        registry.heartbeat(beat(name, leaving=True), 0.0)
    register(registry, beat("x", region="third"))
    snapshot = registry.snapshot(0.0)
    assert snapshot.region_names == ["third", "home"]
    assert between(registry, "bandwidth_bytes_per_s") == 7e8


def test_a_lost_node_is_not_usable_and_keeps_its_row() -> None:
    """Its lease decides; it is in its pool still."""
    registry = Registry()
    node = register(registry, beat("d", "decode"))
    assert not registry.snapshot(LEASE_S + 1).usable[node.row]
    assert np.flatnonzero(registry.snapshot(LEASE_S - 1).usable).tolist() == [node.row]
