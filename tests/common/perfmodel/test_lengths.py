"""Length distributions against numeric integration and against counting."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prfaas.common.perfmodel.lengths import Empirical, TruncatedLogNormal, fixed, sample_of, uniform

PAPER = TruncatedLogNormal(9.90, 1.00, 128, 131072)


def test_the_papers_lengths_have_the_papers_mean_and_share() -> None:
    """Mean ≈ 27K; at 19.4K half the requests lie above, with a mean of ≈ 44K."""
    assert PAPER.mean() == pytest.approx(27_500, rel=0.01)
    assert float(PAPER.share_above(19_400)) == pytest.approx(0.496, abs=0.001)
    assert float(PAPER.means(19_400).above) == pytest.approx(45_000, rel=0.01)


@given(
    st.floats(2, 12),
    st.floats(0.05, 2.5),
    st.floats(0.02, 0.98),
)
def test_the_closed_form_equals_a_sum_over_small_steps(mu: float, sigma: float, place: float) -> None:
    """Share above, and means above and below, of a log-normal that is cut on both sides."""
    low, high = float(np.exp(mu - 2 * sigma)), float(np.exp(mu + 1.5 * sigma))
    lengths = TruncatedLogNormal(mu, sigma, low, high)
    z = np.linspace(-2, 1.5, 40_001)
    z = (z[1:] + z[:-1]) / 2
    weight, x = np.exp(-z * z / 2), np.exp(mu + sigma * z)
    t = float(np.quantile(x, place))
    above = x > t
    assert float(lengths.share_above(t)) == pytest.approx(weight[above].sum() / weight.sum(), abs=1e-3)
    assert float(lengths.means(t).above) == pytest.approx((weight * x)[above].sum() / weight[above].sum(), rel=2e-3)
    assert float(lengths.means(t).below) == pytest.approx((weight * x)[~above].sum() / weight[~above].sum(), rel=2e-3)


@pytest.mark.parametrize("lengths", [PAPER, uniform(1, 9000), Empirical(np.array([5, 5, 9, 30.0]))])
def test_the_two_sides_make_the_whole(lengths: Empirical | TruncatedLogNormal) -> None:
    """p · E[f | above] + (1 − p) · E[f | below] = E[f], for lengths and for their squares."""
    for function in (lambda x: x, np.square):
        for q in (0.1, 0.5, 0.8):
            t = lengths.quantile(q)
            p = float(lengths.share_above(t))
            halves = lengths.means_of(function, t)
            whole = p * np.nan_to_num(halves.above) + (1 - p) * np.nan_to_num(halves.below)
            assert whole == pytest.approx(lengths.mean_of(function), rel=1e-3)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=40), st.integers(-5, 1100))
def test_measured_lengths_are_counted(sample: list[int], threshold: int) -> None:
    lengths = sample_of(sample)
    above, below = [x for x in sample if x > threshold], [x for x in sample if x <= threshold]
    assert float(lengths.share_above(threshold)) == pytest.approx(len(above) / len(sample))
    halves = lengths.means(threshold)
    for side, mean in ((above, halves.above), (below, halves.below)):
        assert float(mean) == pytest.approx(np.mean(side)) if side else np.isnan(mean)
    assert lengths.mean() == pytest.approx(np.mean(sample))
    assert (float(lengths.share_above(-1)), float(lengths.share_above(np.inf))) == (1, 0)


def test_a_histogram_counts_as_its_sample() -> None:
    histogram, sample = Empirical(np.array([10, 20.0]), np.array([3, 1.0])), sample_of([10, 10, 10, 20])
    assert histogram.mean() == sample.mean() == 12.5
    assert [histogram.quantile(q) for q in (0, 0.75, 0.76, 1)] == [10, 10, 20, 20]


@pytest.mark.parametrize("lengths", [PAPER, Empirical(np.array([5, 5, 9, 30.0]))])
def test_a_scaled_distribution_has_scaled_means_and_quantiles(lengths: Empirical | TruncatedLogNormal) -> None:
    longer = lengths.scaled(1.5)
    assert longer.mean() == pytest.approx(1.5 * lengths.mean())
    assert longer.quantile(0.7) == pytest.approx(1.5 * lengths.quantile(0.7))
    assert float(longer.share_above(15)) == pytest.approx(float(lengths.share_above(10)))


def test_quantiles_invert_the_share() -> None:
    for q in (0.01, 0.5, 0.9):
        assert float(PAPER.share_above(PAPER.quantile(q))) == pytest.approx(1 - q, abs=1e-9)
    assert (PAPER.quantile(0), PAPER.quantile(1)) == (128, 131072)


def test_nothing_on_one_side_has_no_mean() -> None:
    assert np.isnan(fixed(100).means(100).above)
    assert np.isnan(fixed(100).means(99).below)
    assert float(PAPER.share_above(1e9)) == 0
    assert np.isnan(PAPER.means(1).below)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: sample_of([3, -1]), "length 2 is -1"),
        (lambda: sample_of([]), "1 to"),
        (lambda: Empirical(np.array([1.0]), np.array([0.0])), "all 0"),
        (lambda: Empirical(np.array([1.0]), np.array([-1.0])), "at least 0"),
        (lambda: TruncatedLogNormal(9, 0, 1, 2), "sigma above 0"),
        (lambda: TruncatedLogNormal(9, 1, 5, 5), "0 < low < high"),
        (lambda: TruncatedLogNormal(9, 0.1, 1, 2), "nothing between 1 and 2"),
        (lambda: uniform(9, 3), "must not be above"),
    ],
)
def test_what_is_no_distribution_is_refused(make: object, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make()  # type: ignore[operator]
