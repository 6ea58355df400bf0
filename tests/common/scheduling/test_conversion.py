"""Role conversions over time."""

from __future__ import annotations

from dataclasses import replace

import pytest
from prfaas.common.perfmodel.lengths import TruncatedLogNormal
from prfaas.common.perfmodel.links import LinkProfile
from prfaas.common.perfmodel.profiles import shipped
from prfaas.common.scheduling.conversion import (
    ConversionDecision,
    ConversionSettings,
    ConversionState,
    StageLoad,
    converted,
    cool_down_s,
    decide,
)
from prfaas.common.scheduling.planner import Demand, HomePool, OffloadPool

DEMAND = Demand(TruncatedLogNormal(9.90, 1.00, 128, 131072), 1024)
HOME = HomePool(shipped("paper-h20"), 8)
OFFLOAD = (OffloadPool(shipped("paper-h200"), 4, LinkProfile.of_gbps(100)),)
BUSY, IDLE = StageLoad(0.97, 8.0), StageLoad(0.4)
AT_ONCE = ConversionSettings(confirmations=1, cool_down_s=0.0)


def ask(
    n_prefill: int,
    settings: ConversionSettings = AT_ONCE,
    *,
    state: ConversionState = ConversionState(),  # noqa: B008
    now_s: float = 0.0,
    prefill: StageLoad = BUSY,
    decode: StageLoad = IDLE,
    home: HomePool = HOME,
) -> tuple[ConversionState, ConversionDecision]:
    return decide(state, now_s, DEMAND, home, OFFLOAD, n_prefill, prefill, decode, settings)


def test_nodes_go_to_the_stage_that_is_short_one_at_a_time() -> None:
    """3 : 5 is best. From 1 : 7 prefill gains a node, from 6 : 2 decode does; at 3 : 5 nothing moves."""
    assert ask(1)[1].to_prefill == 1
    assert ask(6, prefill=IDLE, decode=BUSY)[1].to_prefill == -1
    assert ask(3)[1] == replace(ask(3)[1], to_prefill=0, reason="balanced")


def test_more_nodes_a_time_go_no_further_than_the_best_split() -> None:
    """And the decision carries the plan, with its threshold, of the split that will hold."""
    _, decision = ask(1, replace(AT_ONCE, max_nodes=5))
    assert (decision.to_prefill, decision.reason) == (2, "convert")
    assert decision.plan is not None
    assert (decision.plan.n_prefill, decision.plan.threshold_tokens) == (3, 19_600)


def test_an_unneeded_conversion_is_not_made() -> None:
    """The stage that would gain isn't busy, or the other is busier."""
    assert ask(1, prefill=StageLoad(0.5))[1].reason == "not_needed"
    assert ask(1, decode=StageLoad(1.0, 20))[1].reason == "not_needed"
    assert ask(1, prefill=StageLoad(0.5, queue_s=6))[1].reason == "convert"


def test_a_small_gain_is_not_worth_it() -> None:
    _, decision = ask(2, replace(AT_ONCE, min_gain=0.5))
    assert (decision.reason, decision.to_prefill) == ("gain_too_small", 0)
    assert 0 < decision.gain < 0.5


def test_a_conversion_must_pay_for_the_time_in_neither_role() -> None:
    """A node that is away for 10 minutes pays within half an hour, not within a minute."""
    slow = replace(AT_ONCE, switch_s=600.0)
    assert ask(1, slow)[1].reason == "convert"
    _, decision = ask(1, replace(slow, horizon_s=60.0))
    assert (decision.reason, decision.to_prefill) == ("cost_too_high", 0)
    assert 60 * decision.gain < 600 / 8  # an eighth of the home region, for ten minutes


def test_plans_must_agree_several_times_in_a_row() -> None:
    """One plan that wants nothing starts the count anew."""
    settings = ConversionSettings(period_s=60, confirmations=3, cool_down_s=0)
    state, reasons = ConversionState(), []
    for minute, n_prefill in enumerate((1, 1, 3, 1, 1, 1)):
        state, decision = ask(n_prefill, settings, state=state, now_s=60.0 * minute)
        reasons.append(decision.reason)
    assert reasons == ["confirming", "confirming", "balanced", "confirming", "confirming", "convert"]


def test_a_change_of_direction_starts_the_count_anew() -> None:
    settings = ConversionSettings(period_s=60, confirmations=2, cool_down_s=0)
    state, _ = ask(1, settings)
    state, decision = ask(6, settings, state=state, now_s=60, prefill=IDLE, decode=BUSY)
    assert decision.reason == "confirming"


def test_between_two_conversions_it_cools_down() -> None:
    settings = ConversionSettings(period_s=60, confirmations=1, cool_down_s=180)
    state, reasons = ConversionState(), []
    for minute in range(5):
        state, decision = ask(1, settings, state=state, now_s=60.0 * minute)
        reasons.append(decision.reason)
    assert reasons == ["convert", "cooling_down", "cooling_down", "convert", "cooling_down"]


def test_it_plans_once_a_period() -> None:
    """In between nothing is computed and the state stays."""
    state, _ = ask(1)
    again, decision = ask(1, state=state, now_s=59.9)
    assert (again, decision) == (state, ConversionDecision(0, "not_due"))


def test_a_load_that_swings_around_the_best_split_moves_nothing() -> None:
    """Half an hour of plans that alternate between wanting more and fewer: no conversion at all."""
    settings = ConversionSettings(period_s=60, confirmations=2)
    state = ConversionState()
    for minute in range(30):
        up = minute % 2 == 0
        state, decision = ask(
            2 if up else 4,
            settings,
            state=state,
            now_s=60.0 * minute,
            prefill=BUSY if up else IDLE,
            decode=IDLE if up else BUSY,
        )
        assert decision.to_prefill == 0


def test_a_split_that_serves_nothing_is_left_at_once() -> None:
    """All nodes prefill: any decode node is an endless gain."""
    _, decision = ask(8, prefill=IDLE, decode=BUSY)
    assert (decision.to_prefill, decision.reason) == (-1, "convert")


@pytest.mark.parametrize(
    "wrong", [{"period_s": -1}, {"confirmations": 0}, {"max_nodes": 0}, {"horizon_s": float("nan")}]
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ConversionSettings(**wrong)  # type: ignore[arg-type]


def test_to_undo_a_conversion_takes_longer_each_time_up_to_the_horizon() -> None:
    """In the same direction it stays the cool-down; a split that lasted for twice that is trusted anew."""
    settings = replace(AT_ONCE, cool_down_s=300.0, horizon_s=1800.0)
    state, waits, now_s = ConversionState(), [], 0.0
    for direction in (1, 1, -1, 1, -1, 1):
        waits.append(cool_down_s(state, direction, settings))
        now_s += waits[-1]
        state = converted(state, now_s, direction, settings)
    assert waits == [300, 300, 600, 1200, 1800, 1800]
    assert cool_down_s(state, 1, settings) == 300
    later = converted(state, now_s + 3600.0, -1, settings)
    assert cool_down_s(later, 1, settings) == 1200


def test_an_undoing_waits_and_says_so() -> None:
    """From 1 : 7 a node has come to prefill; back again it may not go so soon."""
    settings = replace(AT_ONCE, cool_down_s=100.0, period_s=0.0)
    state, decision = ask(1, settings, now_s=1000.0)
    assert decision.reason == "convert"
    for now_s, reason in ((1100.0, "cooling_down"), (1199.0, "cooling_down"), (1200.0, "convert")):
        asked = ask(6, settings, state=state, now_s=now_s, prefill=IDLE, decode=BUSY)[1]
        assert (asked.reason, asked.wanted) == (reason, -1)
    assert ask(2, settings, state=state, now_s=1100.0)[1].reason == "convert"
