"""The scenarios beyond the paper: the same requests for all sides, and what ours must reach."""

import dataclasses

import numpy as np
import pytest
from prfaas.loadgen.simulator import drift, trace_scenario
from prfaas.loadgen.simulator.compare import Given, Schedule, adaptive, compare, figures, scheduled, static
from prfaas.loadgen.simulator.results import document, summary
from prfaas.loadgen.simulator.scenarios import scenarios

EVENTS = {scenario.name: scenario for scenario in scenarios()}


def test_a_seed_is_the_same_load():
    """For every policy and every time; another seed is another."""
    first, again, other = (EVENTS["burst"].load(seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.arrival_s, again.arrival_s)
    np.testing.assert_array_equal(first.prompt_tokens, again.prompt_tokens)
    assert first.arrival_s.size != other.arrival_s.size or (first.arrival_s != other.arrival_s).any()


def test_phases_shape_the_load():
    """Four times as many requests in the burst; prompts about twice as long where they get longer."""
    burst, longer = EVENTS["burst"].load(0), EVENTS["longer"].load(0)
    inside = (burst.arrival_s >= 120) & (burst.arrival_s < 180)
    assert inside.sum() / 60 == pytest.approx(4 * EVENTS["burst"].steady_rate, rel=0.1)
    long = (longer.arrival_s >= 120) & (longer.arrival_s < 360)
    assert np.median(longer.prompt_tokens[long]) == pytest.approx(2 * np.exp(9.9), rel=0.2)


@pytest.mark.parametrize("name", ["link", "burst", "shorter", "prfaas_half", "home_half"])
def test_adaptive_is_as_good_as_the_best_static_threshold(name):
    """At least 0.98 of the best of these thresholds, chosen afterwards for each seed, in goodput in the window."""
    scenario = EVENTS[name]
    ours, best = 0.0, 0.0
    for seed in range(3):
        given = Given.of(scenario, seed)
        ours += figures(scenario, adaptive(given)).goodput
        planned = scenario.planned_threshold_tokens
        best += max(figures(scenario, static(given, planned * f)).goodput for f in (0.5, 0.7, 0.85, 1.0, 1.2, 1.4))
    assert ours >= 0.98 * best


def test_adaptive_is_near_a_clairvoyant():
    """At least 0.97 of the best schedule that a search finds which knows when the link falls and recovers."""
    made = compare(EVENTS["link"], 0)
    assert made.figures["adaptive"].goodput >= 0.97 * made.figures["clairvoyant"].goodput
    assert made.tried > 100


def test_a_schedule_that_never_changes_is_static():
    """The clairvoyant's schedules contain the static thresholds."""
    given = Given.of(EVENTS["link"], 1)
    a = figures(given.scenario, static(given, 19_000.0))
    assert figures(given.scenario, scheduled(given, Schedule((19_000.0,) * 3))) == a
    b = figures(given.scenario, scheduled(given, Schedule((19_000.0, 40_000.0, 19_000.0))))
    assert b != a


def test_comparison_of_a_trace():
    """On conversations: the clairvoyant is no worse than any side, and the page has a row and the gain over
    cache-blind routing."""
    trace = trace_scenario.synthetic(conversations=30)
    scenario = trace_scenario.scenario_of(trace, 0.9)
    assert len(scenario.instants_s) == 2
    assert scenario.window_s[0] == scenario.instants_s[0] < scenario.instants_s[1] < scenario.window_s[1]
    made = compare(scenario, 0)
    assert set(made.figures) == {"adaptive", "planned", "static", "clairvoyant", "cache_blind"}
    least = made.figures["clairvoyant"].goodput
    assert all(least >= made.figures[side].goodput for side in ("adaptive", "planned", "static"))
    row = summary(scenario, [made])
    assert row["over_clairvoyant"] <= 1.0
    assert row["gain_over_cache_blind"] is not None


def test_the_page(monkeypatch):
    """Says whether the bounds were held, and that the trace was not there."""
    scenario = dataclasses.replace(EVENTS["steady"])
    made = compare(scenario, 0)
    row = summary(scenario, [made, made])
    row["gain_over_planned"] = dict.fromkeys(row["gain_over_planned"], -1e-6)
    interval = {"mean": 1.0, "ci95_low": 0.9, "ci95_high": 1.1}
    paper = {"seeds": 1, "requests": 1, "objective": "-", "prfaas": {"planned_lambda_max": 1.0, "lambda_max": interval}}
    paper["prfaas"] |= {key: {"rate_per_s": 1.0} for key in ("at_own_0.8", "at_homogeneous_0.9")}
    keys = ("ratio_homogeneous", "ratio_naive", "ratio_static_homogeneous", "ratio_static_naive", "ttft_reduction")
    each = drift.drifts()[0]
    drifted = [drift.summary(each, [drift.run(each, 0)])]
    page = document([row], drifted, paper | dict.fromkeys(keys, interval), traces_given=False)
    assert f"| nothing happens | {scenario.steady_rate:.2f} | 2 |" in page
    assert "| +0.0 ± 0.0 % |" in page
    assert "runs at 0.9 and 1.1 of the Λ_max of a plan that is made from the trace itself" in page
    assert "synthetic conversations stand in" in page
    assert ": held." in page
    assert "| answers get twice as long for an hour | 1 |" in page
    row["over_static"] = 0.9
    assert ": not held." in document([row], drifted, paper | dict.fromkeys(keys, interval), traces_given=True)


def test_uncached_lengths_of_a_trace():
    """A later turn's are what it adds; they are planned with."""
    trace = trace_scenario.synthetic(conversations=20)
    sizes = trace_scenario.cache_sizes(EVENTS["link"].cluster.groups[0].profile, trace.block_tokens)
    uncached = trace_scenario.uncached_lengths(trace, trace.at_s.size, sizes)
    assert (uncached >= 1).all()
    assert (uncached <= trace.prompt_tokens).all()
    assert uncached.sum() < 0.9 * trace.prompt_tokens.sum()
