"""The slow planner: the paper's case, what more of anything does, what is missing."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prfaas.common.errors import ConfigError, InfeasibleError
from prfaas.common.perfmodel.curves import Curve, Surface
from prfaas.common.perfmodel.lengths import Empirical, TruncatedLogNormal, fixed
from prfaas.common.perfmodel.links import LinkProfile
from prfaas.common.perfmodel.profiles import NodeProfile, shipped
from prfaas.common.perfmodel.throughput import role_imbalance, threshold_imbalance
from prfaas.common.scheduling.planner import (
    LIVE,
    PAPER,
    Demand,
    HomePool,
    OffloadPool,
    PlannerSettings,
    legs,
    plan,
    require,
    thresholds,
)

H20, H200 = shipped("paper-h20"), shipped("paper-h200")
PAPER_DEMAND = Demand(TruncatedLogNormal(9.90, 1.00, 128, 131072), 1024)
PAPER_OFFLOAD = (OffloadPool(H200, 4, LinkProfile.of_gbps(100)),)


# -- the paper --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["paper-h200", "paper-h200-fit"])
def test_the_papers_case(profile: str) -> None:
    """Threshold, split, Λ and egress of Table 6, from the measured points and from the fit through them."""
    made = plan(PAPER_DEMAND, HomePool(H20, 8), [replace(PAPER_OFFLOAD[0], profile=shipped(profile))], PAPER)
    assert 19_000 <= made.threshold_tokens <= 19_800
    assert (made.n_prfaas, made.n_prefill, made.n_decode) == (4, 3, 5)
    assert made.lambda_max == pytest.approx(3.24, rel=0.02)
    assert made.theta_prfaas == pytest.approx(1.61, rel=0.02)
    assert made.theta_pd_prefill == pytest.approx(1.64, rel=0.01)
    assert made.theta_pd_decode == pytest.approx(3.91, rel=0.002)
    assert 12 <= made.egress_bytes_per_s * 8e-9 <= 13.5
    assert made.link_utilisation == pytest.approx(0.13, abs=0.01)
    assert (made.decode_batch, made.decode_step_s) == (20, 0.025)


def test_the_best_plan_is_where_equations_7_and_8_say() -> None:
    """The rates balance between two neighbours of the threshold found; one prefill node more and decode is short."""
    home = HomePool(H20, 8)
    made = plan(PAPER_DEMAND, home, PAPER_OFFLOAD, PAPER)
    step = PAPER.threshold_step_tokens

    def imbalance(threshold_tokens: float) -> float:
        fixed_at = {"threshold_tokens": threshold_tokens, "n_prefill": made.n_prefill}
        there = plan(PAPER_DEMAND, home, PAPER_OFFLOAD, PAPER, **fixed_at)
        return float(threshold_imbalance(there.theta_prfaas, there.share_offloaded, there.theta_pd_prefill))

    def shortage(n_prefill: int) -> float:
        there = plan(PAPER_DEMAND, home, PAPER_OFFLOAD, PAPER, n_prefill=n_prefill)
        return role_imbalance(there.theta_prfaas, there.theta_pd_prefill, there.theta_pd_decode)

    assert imbalance(made.threshold_tokens - step) < 0 < imbalance(made.threshold_tokens + step)
    assert shortage(made.n_prefill) < 0 < shortage(made.n_prefill + 1)


def test_the_papers_homogeneous_baseline() -> None:
    """12 H20 instances and no prefill region: 9 : 3, limited by prefill."""
    made = plan(PAPER_DEMAND, HomePool(H20, 12), (), PAPER)
    assert (made.n_prefill, made.n_decode, made.n_prfaas) == (9, 3, 0)
    assert made.lambda_max == pytest.approx(2.11, rel=0.01)
    assert (made.threshold_tokens, made.share_offloaded, made.egress_bytes_per_s) == (math.inf, 0, 0)
    assert made.bottleneck == "pd_prefill"


def test_the_papers_naive_baseline() -> None:
    """All prefill is offloaded."""
    made = plan(PAPER_DEMAND, HomePool(H20, 8), PAPER_OFFLOAD, PAPER, threshold_tokens=0, n_prefill=0)
    assert made.lambda_max == pytest.approx(2.45, rel=0.015)
    assert (made.n_prefill, made.n_decode, made.share_offloaded) == (0, 8, 1)
    assert made.bottleneck == "prfaas_prefill"


def test_the_mean_time_is_above_the_time_of_the_mean() -> None:
    """Prefill time is convex, so E[T(L)] > T(E[L]) and a live plan promises less than the paper's arithmetic."""
    whole_link = replace(LIVE, link_share=1.0)
    for home, offload in ((HomePool(H20, 8), PAPER_OFFLOAD), (HomePool(H20, 12), ())):
        live, paper = (plan(PAPER_DEMAND, home, offload, s).lambda_max for s in (whole_link, PAPER))
        assert 0.95 * paper < live < paper


# -- against trying everything ----------------------------------------------------------------------------------------


@st.composite
def systems(draw: st.DrawFn) -> tuple[Demand, HomePool, list[OffloadPool], PlannerSettings]:
    """Small systems of any proportions."""

    def node(name: str) -> NodeProfile:
        base, slope = draw(st.floats(0.01, 2)), draw(st.floats(1e-6, 1e-3))
        state, token = draw(st.floats(0, 1e9)), draw(st.floats(0, 1e5))
        steps = Surface((1, 32), (0,), ((0.005,), (draw(st.floats(0.005, 0.1)),)))
        prefill = Curve((1, 5000, 10_000), (base, base + 5000 * slope, base + 12_000 * slope))
        kv = Curve((0, 10_000), (state, state + 10_000 * token))
        return NodeProfile(name, "m", "h", 1, prefill, kv, steps, max_batch=32)

    sizes = draw(st.lists(st.integers(1, 10_000), min_size=1, max_size=30))
    demand = Demand(Empirical(np.array(sizes, float)), draw(st.floats(1, 2000)))
    links = st.floats(1e5, 1e11).map(LinkProfile)
    offload = [
        OffloadPool(node(f"far{i}"), draw(st.integers(0, 6)), draw(links)) for i in range(draw(st.integers(0, 2)))
    ]
    mode = draw(st.sampled_from(["time_of_mean", "mean_time"]))
    chosen = PlannerSettings(mode=mode, threshold_step_tokens=500, wire_ratio=draw(st.floats(0.3, 1)))  # type: ignore[arg-type]
    return demand, HomePool(node("home"), draw(st.integers(2, 9))), offload, chosen


@settings(max_examples=60, deadline=None)
@given(systems())
def test_no_threshold_and_split_carries_more_than_the_plan(
    system: tuple[Demand, HomePool, list[OffloadPool], PlannerSettings],
) -> None:
    """The search computes two splits a threshold; trying every pair finds nothing better, and the plan's own pair again
    gives the plan."""
    demand, home, offload, chosen = system
    best = plan(demand, home, offload, chosen)
    for split in range(home.nodes):
        for threshold in thresholds(demand.uncached, chosen):
            try:
                tried = plan(demand, home, offload, chosen, threshold_tokens=float(threshold), n_prefill=split)
            except InfeasibleError:
                continue
            assert tried.lambda_max <= best.lambda_max * (1 + 1e-12)
    again = plan(demand, home, offload, chosen, threshold_tokens=best.threshold_tokens, n_prefill=best.n_prefill)
    assert again.lambda_max == best.lambda_max


@settings(max_examples=150)
@given(systems(), st.floats(1, 1000), st.integers(1, 5))
def test_more_of_anything_never_lowers_lambda(
    system: tuple[Demand, HomePool, list[OffloadPool], PlannerSettings], times: float, nodes: int
) -> None:
    """Bandwidth, home nodes, prefill nodes, memory on the wire."""
    demand, home, offload, chosen = system
    least = plan(demand, home, offload, chosen).lambda_max * (1 - 1e-12)
    wider = [replace(p, link=LinkProfile(p.link.bandwidth_bytes_per_s * times)) for p in offload]
    assert plan(demand, home, wider, chosen).lambda_max >= least
    assert plan(demand, home, [replace(p, nodes=p.nodes + nodes) for p in offload], chosen).lambda_max >= least
    assert plan(demand, replace(home, nodes=home.nodes + nodes), offload, chosen).lambda_max >= least
    smaller = replace(chosen, wire_ratio=chosen.wire_ratio / times)
    assert plan(demand, home, offload, smaller).lambda_max >= least


@given(systems())
def test_a_plan_names_the_stage_that_is_full(
    system: tuple[Demand, HomePool, list[OffloadPool], PlannerSettings],
) -> None:
    """No stage is over its capacity at Λ, the named one is at it, and no link carries more than its share."""
    demand, home, offload, chosen = system
    made = plan(demand, home, offload, chosen)
    rate, p = made.lambda_max, made.share_offloaded
    used = {
        "prfaas": (rate * p, made.theta_prfaas),
        "pd_prefill": (rate * (1 - p), made.theta_pd_prefill),
        "pd_decode": (rate, made.theta_pd_decode),
    }
    for wanted, theta in used.values():
        assert wanted <= theta * (1 + 1e-9)
    wanted, theta = used[made.bottleneck if made.bottleneck in used else "prfaas"]
    assert wanted == pytest.approx(theta)
    assert made.link_utilisation <= chosen.link_share * (1 + 1e-9)


@pytest.mark.parametrize("mode", ["time_of_mean", "mean_time"])
def test_a_higher_threshold_moves_work_home(mode: str) -> None:
    """Equation 7 has one solution: over all thresholds, up to the ends of the distribution, the rate at which the
    prefill region is full rises and that of the home region falls."""
    chosen = PlannerSettings(mode=mode)  # type: ignore[arg-type]
    grid = np.concatenate(
        (np.linspace(128, 140, 50), np.geomspace(150, 130_000, 200), np.linspace(131_000, 131_072, 50))
    )
    found = legs(PAPER_DEMAND, HomePool(H20, 8), PAPER_OFFLOAD, chosen, 3, grid)
    # The 4,096 parts of the distribution make steps of up to a fiftieth of a percent.
    assert (found.prfaas[1:] >= found.prfaas[:-1] * (1 - 1e-3)).all()
    assert (found.pd_prefill[1:] <= found.pd_prefill[:-1] * (1 + 1e-3)).all()
    assert found.pd_decode == pytest.approx(3.906, abs=0.001)


# -- the link ---------------------------------------------------------------------------------------------------------


def test_a_narrow_link_raises_the_threshold_and_becomes_the_bottleneck() -> None:
    """Fewer requests are worth their bytes."""
    plans = [
        plan(PAPER_DEMAND, HomePool(H20, 8), [OffloadPool(H200, 4, LinkProfile.of_gbps(gbps))], PAPER)
        for gbps in (100, 8, 2)
    ]
    assert plans[0].threshold_tokens < plans[1].threshold_tokens < plans[2].threshold_tokens
    assert plans[0].lambda_max > plans[1].lambda_max > plans[2].lambda_max
    assert plans[1].egress_bytes_per_s <= 1e9 * (1 + 1e-9)


def test_a_dead_link_leaves_the_home_region_to_itself() -> None:
    dead = plan(PAPER_DEMAND, HomePool(H20, 8), [OffloadPool(H200, 4, LinkProfile(0))], PAPER)
    alone = plan(PAPER_DEMAND, HomePool(H20, 8), (), PAPER)
    assert dead.lambda_max == alone.lambda_max
    assert dead.egress_bytes_per_s == 0


def test_two_prefill_regions_carry_as_one_of_both() -> None:
    """Each with half the nodes and half the link."""
    half = OffloadPool(H200, 2, LinkProfile.of_gbps(50))
    two, one = (plan(PAPER_DEMAND, HomePool(H20, 8), pools, PAPER) for pools in ([half, half], PAPER_OFFLOAD))
    assert two.lambda_max == pytest.approx(one.lambda_max)
    assert two.egress_bytes_per_s == pytest.approx(one.egress_bytes_per_s)
    assert two.n_prfaas == 4


# -- batches and limits -----------------------------------------------------------------------------------------------

STEPS = Surface((1, 32), (0, 10_000), ((0.010, 0.020), (0.041, 0.082)))


def test_the_batch_is_the_largest_whose_step_keeps_the_limit() -> None:
    """10 ms at 1, 41 ms at 32, a millisecond a request: 16 in 25 ms."""
    node = replace(H20, decode_step_s=STEPS, max_batch=64)
    assert plan(Demand(fixed(10), 100, 0.0), HomePool(node, 2)).decode_batch == 16
    assert plan(Demand(fixed(10), 100, 10_000), HomePool(node, 2)).decode_batch == 3
    assert plan(Demand(fixed(10), 100, 0.0), HomePool(replace(node, max_batch=5), 2)).decode_batch == 5


@pytest.mark.parametrize(
    ("home", "offload", "told"),
    [
        (HomePool(H20, 1), (), "nodes in a prefill region or a home node that prefills"),
        (HomePool(H20, 1), (OffloadPool(H200, 4, LinkProfile(0)),), "bandwidth to the prefill region or a home node"),
        (
            HomePool(H20, 0),
            PAPER_OFFLOAD,
            "the home region has 0 nodes, and 0 must prefill and 1 decode; missing: 1 home",
        ),
        (HomePool(replace(H20, decode_step_s=Surface((1,), (0,), ((0.03,),))), 8), (), "a decode step takes 30 ms"),
        (HomePool(replace(H20, kv_capacity_bytes=1000), 8), (), "missing: memory"),
    ],
)
def test_an_infeasible_plan_says_what_is_missing(home: HomePool, offload: tuple[OffloadPool, ...], told: str) -> None:
    with pytest.raises(InfeasibleError, match=told):
        plan(PAPER_DEMAND, home, offload)


def test_a_pinned_split_without_a_decoding_node_is_infeasible() -> None:
    with pytest.raises(InfeasibleError, match="missing: a node that decodes"):
        plan(PAPER_DEMAND, HomePool(H20, 3), PAPER_OFFLOAD, n_prefill=3)


def test_home_nodes_that_cant_decode_are_a_wrong_profile() -> None:
    with pytest.raises(ConfigError, match="paper-h200 has no decode_step_s"):
        plan(PAPER_DEMAND, HomePool(H200, 3))


def test_a_rate_that_is_too_high_says_what_alone_would_carry_it() -> None:
    """And with so much more, it is carried."""
    home = HomePool(H20, 8)
    with pytest.raises(InfeasibleError) as refused:
        require(5.0, PAPER_DEMAND, home, PAPER_OFFLOAD)
    assert "10 more home nodes (paper-h20) or 4 more nodes in the prefill region (paper-h200)" in str(refused.value)
    assert "Gbps" not in str(refused.value)
    assert require(5.0, PAPER_DEMAND, HomePool(H20, 18), PAPER_OFFLOAD).lambda_max >= 5
    with pytest.raises(InfeasibleError):
        require(5.0, PAPER_DEMAND, HomePool(H20, 17), PAPER_OFFLOAD)


def test_a_link_alone_can_be_what_is_missing() -> None:
    narrow = (replace(PAPER_OFFLOAD[0], link=LinkProfile.of_gbps(2)),)
    with pytest.raises(InfeasibleError, match=r"a link of 1[0-9] Gbps"):
        require(3.0, PAPER_DEMAND, HomePool(H20, 8), narrow)


@pytest.mark.parametrize(
    "wrong",
    [
        {"tpot_limit_s": 0},
        {"link_share": 1.1},
        {"wire_ratio": -1},
        {"threshold_step_tokens": 0},
        {"min_decode_nodes": 0},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PlannerSettings(**wrong)  # type: ignore[arg-type]


def test_the_grid_stays_bounded_for_very_long_contexts() -> None:
    grid = thresholds(Empirical(np.array([1, 1e9])), PlannerSettings(threshold_step_tokens=1))
    assert grid.size <= 20_002
    assert (grid[0], grid[-1]) == (0, math.inf)
