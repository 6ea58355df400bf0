"""How the threshold and the price move."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prfaas.common.perfmodel.profiles import shipped
from prfaas.common.scheduling.threshold import Observed, ThresholdController, ThresholdSettings, observe
from prfaas.common.scheduling.types import ROLE_DECODE, ROLE_PREFILL, ClusterSnapshot, LinkColumns

QUIET = Observed(0.0, 0.0, 0.0, 0.1)
AWAY_BEHIND = Observed(0.0, 4.0, 0.0, 0.1)
HOME_BEHIND = Observed(4.0, 0.0, 0.0, 0.1)
LINK_FULL = Observed(0.0, 0.0, 5.0, 1.0)


def controller(**settings):
    return ThresholdController(10_000.0, ThresholdSettings(**settings))


@pytest.mark.parametrize(
    ("observed", "expected"),
    [
        (QUIET, 10_000),
        (AWAY_BEHIND, 11_000),
        (LINK_FULL, 11_000),
        (HOME_BEHIND, 10_000 / 1.1),
        (Observed(0.0, 0.0, 5.0, 0.5), 10_000),  # a backlog that passes at ease
        (Observed(9.0, 9.0, 9.0, 1.0), 10_000),  # all behind alike
        (Observed(math.inf, 0.0, 0.0, 0.0), 10_000 / 1.1),  # no home prefill node is left
        (Observed(0.0, math.inf, 0.0, 0.0), 11_000),  # no offload node
        (Observed(math.inf, math.inf, 0.0, 0.0), 10_000),
    ],
)
def test_direction(observed, expected):
    """Up when the offload side or its link is behind, down when the home nodes are, else where it was planned."""
    assert controller().update(observed, 0.0) == pytest.approx(expected)


def test_once_a_period():
    """Called more often, it moves no faster."""
    control = controller(period_s=1.0)
    for k in range(31):
        control.update(AWAY_BEHIND, k / 10)
    assert control.threshold_tokens == pytest.approx(10_000 * 1.1**4)


def test_hysteresis():
    """A side that counts as behind does so until it is nearly level; one that doesn't yet doesn't begin there."""
    control = controller(behind_s=3.0, level_s=1.5)
    between = Observed(0.0, 2.0, 0.0, 0.1)
    control.update(between, 0.0)
    assert control.direction == 0
    control.update(AWAY_BEHIND, 1.0)
    control.update(between, 2.0)
    assert control.direction == 1
    control.update(Observed(0.0, 1.0, 0.0, 0.1), 3.0)
    assert control.direction == 0


@pytest.mark.parametrize("observed", [AWAY_BEHIND, HOME_BEHIND])
def test_it_goes_back_to_the_plan(observed):
    """After the event, in small steps, and not past it."""
    control = controller()
    for k in range(10):
        control.update(observed, float(k))
    assert control.threshold_tokens != 10_000
    for k in range(10, 60):
        control.update(QUIET, float(k))
    assert control.threshold_tokens == 10_000


def test_a_new_plan():
    """The slow planner's next result takes effect at once."""
    control = controller()
    control.update(AWAY_BEHIND, 0.0)
    control.plan(5_000.0)
    assert control.threshold_tokens == 5_000
    assert control.update(QUIET, 1.0) == 5_000


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(*(st.floats(0, 100) | st.just(math.inf) for _ in range(2)), st.floats(0, 100), st.floats(0, 1)),
        max_size=80,
    )
)
def test_bounds(observations):
    """Whatever is seen: within its bounds, and the price within its own."""
    control = controller(min_tokens=2_000.0, max_tokens=50_000.0)
    for k, each in enumerate(observations):
        assert 2_000 <= control.update(Observed(*each), float(k)) <= 50_000
        assert control.settings.idle_price <= control.price <= control.settings.full_price


def test_price_follows_the_waits():
    """Idle price while nobody waits; the full price when both sides wait long; back again."""
    control = controller()
    control.update(QUIET, 0.0)
    assert control.price == control.settings.idle_price
    for k in range(1, 60):
        control.update(Observed(5.0, 5.0, 0.0, 0.1), float(k))
    assert control.price == control.settings.full_price
    for k in range(60, 150):
        control.update(QUIET, float(k))
    assert control.price == pytest.approx(control.settings.idle_price, abs=1e-3)


def test_infinite_plan():
    """No threshold at all, or none that ends, stays within the bounds."""
    assert ThresholdController(math.inf).threshold_tokens == ThresholdSettings().max_tokens
    assert ThresholdController(0.0).threshold_tokens == ThresholdSettings().min_tokens
    with pytest.raises(ValueError, match="planned_tokens"):
        ThresholdController(float("nan"))


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ({"period_s": 0.0}, "period_s = 0.0 must be above 0"),
        ({"step": 1.0}, "step = 1.0"),
        ({"level_s": 9.0}, "level_s = 9.0 must be from 0 to behind_s"),
        ({"min_tokens": 0.0}, "min_tokens"),
        ({"full_price": 0.5}, "idle_price"),
    ],
)
def test_settings_that_cant_be(setting, match):
    """One line that names the setting and what it may be."""
    with pytest.raises(ValueError, match=match):
        ThresholdSettings(**setting)


def test_observe():
    """Mean backlog of usable nodes on each side; the link with the least backlog; inf where there are no nodes."""
    links = LinkColumns.none(2)
    links.bandwidth_bytes_per_s[1, 0] = 10.0
    links.queued_bytes[1, 0] = 25.0
    links.utilisation[1, 0] = 0.7
    role = np.array([ROLE_DECODE, ROLE_PREFILL, ROLE_PREFILL, ROLE_PREFILL, ROLE_PREFILL], np.int8)
    snapshot = ClusterSnapshot(
        names=["a", "b", "c", "d", "e"],
        region=np.array([0, 0, 0, 0, 1], np.int32),
        region_names=["home", "away"],
        role=role,
        usable=np.array([True, True, True, False, True]),
        profile=np.zeros(5, np.int32),
        profiles=[shipped("paper-h20")],
        prefill_free_at_s=np.array([0.0, 9.0, 13.0, 99.0, 3.0]),
        links=links,
        now_s=8.0,
    )
    assert observe(snapshot, 0) == Observed(3.0, 0.0, 2.5, 0.7)
    assert observe(snapshot, 1) == Observed(0.0, math.inf, 0.0, 0.0)
