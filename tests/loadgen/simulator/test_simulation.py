"""The event loop: where time goes, what is conserved, and what happens when nodes and links fail."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prfaas.common.errors import ConfigError
from prfaas.common.perfmodel.links import LinkProfile
from prfaas.common.scheduling.policies import (
    ADMIT_ALL,
    AdaptiveThreshold,
    Admission,
    HomogeneousPd,
    OffloadAll,
    RoundRobin,
    StaticThreshold,
)
from prfaas.loadgen.simulator.cluster import Cluster, Group, LinkChange, NodesBack, NodesLost, RoleChange
from prfaas.loadgen.simulator.columns import DONE, FAILED, REFUSED, Load
from prfaas.loadgen.simulator.measures import saturated_throughput, ttft_s
from prfaas.loadgen.simulator.simulation import Simulation
from prfaas.loadgen.workloads.arrivals import Load as Times
from prfaas.loadgen.workloads.lengths import Fixed
from prfaas.loadgen.workloads.rngs import Rngs
from prfaas.loadgen.workloads.schedule import Schedule
from prfaas.loadgen.workloads.synthetic import SyntheticShape, Turns, synthetic_workload

from tests.loadgen.simulator.nodes import adaptive_run, load, profile, random_load, two_regions


def test_time_to_first_token_at_home():
    """Queue, prefill, one step; then one step a token."""
    made = Simulation(two_regions(), load([0.0, 0.5]), HomogeneousPd(ADMIT_ALL)).run()
    assert ttft_s(made) == pytest.approx([1.02, 1.52])
    assert made.second_token_s - made.first_token_s == pytest.approx([0.02, 0.02])
    assert made.end_s == pytest.approx([1.0 + 0.2, 2.0 + 0.2])
    assert made.prefill_start_s == pytest.approx([0.0, 1.0])
    assert made.link_bytes == {("away", "home"): 0.0}


@pytest.mark.parametrize(
    ("bandwidth", "kv_ready_s"),
    [
        (1e9, 0.5 + 1e6 / 64 / 1e9 + 0.005),  # hidden behind prefill, but for the last layer and half a round trip
        (1e6, 1.0 + 0.005),  # 1 MB at 1 MB/s takes longer than the half second of prefill
    ],
)
def test_transfer_overlaps_prefill(bandwidth, kv_ready_s):
    """Only what prefill doesn't hide is exposed."""
    cluster = two_regions()
    cluster.links["away", "home"] = LinkProfile(bandwidth, rtt_s=0.01)
    made = Simulation(cluster, load([0.0]), OffloadAll(ADMIT_ALL)).run()
    assert made.kv_ready_s == pytest.approx([kv_ready_s], abs=1e-4)
    assert made.wire_bytes == pytest.approx([1e6])
    assert made.offloaded.tolist() == [1]


def test_loss_takes_its_share_of_the_link():
    """Bytes that are sent again leave less for others."""
    cluster = two_regions()
    cluster.links["away", "home"] = LinkProfile(1e6, loss=0.5)
    made = Simulation(cluster, load([0.0]), OffloadAll(ADMIT_ALL)).run()
    assert made.kv_ready_s == pytest.approx([2.0], abs=1e-3)


def test_decode_batch_and_refusal():
    """A batch of one: the second waits for its place, and who would wait too long is refused at once."""
    cluster = two_regions(max_batch=1)
    made = Simulation(cluster, load([0.0, 0.0], outputs=100), HomogeneousPd(ADMIT_ALL)).run()
    assert made.joined_s == pytest.approx([1.0, 3.0])
    late = Simulation(cluster, load([0.0] * 9, outputs=100), HomogeneousPd(Admission())).run()
    # Each holds the only place for 2 s, so that the sixth would wait for 11 s.
    assert late.status.tolist() == [DONE] * 5 + [REFUSED] * 4
    assert (ttft_s(late)[:5] <= 10).all()
    assert late.end_s[5:] == pytest.approx([0.0] * 4)


def test_kv_memory_is_never_overdrawn():
    """Requests that don't fit are held back until some others have ended, and all are served."""
    cluster = two_regions(kv_capacity_bytes=2_500_000)
    policy = HomogeneousPd(ADMIT_ALL)
    least = []

    def watch(_, snapshot):
        least.append(int(snapshot.free_kv_bytes[1]))

    simulation = Simulation(cluster, load([0.0] * 7), policy, hold=True, on_tick=watch, tick_s=0.05)
    made = simulation.run()
    assert (made.status == DONE).all()
    assert min(least) == 2_500_000 - 2 * 1_010_000
    assert simulation.snapshot.free_kv_bytes[1] == 2_500_000
    refused = Simulation(cluster, load([0.0] * 7), policy).run()
    assert (refused.status == DONE).sum() == 2


def test_closed_loop_keeps_so_many_under_way():
    """The next comes when one ends, in the load's order."""
    made = Simulation(two_regions(), load([0.0] * 20), HomogeneousPd(ADMIT_ALL), concurrency=3).run()
    assert (made.status == DONE).all()
    assert made.arrival_s[:3] == pytest.approx([0, 0, 0])
    assert made.arrival_s[3:] == pytest.approx(np.sort(made.end_s)[:17])
    assert saturated_throughput(made) == pytest.approx(1.0)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 1 << 30),
    st.sampled_from([1e4, 1e6, 1e9]),
    st.floats(0.5, 20),
    st.sampled_from(
        [AdaptiveThreshold, StaticThreshold, HomogeneousPd, OffloadAll, RoundRobin],
    ),
    st.booleans(),
)
def test_requests_and_bytes_are_conserved(seed, bandwidth, rate, kind, admit_all):
    """Every request ends once, all books are even at the end, and the link has carried what was sent over it."""
    requests = random_load(seed, 60, rate)
    cluster = two_regions(2, 2, 1, bandwidth)
    policy = kind(ADMIT_ALL if admit_all else Admission())
    simulation = Simulation(cluster, requests, policy, on_tick=getattr(policy, "adapt", None))
    made = simulation.run()
    assert set(made.status.tolist()) <= {DONE, REFUSED}
    assert not admit_all or (made.status == DONE).all()
    assert sum(made.reasons.values()) == 60
    served = made.status == DONE
    assert (made.prefill_start_s[served] >= made.arrival_s[served] - 1e-9).all()
    assert (made.kv_ready_s[served] >= made.prefill_start_s[served] + made.prefill_s[served] - 1e-9).all()
    assert (made.joined_s[served] >= made.kv_ready_s[served] - 1e-9).all()
    steps_s = 0.02 * made.output_tokens[served]
    assert made.end_s[served] - made.joined_s[served] == pytest.approx(steps_s, abs=1e-6)
    sent = made.wire_bytes[served].sum()
    assert made.link_bytes["away", "home"] == pytest.approx(sent, rel=1e-3, abs=200)
    snapshot = simulation.snapshot
    assert not snapshot.inflight_requests.any()
    assert not snapshot.inflight_tokens.any()
    assert simulation._pending_bytes == pytest.approx([0.0], abs=1e-3)
    assert simulation._links[0].remaining_bytes(1e9) == pytest.approx(0.0, abs=200)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1 << 30), st.floats(1, 10))
def test_same_seed_same_result(seed, rate):
    """To the last bit, failures included."""
    changes = [NodesLost(3.0, "home", 0.5), LinkChange(2.0, "away", "home", LinkProfile(1e5)), NodesBack(8.0, "home")]
    first, second = (
        adaptive_run(two_regions(2, 2, 2, 1e7), random_load(seed, 60, rate), changes, Admission()) for _ in range(2)
    )
    for name in ("status", "prefill_node", "decode_node", "first_token_s", "end_s", "wire_bytes", "retries"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    assert first.reasons == second.reasons


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1 << 30), st.floats(1e4, 1e6), st.floats(1.5, 20))
def test_more_bandwidth_is_no_less_throughput(seed, bandwidth, factor):
    """All prefill offloaded over the link: the last request is done no later over a wider one."""
    requests = random_load(seed, 50, 100.0)
    ends = [
        np.nanmax(Simulation(two_regions(bandwidth=width), requests, OffloadAll(ADMIT_ALL)).run().end_s)
        for width in (bandwidth, bandwidth * factor)
    ]
    assert ends[1] <= ends[0] * (1 + 1e-6) + 60 * 0.02


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 1 << 30),
    st.floats(0, 20),
    st.sampled_from(["home", "away"]),
    st.sampled_from(["prefill", "decode", None]),
    st.sampled_from([0.5, 1.0]),
)
def test_lost_nodes(seed, at_s, region, role, share):
    """Requests on lost nodes are served by the others, their books included; what can't be is refused, never lost."""
    requests = random_load(seed, 60, 3.0)
    policy = AdaptiveThreshold(ADMIT_ALL, planned_tokens=1000)
    cluster = two_regions(2, 2, 2, 1e6)
    simulation = Simulation(cluster, requests, policy, [NodesLost(at_s, region, share, role)], on_tick=policy.adapt)
    made = simulation.run()
    alive = simulation.snapshot.usable
    served = made.status == DONE
    late = served & (made.joined_s > at_s)
    assert alive[made.decode_node[late]].all()
    assert (served | (made.status == REFUSED)).all()
    if share < 1 or region == "away" or role == "prefill":
        assert served.all()
    assert not simulation.snapshot.inflight_requests.any()
    assert simulation._pending_bytes == pytest.approx([0.0], abs=1e-3)


def test_a_transfer_from_a_lost_node_leaves_the_link():
    """What it had sent is lost, the rest isn't sent; it begins anew on the node that is left."""
    cluster = two_regions(away=2, bandwidth=1e6)
    made = Simulation(cluster, load([0.0, 0.0]), OffloadAll(ADMIT_ALL), [NodesLost(0.4, "away", 0.5)], tick_s=0.1).run()
    assert made.retries.tolist() == [0, 1]
    assert made.link_bytes["away", "home"] == pytest.approx(2e6 + 0.2e6, rel=1e-3)
    # The first: 0.2 MB on half the link, 0.1 MB on all of it until the other begins anew at 0.5 s, then half again.
    assert made.kv_ready_s == pytest.approx([1.9, 2.2], abs=1e-3)


def test_nodes_that_come_back():
    """What nobody can serve is refused, or held at the router until somebody can."""
    cluster = two_regions(1, 2, 0, 0)
    requests = load([0.0], outputs=100)
    gone = Simulation(cluster, requests, HomogeneousPd(ADMIT_ALL), [NodesLost(2.0, "home", 1.0, "decode")]).run()
    assert gone.status.tolist() == [REFUSED]
    changes = [NodesLost(0.5, "home", 1.0, "decode"), NodesBack(6.0, "home")]
    back = Simulation(cluster, requests, HomogeneousPd(ADMIT_ALL), changes, hold=True).run()
    assert back.first_token_s == pytest.approx([6.0 + 1.0 + 0.02])
    never = Simulation(cluster, requests, HomogeneousPd(ADMIT_ALL), changes[:1], hold=True).run()
    assert never.status.tolist() == [REFUSED]


def test_who_is_stuck_is_given_up():
    """Without a node, or on a dead link, a run still ends: each has a word, all books are even, users of a closed loop
    go on, and a link that comes back lets those go who waited for it."""
    policy = HomogeneousPd(ADMIT_ALL)
    gone = [NodesLost(0.5, "home", 1.0)]
    for more in ({}, {"concurrency": 2}):
        made = Simulation(
            two_regions(), load([0.0] * 5), policy, gone, hold=True, on_tick=lambda *_: None, **more
        ).run()
        assert made.status.tolist() == [REFUSED] * 5
        assert np.isfinite(made.end_s).all()
    dead, back = (LinkChange(at_s, "away", "home", LinkProfile(rate)) for at_s, rate in ((0.2, 0.0), (90.0, 1e9)))
    slow = LinkChange(0.2, "away", "home", LinkProfile(1e-300))
    for change in (dead, slow):
        simulation = Simulation(two_regions(), load([0.0, 0.1]), OffloadAll(ADMIT_ALL), [change], hold=True)
        made = simulation.run()
        assert made.status.tolist() == [FAILED] * 2
        assert made.reasons["link_dead"] == 2
        assert not simulation.snapshot.inflight_requests.any()
        assert simulation._links[0].remaining_bytes(1e3) == pytest.approx(0.0, abs=1.0)
    late = load([0.0, 50.0])
    made = Simulation(two_regions(), late, OffloadAll(ADMIT_ALL), [dead, back], hold=True).run()
    assert made.status.tolist() == [DONE] * 2


def test_ticks_rest_when_nobody_is_there():
    """Requests thirty years apart cost a hundred ticks; the later one still finds a fresh one."""
    seen = []
    Simulation(two_regions(), load([0.0, 1e9]), HomogeneousPd(), on_tick=lambda now_s, _: seen.append(now_s)).run()
    assert len(seen) < 500
    assert max(seen) >= 1e9


def test_ticks_rest_while_a_transfer_crawls():
    """One megabyte at 0.2 bytes/s takes two months, in which nothing happens."""
    seen = []
    crawling = LinkChange(0.2, "away", "home", LinkProfile(0.2))
    simulation = Simulation(
        two_regions(),
        load([0.0]),
        OffloadAll(ADMIT_ALL),
        [crawling],
        on_tick=lambda now_s, _: seen.append(now_s),
    )
    assert simulation.run().status.tolist() == [DONE]
    assert simulation.snapshot.now_s > 1e6
    assert len(seen) < 500


def test_first_token_survives_a_lost_decode_node():
    """25 of 100 tokens were delivered when it died: 75 more after a second prefill of 1,025 tokens."""
    cluster = Cluster([Group("home", "prefill", profile(), 1), Group("home", "decode", profile(), 2)])
    # Both arrive at once, so that the second is on the node that dies (the last row).
    requests = load([0.0, 0.0], outputs=100)
    made = Simulation(cluster, requests, HomogeneousPd(ADMIT_ALL), [NodesLost(2.5, "home", 0.5, "decode")]).run()
    assert made.first_token_s[1] == pytest.approx(2.02)
    assert made.retries.tolist() == [0, 1]
    assert made.end_s[1] == pytest.approx(2.5 + 1.025 + 75 * 0.02, abs=0.03)


def test_a_role_change_drains_first():
    """The node takes nothing new, ends what it has, is away for the switch, and then serves in its new role."""
    cluster = Cluster(
        [Group("home", "prefill", profile(), 1), Group("home", "decode", profile(), 2)], role_switch_s=5.0
    )
    requests = load(np.arange(40) * 1.0, outputs=50)
    policy = HomogeneousPd(ADMIT_ALL)
    simulation = Simulation(cluster, requests, policy, [RoleChange(10.5, "home", "prefill", 1)])
    made = simulation.run()
    assert (made.status == DONE).all()
    assert sorted(simulation.snapshot.role.tolist()) == [0, 0, 1]
    changed = np.flatnonzero(simulation.snapshot.role == 0)[-1]
    used = made.prefill_start_s[made.prefill_node == changed]
    assert used.size
    assert used.min() >= 15.5


def test_schedule_as_source():
    """Turns of a conversation come when the one before has ended, and a closed loop keeps its users."""
    shape = SyntheticShape(Fixed(500), Fixed(20), turns=Turns(mean=3.0))
    workload = synthetic_workload(
        "chat", shape, Times(None, max_concurrency=2), Rngs.from_seed(1), requests=None, conversations=4
    )
    columns = Load(np.zeros(len(workload)), workload.prompt_tokens, workload.output_tokens)
    made = Simulation(two_regions(), columns, HomogeneousPd(ADMIT_ALL), source=Schedule(workload)).run()
    assert made.index.tolist() == list(range(12))
    later = np.flatnonzero(workload.turn > 0)
    assert (made.arrival_s[later] >= made.end_s[later - 1] - 1e-9).all()


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (lambda: load([]), "0 requests"),
        (lambda: load([0.0, 1.0], prompts=[5, -3]), "request 2: prompt_tokens is -3"),
        (lambda: load([0.0], outputs=0), "request 1: output_tokens is 0"),
        (lambda: load([2.0, 1.0]), "request 2 arrives before"),
        (lambda: Cluster([Group("a", "prefill", profile(), 1)]), "no group decodes"),
        (lambda: Cluster([Group("a", "decode", profile(), 0)]), "1 to 100000 nodes"),
        (lambda: Cluster([Group("a", "decode", profile(), 1)], {("a", "b"): LinkProfile(1.0)}), "names no region"),
        (
            lambda: Simulation(two_regions(), load([0.0]), OffloadAll(), [NodesLost(0.0, "mars", 1.0)]),
            "no region 'mars'",
        ),
        (
            lambda: Simulation(two_regions(), load([0.0]), OffloadAll(), [NodesLost(0.0, "home", 1.5)]),
            r"share 1\.5 must be from 0 to 1",
        ),
        (
            lambda: Simulation(two_regions(), load([0.0]), OffloadAll(), [NodesBack(-1.0, "home")]),
            "must be at least 0",
        ),
    ],
)
def test_what_cant_be_simulated(wrong, match):
    """One clear line each."""
    with pytest.raises(ConfigError, match=match):
        wrong()
