"""Distributions of lengths: means against closed forms, bounds, coupling, and refusals."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prfaas.common.errors import ConfigError
from prfaas.loadgen.workloads.length_specs import parse_lengths
from prfaas.loadgen.workloads.lengths import (
    MAX_LENGTH_TOKENS,
    PAPER_INPUT_LENGTHS,
    Empirical,
    Fixed,
    TruncatedLogNormal,
    Uniform,
)

N = 100_000
DISTRIBUTIONS = [
    Fixed(512),
    Uniform(100, 900),
    Uniform(1, 2),
    PAPER_INPUT_LENGTHS,
    TruncatedLogNormal(5.0, 2.0, 400, 500),
    TruncatedLogNormal(3.0, 0.5, 60, 5000),
    Empirical(np.array([5, 1, 1, 1000])),
]


def rng(seed=7):
    return np.random.Generator(np.random.PCG64(seed))


@pytest.mark.parametrize("lengths", DISTRIBUTIONS, ids=repr)
def test_the_sample_mean_is_the_mean(lengths):
    """The mean of many lengths lies within five standard errors of `mean()` (and the half token of rounding)."""
    drawn = lengths.sample(N, rng())
    assert abs(drawn.mean() - lengths.mean()) <= 5 * drawn.std() / math.sqrt(N) + 0.5 * (drawn.std() > 0)


@pytest.mark.parametrize("lengths", DISTRIBUTIONS, ids=repr)
def test_lengths_stay_within_their_bounds(lengths):
    """Every length is a whole number from low to high, and both ends of a narrow range are met."""
    drawn = lengths.sample(N, rng())
    assert drawn.dtype == np.int64
    assert lengths.low <= drawn.min()
    assert drawn.max() <= lengths.high
    if lengths.high - lengths.low < 200:
        assert (drawn.min(), drawn.max()) == (lengths.low, lengths.high)


def test_the_papers_mean_is_about_27k():
    """The paper gives a mean of about 27K for its distribution; the integral of the density agrees to 1e-6."""
    d = PAPER_INPUT_LENGTHS
    x = np.exp(np.linspace(math.log(d.low), math.log(d.high), 200_001))
    weight = np.exp(-((np.log(x) - d.mu) ** 2) / (2 * d.sigma**2))
    assert d.mean() == pytest.approx(np.trapezoid(weight * x, np.log(x)) / np.trapezoid(weight, np.log(x)), rel=1e-6)
    assert 26_500 < d.mean() < 28_000


@pytest.mark.parametrize("q", [0.01, 0.25, 0.5, 0.9, 0.999])
def test_the_log_normal_has_its_quantiles(q):
    """The share of lengths below the q-quantile of the truncated distribution is q, not only their mean right."""
    from statistics import NormalDist

    d, normal = PAPER_INPUT_LENGTHS, NormalDist()
    a, b = (normal.cdf((math.log(x) - d.mu) / d.sigma) for x in (d.low, d.high))
    quantile = math.exp(d.mu + d.sigma * normal.inv_cdf(a + q * (b - a)))
    assert np.mean(d.sample(N, rng()) <= quantile) == pytest.approx(q, abs=5 * math.sqrt(q * (1 - q) / N))


@pytest.mark.parametrize("lengths", DISTRIBUTIONS, ids=repr)
def test_a_longer_sample_begins_with_the_shorter(lengths):
    """Under one seed 1,000 lengths are the first of 2,000, and all distributions take as many numbers of the stream."""
    one, two = rng(), rng()
    assert lengths.sample(1000, one).tolist() == lengths.sample(2000, two)[:1000].tolist()
    two = rng()
    Fixed(1).sample(1000, two)
    assert one.random() == two.random()


@settings(deadline=None)
@given(
    mu=st.floats(0, 14),
    sigma=st.floats(0.01, 5),
    low=st.integers(1, 1 << 20),
    more=st.integers(0, 1 << 20),
)
def test_any_log_normal_is_sampled_within_bounds_or_refused(mu, sigma, low, more):
    """Whatever the parameters: lengths within the bounds with a mean between them, or one clear refusal."""
    below, above = ((math.log(bound) - mu) / sigma for bound in (low, low + more))
    if below > 8 or above < -8:
        with pytest.raises(ConfigError, match="next to nothing"):
            TruncatedLogNormal(mu, sigma, low, low + more)
        return
    d = TruncatedLogNormal(mu, sigma, low, low + more)
    drawn = d.sample(100, rng())
    assert low <= drawn.min() <= drawn.max() <= low + more
    assert low * (1 - 1e-9) <= d.mean() <= (low + more) * (1 + 1e-9)


def test_the_range_ratio_is_vllms():
    """`--random-range-ratio` r is uniform over N × (1 ± r), outwards to whole tokens, never below 1."""
    assert Uniform.around(1000, 0.5) == Uniform(500, 1500)
    assert Uniform.around(3, 0.5) == Uniform(1, 5)
    assert Uniform.around(1, 0.9) == Uniform(1, 2)


@pytest.mark.parametrize(
    "text",
    [
        "0",
        "-4",
        "x",
        "",
        "uniform:3",
        "uniform:9:3",
        "uniform:0:3",
        "lognormal:1:2",
        "lognormal:9.9:0:128:131072",
        "lognormal:nan:1:128:131072",
        "lognormal:9.9:1:131072:128",
        "lognormal:100:0.1:128:131072",
        f"{MAX_LENGTH_TOKENS + 1}",
        "empirical:",
        "empirical:/no/such/file",
        "weibull:1:2",
    ],
)
def test_a_wrong_distribution_is_refused(text):
    """What is no distribution raises ConfigError with one line that isn't a traceback's."""
    with pytest.raises(ConfigError) as raised:
        parse_lengths(text, Fixed(1))
    assert len(raised.value.problems) == 1
    assert "\n" not in raised.value.problems[0]


def test_distributions_from_text(tmp_path):
    """Each form of the grammar gives its distribution; thousands may have commas."""
    file = tmp_path / "lengths.txt"
    file.write_text("10\n20\n\n20\n")
    assert parse_lengths("1,024", Fixed(1)) == Fixed(1024)
    assert parse_lengths("uniform:128:4096", Fixed(1)) == Uniform(128, 4096)
    assert parse_lengths("lognormal:9.90:1.00:128:131072", Fixed(1)) == PAPER_INPUT_LENGTHS
    assert parse_lengths("paper", PAPER_INPUT_LENGTHS) is PAPER_INPUT_LENGTHS
    read = parse_lengths(f"empirical:{file}", Fixed(1))
    assert isinstance(read, Empirical)
    assert read.values.tolist() == [10, 20, 20]


@pytest.mark.parametrize(
    ("line", "says"), [("12a", "'12a'"), ("-3", "-3"), ("0", "0"), ("9" * 70, "longer than 64 bytes")]
)
def test_a_broken_line_of_lengths_is_named(tmp_path, line, says):
    """The error names the file, the line and what stands there."""
    file = tmp_path / "lengths.txt"
    file.write_text(f"10\n20\n{line}\n")
    with pytest.raises(ConfigError) as raised:
        parse_lengths(f"empirical:{file}", Fixed(1))
    assert f"{file} line 3" in raised.value.problems[0]
    assert says in raised.value.problems[0]
