"""The slow timescale as a state machine: what it measures, when it decides, and what it says."""

from dataclasses import replace

import numpy as np
import pytest
from prfaas.common.perfmodel.links import LinkProfile
from prfaas.common.perfmodel.profiles import shipped
from prfaas.common.scheduling.conversion import ConversionSettings
from prfaas.common.scheduling.planner import PlannerSettings
from prfaas.common.scheduling.slow_planner import SlowPlanner, SlowSettings, home_regions, stage_loads, to_convert
from prfaas.common.scheduling.types import ROLE_DECODE, ROLE_PREFILL, ClusterSnapshot, LinkColumns
from prfaas.loadgen.workloads.lengths import PAPER_INPUT_LENGTHS

HOME, AWAY, OTHER = 0, 1, 2
AT_ONCE = ConversionSettings(confirmations=1, cool_down_s=0.0, period_s=60.0)


def cluster(n_prefill=3, n_decode=5, away=4, now_s=60.0, prefill_wait_s=0.0, running=0, waiting=0, gbps=100.0):
    """The paper's nodes; waits and counts are the same on each node of a role."""
    roles = [ROLE_PREFILL] * n_prefill + [ROLE_DECODE] * n_decode + [ROLE_PREFILL] * away
    count = len(roles)
    role = np.array(roles, np.int8)
    region = np.array([HOME] * (n_prefill + n_decode) + [AWAY] * away, np.int32)
    decodes = role == ROLE_DECODE
    links = LinkColumns.none(2)
    links.bandwidth_bytes_per_s[AWAY, HOME] = LinkProfile.of_gbps(gbps).goodput_bytes_per_s if gbps else 0.0
    at_home = (role == ROLE_PREFILL) & (region == HOME)
    return ClusterSnapshot(
        names=[str(i) for i in range(count)],
        region=region,
        region_names=["home", "away"],
        role=role,
        usable=np.ones(count, np.bool_),
        inflight_requests=np.zeros(count, np.int64),
        profile=(region == AWAY).astype(np.int32),
        profiles=[shipped("paper-h20"), shipped("paper-h200")],
        prefill_free_at_s=np.where(at_home, now_s + prefill_wait_s, 0.0),
        decode_free_at_s=np.zeros(count),
        decoding_requests=np.where(decodes, running, 0),
        waiting_requests=np.where(decodes, waiting, 0),
        max_inflight_requests=np.full(count, 1 << 40),
        links=links,
        now_s=now_s,
    )


def paper_lengths(count):
    """Quantiles of the paper's distribution, so that a few hundred are as good as all."""
    drawn = np.sort(PAPER_INPUT_LENGTHS.sample(100_000, np.random.default_rng(0)))
    return drawn[((np.arange(count) + 0.5) / count * drawn.size).astype(int)].tolist()


def planner(conversion=AT_ONCE, requests=400, output=1024, until_s=60.0, home=HOME, **settings):
    """One that has seen the paper's lengths, evenly over the last minute."""
    made = SlowPlanner(SlowSettings(conversion, **settings))
    for i, tokens in enumerate(paper_lengths(requests)):
        made.arrived(until_s - 60.0 + 60.0 * i / requests, tokens, output, tokens + output // 2, home)
    return made


def decide(made, seen):
    made.observe(seen)
    (decision,) = made.step(seen)
    return decision


def test_the_stage_that_is_short_gains_a_node():
    """From 1 : 7 with busy prefill nodes one decode node becomes a prefill node; the threshold is that split's."""
    decision = decide(planner(), cluster(1, 7, prefill_wait_s=8.0, running=5))
    assert (decision.to_prefill, decision.reason) == (1, "convert")
    assert decision.plan.n_prefill == 2
    assert decision.threshold_tokens == decision.plan.threshold_tokens
    assert decision.sentence().startswith("1 : 7 becomes 2 : 6: it carries +")


def test_at_the_best_split_nothing_moves():
    """And the sentence says why."""
    decision = decide(planner(), cluster(3, 5, prefill_wait_s=8.0, running=20))
    assert (decision.to_prefill, decision.reason) == (0, "balanced")
    assert decision.sentence().startswith("3 : 5 stays: no other split carries more; prefill is 100% busy")


def test_the_demand_is_what_came_lately():
    """Long answers of an hour ago don't count, those of now do; the rate is theirs."""
    made = planner(output=4096, until_s=60.0)
    for i, tokens in enumerate(paper_lengths(400)):
        made.arrived(3600.0 + i / 4, tokens, 1024, tokens, None)
    decision = decide(made, cluster(3, 5, now_s=3700.0, prefill_wait_s=8.0))
    assert decision.plan.n_prefill == 3
    assert decision.plan.lambda_max == pytest.approx(3.18, rel=0.05)
    assert decision.rate_per_s == pytest.approx(4.0, rel=0.01)


def test_looks_are_averaged_until_a_step():
    """Half the looks found the nodes busy."""
    made = planner()
    made.observe(cluster(prefill_wait_s=10.0, running=20, waiting=20))
    decision = decide(made, cluster(prefill_wait_s=0.0, running=10))
    assert (decision.prefill.utilisation, decision.prefill.queue_s) == (0.5, 5.0)
    assert decision.decode.utilisation == pytest.approx(0.75)
    # 20 waiting requests for the 20 places of a node: one turn of 1,024 steps of 25 ms; half of the looks.
    assert decision.decode.queue_s == pytest.approx(0.5 * 1024 * 0.025)


def test_a_step_is_due_once_a_period_and_only_after_a_look():
    made = planner()
    assert not made.due(60.0)
    seen = cluster()
    made.observe(seen)
    assert made.due(60.0)
    made.step(seen)
    made.observe(seen)
    assert not made.due(119.0)
    assert made.due(120.0)
    assert made.step(cluster(now_s=119.0)) == []


def test_a_threshold_that_is_nearly_the_same_is_no_news():
    """The fast policy would start anew from it; another split's is far enough away."""
    made = planner()
    first = decide(made, cluster(3, 5))
    assert first.threshold_tokens == first.plan.threshold_tokens
    for tokens in paper_lengths(30):
        made.arrived(60.0, 2 * tokens, 1024, tokens, HOME)
    second = decide(made, cluster(3, 5, now_s=120.0))
    assert 0 < abs(second.plan.threshold_tokens / first.plan.threshold_tokens - 1) < 0.1
    assert second.threshold_tokens is None
    assert decide(made, cluster(6, 2, now_s=180.0)).threshold_tokens is not None


def test_looks_before_a_step_are_not_averaged_again():
    """Busy in one period, idle in the next."""
    made = planner()
    assert decide(made, cluster(prefill_wait_s=10.0, running=20)).prefill.utilisation == 1.0
    assert decide(made, cluster(now_s=120.0)).prefill.utilisation == 0.0


def test_what_keeps_it_from_planning_is_said():
    """Too few requests; nobody there whose profile decodes; a demand that nobody can serve."""
    few = decide(planner(requests=99), cluster())
    assert (few.reason, few.plan, few.threshold_tokens) == ("too_few_requests", None, None)
    assert "99 of 100" in few.sentence()
    blind = cluster()
    blind.profiles = [replace(profile, decode_step_s=None) for profile in blind.profiles]
    assert decide(planner(), blind).reason == "no_profile"
    strict = decide(planner(planner=PlannerSettings(tpot_limit_s=0.001)), cluster())
    assert (strict.reason, strict.to_prefill) == ("infeasible", 0)
    assert "missing: a faster node" in strict.sentence()


def test_preview_changes_nothing():
    """It says what a step would; the step then says the same, and counts the confirmation itself."""
    made = planner(ConversionSettings(confirmations=2, cool_down_s=0.0))
    seen = cluster(1, 7, prefill_wait_s=8.0)
    made.observe(seen)
    before = [made.preview(seen, HOME) for _ in range(3)]
    assert {d.reason for d in before} == {"confirming"}
    (first,) = made.step(seen)
    assert first == before[0]


def test_regions_share_what_prefills_elsewhere():
    """A region with three quarters of the requests plans with three of the four offload nodes and that part of the
    link, the other one with one."""
    seen = cluster(3, 5)
    seen.region[4:8] = OTHER
    seen.region_names.append("other")
    seen.links = LinkColumns.none(3)
    seen.links.bandwidth_bytes_per_s[AWAY, [HOME, OTHER]] = 12.5e9
    made = planner(requests=300)
    for tokens in paper_lengths(100):
        made.arrived(59.0, tokens, 1024, tokens, OTHER)
    assert home_regions(seen) == [HOME, OTHER]
    made.observe(seen)
    first, other = made.step(seen)
    assert (first.plan.n_prfaas, other.plan.n_prfaas) == (3, 1)
    assert (first.n_prefill, first.n_decode, other.n_prefill, other.n_decode) == (3, 1, 0, 4)


def test_a_region_without_prefill_nodes_looks_at_those_that_it_offloads_to():
    """Where these are full, nodes at home are needed."""
    seen = cluster(0, 8)
    seen.prefill_free_at_s[8:] = seen.now_s + 6.0
    prefill, _ = stage_loads(seen, HOME, 1024)
    assert (prefill.utilisation, prefill.queue_s) == (1.0, 6.0)


@pytest.mark.parametrize(
    "wrong", [{"demand_s": 0.0}, {"demand_s": float("nan")}, {"threshold_change": -1.0}, {"min_requests": 5000}]
)
def test_settings_without_sense(wrong):
    with pytest.raises(ValueError, match="must be"):
        SlowSettings(**wrong)


def test_what_hinders_a_conversion_is_said_and_the_plan_goes_on() -> None:
    """The threshold is that of the split that stays; what would be better is told; nothing cools down."""
    made = planner()
    seen = cluster(1, 7, prefill_wait_s=8.0, running=5)
    made.observe(seen)
    (decision,) = made.step(seen, lambda region: "not_the_planner")
    assert (decision.to_prefill, decision.wanted, decision.reason) == (0, 1, "not_the_planner")
    assert decision.plan.n_prefill == 1
    assert decision.threshold_tokens == decision.plan.threshold_tokens
    assert "1 : 7 stays (2 : 6 would carry +" in decision.sentence()
    later = cluster(1, 7, now_s=120.0, prefill_wait_s=8.0, running=5)
    assert decide(made, later).reason == "convert"


def test_other_reasons_come_before_a_hindrance() -> None:
    """A router without the lease that would not convert anyway says why."""
    made = planner(ConversionSettings(confirmations=2, cool_down_s=0.0))
    seen = cluster(1, 7, prefill_wait_s=8.0, running=5)
    made.observe(seen)
    (decision,) = made.step(seen, lambda region: "converting")
    assert decision.reason == "confirming"


def test_a_region_that_begins_and_one_that_was_converted_cool_down() -> None:
    """By whomever; looks at the load before it count no more."""
    made = planner(ConversionSettings(confirmations=1, cool_down_s=300.0))
    busy = {"prefill_wait_s": 8.0, "running": 5}
    made.begin(HOME, 60.0)
    assert decide(made, cluster(1, 7, **busy)).reason == "cooling_down"
    assert made.cool_down_left_s(HOME, 100.0) == 260.0
    for i, tokens in enumerate(paper_lengths(400)):
        made.arrived(300.0 + i / 7, tokens, 1024, tokens, HOME)
    made.observe(cluster(1, 7, now_s=350.0, **busy))
    made.converted(HOME, 355.0, ROLE_PREFILL)
    seen = cluster(1, 7, now_s=361.0)
    decision = decide(made, seen)
    assert decision.prefill.utilisation == 0.0
    assert made.cool_down_left_s(HOME, 361.0) == 294.0


def test_a_preview_after_a_step_tells_of_the_load_before_it() -> None:
    """Rather than of no load."""
    made = planner()
    seen = cluster(prefill_wait_s=10.0, running=20)
    decide(made, seen)
    assert made.preview(seen, HOME).prefill.queue_s == 10.0


def test_nodes_with_profiles_of_their_own_share_the_link_of_their_region() -> None:
    """Four nodes measured one by one carry what four of one kind do."""
    one = cluster(0, 8, away=4, gbps=2.0)
    measured = cluster(0, 8, away=4, gbps=2.0)
    measured.profiles.extend([shipped("paper-h200")] * 3)
    measured.profile[-3:] = [2, 3, 4]
    plans = [decide(planner(), seen).plan for seen in (one, measured)]
    assert plans[1].egress_bytes_per_s == pytest.approx(plans[0].egress_bytes_per_s, rel=0.01)
    assert plans[1].lambda_max == pytest.approx(plans[0].lambda_max, rel=0.01)


def test_the_node_that_is_drained_soonest_is_converted_first() -> None:
    """Of the region's usable nodes in the other role."""
    seen = cluster(2, 3)
    seen.inflight_requests[:] = [9, 9, 5, 1, 3, 0, 0, 0, 0]
    assert to_convert(seen, HOME, ROLE_PREFILL).tolist() == [3, 4, 2]
    seen.usable[3] = False
    assert to_convert(seen, HOME, ROLE_PREFILL).tolist() == [4, 2]
    assert to_convert(seen, HOME, ROLE_DECODE).tolist() == [0, 1]
