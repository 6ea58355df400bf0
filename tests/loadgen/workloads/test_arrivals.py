"""Arrival times: rates, the shape of gaps, changes of the rate, ticks."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prfaas.common.errors import ConfigError
from prfaas.loadgen.workloads.arrivals import Load, RateCurve, SteadyRate, spread_ticks, tick_of

N = 50_000


def rng(seed=11):
    return np.random.Generator(np.random.PCG64(seed))


@st.composite
def curves(draw):
    steps = draw(st.integers(1, 6))
    widths = draw(st.lists(st.floats(0.1, 50), min_size=steps, max_size=steps))
    rates = draw(st.lists(st.one_of(st.just(0.0), st.floats(0.01, 20)), min_size=steps, max_size=steps))
    ends = draw(st.one_of(st.none(), st.lists(st.floats(0.01, 20), min_size=steps, max_size=steps)))
    starts = np.concatenate(([0.0], np.cumsum(widths)))
    if draw(st.booleans()):
        rates[0] = max(rates[0], 0.1)
        return RateCurve(starts[:-1], np.array(rates), float(starts[-1]), None if ends is None else np.array(ends))
    last = [1.5]
    return RateCurve(starts, np.array(rates + last), None, None if ends is None else np.array(ends + last))


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_rates_mean_and_the_shapes_spread(burstiness):
    """Mean gap 1/rate and coefficient of variation 1/√burstiness, as gamma gaps of that shape have."""
    gaps = np.diff(Load(SteadyRate(20.0), "gamma", burstiness).times(N, rng()), prepend=0.0)
    spread = 1 / math.sqrt(burstiness)
    assert gaps.mean() == pytest.approx(1 / 20, abs=5 * spread / 20 / math.sqrt(N))
    assert gaps.std() / gaps.mean() == pytest.approx(spread, rel=0.05)


def test_poisson_counts_vary_as_much_as_their_mean():
    """Of a Poisson process the number of arrivals in a window has equal mean and variance."""
    at = Load(SteadyRate(20.0)).times(N, rng())
    counts = np.bincount(at.astype(int))[:-1]
    assert counts.var() / counts.mean() == pytest.approx(1.0, abs=5 * math.sqrt(2 / counts.size))


def test_constant_arrivals_are_evenly_spaced_from_zero():
    """The k-th request of a constant pattern arrives at k / rate."""
    assert Load(SteadyRate(4.0), "constant").times(5, rng()).tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_an_infinite_rate_is_all_at_once():
    """As in vLLM, a rate of inf sends everything at time 0."""
    assert not Load(SteadyRate(math.inf)).times(100, rng()).any()


def test_a_closed_loop_has_no_times():
    """Without a rate no request has a time of its own."""
    assert np.isnan(Load(None, max_concurrency=3).times(10, rng())).all()


def test_a_share_of_the_rate_slows_the_process():
    """A quarter of the rate is the same process, four times as slow: conversations of four requests each."""
    whole, quarter = (Load(SteadyRate(8.0)).times(100, rng(), share) for share in (1.0, 0.25))
    assert quarter == pytest.approx(whole * 4)


@settings(deadline=None)
@given(curve=curves(), expected=st.lists(st.floats(0, 500), min_size=1, max_size=30).map(sorted))
def test_times_invert_the_integral_of_the_rate(curve, expected):
    """The integral of the rate up to the k-th time is the k-th sum, and times don't descend."""
    sums = np.array(expected)
    at = curve.times_of(sums)
    assert np.all(np.diff(at) >= -1e-9)
    assert [curve.expected(t) for t in at.tolist()] == pytest.approx(expected, rel=1e-6, abs=1e-6)


@settings(deadline=None)
@given(curve=curves(), until=st.floats(0, 500))
def test_the_integral_agrees_with_a_sum_of_small_steps(curve, until):
    """`expected` against a Riemann sum over the rate that the docstring defines, linear pieces and periods included."""
    t = (np.arange(20_000) + 0.5) * until / 20_000
    within = t if curve.period_s is None else np.mod(t, curve.period_s)
    k = np.searchsorted(curve.starts_s, within, side="right") - 1
    starts, edges = curve.starts_s, np.append(curve.starts_s[1:], curve.period_s or np.inf)
    ends = curve.requests_per_s if curve.ends_per_s is None else curve.ends_per_s
    part = np.where(np.isinf(edges[k]), 0.0, (within - starts[k]) / (edges[k] - starts[k]))
    rate = curve.requests_per_s[k] + (ends - curve.requests_per_s)[k] * part
    assert curve.expected(until) == pytest.approx(rate.mean() * until, rel=0.02, abs=0.1)


def test_nothing_arrives_while_the_rate_is_zero():
    """In a stretch of rate 0 there is no arrival, and the rate after it is met again."""
    curve = RateCurve(np.array([0.0, 10.0, 20.0]), np.array([50.0, 0.0, 50.0]))
    at = Load(curve).times(2000, rng())
    assert not np.any((at > 10.0) & (at < 20.0))
    assert np.count_nonzero(at <= 10.0) == pytest.approx(500, abs=5 * math.sqrt(500))
    assert np.count_nonzero((at >= 20.0) & (at <= 30.0)) == pytest.approx(500, abs=5 * math.sqrt(500))


def test_a_burst_multiplies_the_arrivals():
    """Four times the rate for a while is four times the requests in that while."""
    curve = RateCurve(np.array([0.0, 100.0, 200.0]), np.array([10.0, 40.0, 10.0]))
    at = Load(curve).times(8000, rng())
    counts = [np.count_nonzero((at >= a) & (at < a + 100)) for a in (0, 100, 200)]
    assert counts == pytest.approx([1000, 4000, 1000], abs=5 * math.sqrt(4000))


def test_a_curve_repeats_after_its_period():
    """A day's curve has the same expected arrivals every day."""
    curve = RateCurve(np.array([0.0, 6.0]), np.array([1.0, 9.0]), 10.0)
    assert curve.mean() == pytest.approx((6 + 36) / 10)
    assert curve.expected(36.0) - curve.expected(26.0) == pytest.approx(42.0)
    assert curve.times_of(np.array([42.0, 84.0 + 3.0])) == pytest.approx([10.0, 23.0])


def test_a_curve_made_faster_or_larger():
    """faster keeps the number of requests and shortens the time; scaled keeps the time."""
    curve = RateCurve(np.array([0.0, 6.0]), np.array([1.0, 9.0]), 10.0)
    assert curve.faster(2.0).expected(5.0) == pytest.approx(curve.expected(10.0))
    assert curve.scaled(3.0).expected(7.0) == pytest.approx(3 * curve.expected(7.0))


@pytest.mark.parametrize(
    ("starts", "rates", "period"),
    [
        ([], [], None),
        ([1.0], [2.0], None),
        ([0.0, 0.0], [2.0, 2.0], None),
        ([0.0, 5.0, 4.0], [2.0, 2.0, 2.0], None),
        ([0.0], [-1.0], None),
        ([0.0], [math.nan], None),
        ([0.0], [math.inf], None),
        ([0.0, 1.0], [5.0, 0.0], None),
        ([0.0, 10.0], [5.0, 5.0], 10.0),
        ([0.0, 5.0], [0.0, 0.0], 10.0),
    ],
)
def test_a_curve_that_is_none_is_refused(starts, rates, period):
    """Times that don't ascend from 0, rates below 0 or not finite, an end without arrivals, a period too short."""
    with pytest.raises(ConfigError):
        RateCurve(np.array(starts), np.array(rates), period)


@pytest.mark.parametrize(
    "load",
    [
        lambda: Load(None),
        lambda: Load(SteadyRate(0.0)),
        lambda: Load(SteadyRate(math.nan)),
        lambda: Load(SteadyRate(1.0), burstiness=0.0),
        lambda: Load(SteadyRate(1.0), burstiness=2.0),
        lambda: Load(SteadyRate(1.0), burstiness=math.inf),
        lambda: Load(SteadyRate(1.0), max_concurrency=0),
        lambda: Load(SteadyRate(1.0), until_s=0.0),
        lambda: Load(SteadyRate(1.0)).enough(),
        lambda: Load(SteadyRate(math.inf), until_s=5.0).enough(),
        lambda: Load(SteadyRate(1e9), until_s=1e6).enough(),
    ],
)
def test_a_load_that_is_none_is_refused(load):
    """A closed loop without users, rates and shapes of 0, durations of 0, and loads without an end."""
    with pytest.raises(ConfigError):
        load()


@pytest.mark.parametrize("burstiness", [0.2, 1.0])
def test_enough_requests_outlast_the_duration(burstiness):
    """`enough` requests reach beyond the duration under every one of 200 seeds, without being twice as many."""
    load = Load(SteadyRate(5.0), "gamma", burstiness, until_s=100.0)
    n = load.enough()
    assert 500 < n < 1000
    assert all(load.times(n, rng(seed))[-1] > 100.0 for seed in range(200))


def test_ticks_are_spread_within_themselves():
    """Every request stays within its tick, order is kept, and the places in the tick are uniform."""
    at = np.repeat(np.arange(0, 3000, 3.0), 20)
    spread = spread_ticks(at, 3.0, rng())
    assert np.all(np.diff(spread) >= 0)
    assert np.all((spread >= at) & (spread < at + 3.0))
    within = (spread - at) / 3.0
    assert within.mean() == pytest.approx(0.5, abs=5 / math.sqrt(12 * at.size))
    assert np.mean(within < 0.25) == pytest.approx(0.25, abs=5 * math.sqrt(0.19 / at.size))


def test_a_tick_ends_where_the_next_begins():
    """Ticks that come sooner than usual are not run over."""
    at = np.array([0.0] * 50 + [1.0] * 50 + [10.0] * 50)
    spread = spread_ticks(at, 3.0, rng())
    assert spread[:50].max() < 1.0
    assert spread[50:100].max() < 4.0
    assert spread[100:].min() >= 10.0


def test_ticks_are_recognised():
    """Times of which most are shared are ticks, as long as their median gap; fine ones are none."""
    assert tick_of(np.repeat([0.0, 3.0, 6.0, 9.0, 30.0], 7)) == 3.0
    assert tick_of(np.array([0.0, 0.1, 0.1, 0.4, 0.7, 0.9])) == 0.0
    assert tick_of(np.array([0.0, 0.0])) == 0.0
