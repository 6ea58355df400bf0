"""The slow timescale in the simulator's time: roles follow the mix of requests, and nothing is lost on the way."""

import dataclasses

import numpy as np
import pytest
from prfaas.common.scheduling.policies import ADMIT_ALL, AdaptiveThreshold, HomogeneousPd
from prfaas.common.scheduling.slow_planner import SlowPlanner
from prfaas.loadgen.simulator import drift
from prfaas.loadgen.simulator.cluster import NodesLost
from prfaas.loadgen.simulator.columns import DONE, REFUSED
from prfaas.loadgen.simulator.simulation import Simulation

from tests.loadgen.simulator.nodes import load, two_regions

DRIFTS = {each.scenario.name: each for each in drift.drifts()}


def simulate(each, seed=0):
    scenario = each.scenario
    policy = AdaptiveThreshold(planned_tokens=scenario.planned_threshold_tokens)
    simulation = Simulation(scenario.cluster, each.load(seed), policy, on_tick=policy.adapt, slow=SlowPlanner())
    return simulation, simulation.run(), policy


def test_nodes_change_their_role_when_the_mix_has_changed_for_long():
    """Answers twice as long: home nodes go from prefill to decode until the best split is reached, and more is served
    within the objective than without; none goes back."""
    each = DRIFTS["answers_longer"]
    made = drift.run(each, 0)
    before, best = drift.planned_rates(each)
    assert best > 1.3 * before
    assert made.replanned.goodput > 1.15 * made.stays.goodput
    assert made.replanned.goodput > before
    assert (made.conversions, made.split, made.reversals) == ((0, 2), (1, 7), 0)


def test_the_other_way_round():
    """Answers half as long, and more requests: decode nodes go to prefill."""
    made = drift.run(DRIFTS["answers_shorter"], 0)
    assert made.conversions[0] == 2
    assert made.conversions[1] == made.reversals == 0
    assert made.replanned.goodput > made.stays.goodput


def test_a_load_that_swings_does_not_flap():
    """A conversion that was undone would have been for nothing."""
    for seed in range(2):
        made = drift.run(DRIFTS["swings"], seed)
        assert made.reversals == 0
        assert sum(made.conversions) <= 2


def test_no_request_is_lost_in_a_conversion():
    """Every one that came was served or refused at its arrival, whatever its node did meanwhile; the nodes that
    changed were empty when they did."""
    simulation, outcome, _ = simulate(DRIFTS["answers_longer"])
    assert sum(d.to_prefill != 0 for _, d in simulation.slow_decisions) == 2
    assert set(outcome.status.tolist()) <= {DONE, REFUSED}
    refused = outcome.status == REFUSED
    np.testing.assert_array_equal(outcome.end_s[refused], outcome.arrival_s[refused])
    assert not outcome.retries.any()
    assert not simulation.snapshot.inflight_requests.any()


def test_a_request_that_is_routed_again_is_no_new_demand():
    """Half the home nodes die under their requests, which go elsewhere: each counts once."""
    slow = SlowPlanner()
    requests = load(np.arange(40) / 10)
    lost = [NodesLost(2.0, "home", 0.5)]
    made = Simulation(two_regions(2, 2), requests, HomogeneousPd(ADMIT_ALL), lost, slow=slow).run()
    assert made.retries.sum() > 0
    assert len(slow._arrivals) == 40


def test_the_same_seed_is_the_same_run():
    """Decisions and outcome alike."""
    (first, a, _), (again, b, _) = simulate(DRIFTS["answers_shorter"]), simulate(DRIFTS["answers_shorter"])
    assert first.slow_decisions == again.slow_decisions
    np.testing.assert_array_equal(a.end_s, b.end_s)


def test_the_fast_policy_is_told_the_threshold_of_the_split_that_holds():
    """The last threshold that was news is the one that its controller starts from."""
    simulation, _, policy = simulate(DRIFTS["prompts_shorter"])
    told = [d.threshold_tokens for _, d in simulation.slow_decisions if d.threshold_tokens is not None]
    home = simulation.snapshot.region_names.index("pd")
    assert len(told) >= 2
    assert policy.controller(home).planned_tokens == told[-1]
    assert told[-1] < 0.6 * DRIFTS["prompts_shorter"].scenario.planned_threshold_tokens


def test_the_table_says_what_happened():
    """One row a drift, with the gain, the nodes that were converted and the split in the end."""
    made = drift.run(DRIFTS["prompts_shorter"], 0)
    other = dataclasses.replace(made, conversions=(0, 3), split=(0, 8), reversals=1)
    row = drift.table([drift.summary(DRIFTS["prompts_shorter"], [made, other])]).splitlines()[-1]
    assert "prompts get half as long, 1.6 times as many, for an hour" in row
    assert row.endswith("| 1 to 3 | 0 to 1 | 0 : 8, 2 : 6 |")


@pytest.mark.parametrize("name", sorted(DRIFTS))
def test_drifts_are_what_their_titles_say(name):
    """Outputs and prompts change with the event, not before."""
    each = DRIFTS[name]
    load = each.load(0)
    before, after = load.arrival_s < 120, (load.arrival_s >= 120) & (load.arrival_s < 360)
    factor = load.output_tokens[after].mean() / load.output_tokens[before].mean()
    assert factor == pytest.approx(each.output_factor, rel=0.01)
    shift = np.median(load.prompt_tokens[after]) / np.exp(9.9)
    assert shift == pytest.approx(np.exp(each.scenario.phases[-1].mu_shift), rel=0.15)
