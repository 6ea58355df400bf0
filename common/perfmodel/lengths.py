"""Distributions of lengths, cut in two by a threshold: the share above, means on both sides, expectations of functions.

Everything takes an array of thresholds at once, since the planner tries some thousand. A length equal to the threshold
lies below it (the rule of the paper: l > t is offloaded). Where nothing lies on one side, its mean is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

ATOMS = 4096
"""Points that stand for a continuous distribution in expectations of functions."""
MAX_LENGTH_TOKENS = 1 << 30
MAX_SAMPLES = 1 << 26

_erf = np.frompyfunc(math.erf, 1, 1)
_NORMAL = NormalDist()


class Halves(NamedTuple):
    """Of one quantity at each threshold: its mean among lengths above, and among the others. [thresholds]"""

    above: Floats
    below: Floats


class LengthDistribution(Protocol):
    """Lengths in tokens within [low, high]."""

    @property
    def low(self) -> float: ...

    @property
    def high(self) -> float: ...

    def share_above(self, thresholds: ArrayLike) -> Floats:
        """P(L > t) at each threshold: the paper's p."""
        ...

    def means(self, thresholds: ArrayLike) -> Halves:
        """E[L | L > t] and E[L | L ≤ t]: the paper's l_long and l_short."""
        ...

    def means_of(self, function: Callable[[Floats], Floats], thresholds: ArrayLike) -> Halves:
        """E[f(L) | L > t] and E[f(L) | L ≤ t]; `function` takes an array of lengths, NaN among them."""
        ...

    def mean(self) -> float:
        """E[L]"""
        ...

    def mean_of(self, function: Callable[[Floats], Floats]) -> float:
        """E[f(L)]"""
        ...

    def quantile(self, q: float) -> float:
        """The length below which the share q of all lies, 0 ≤ q ≤ 1."""
        ...

    def scaled(self, factor: float) -> LengthDistribution:
        """Every length times `factor`, which is above 0."""
        ...


@dataclass(frozen=True)
class Empirical:
    """Measured lengths: a sample, or a histogram by `weights` (each length with its count; they need not sum to 1).

    Raises ValueError for none or too many, lengths that are negative, not finite or too long, weights that are negative
    or all zero.
    """

    lengths: Floats
    weights: Floats | None = None
    _shares: Floats = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        lengths = np.asarray(self.lengths, np.float64)
        if lengths.ndim != 1 or not 1 <= lengths.size <= MAX_SAMPLES:
            raise ValueError(f"there must be 1 to {MAX_SAMPLES} lengths in one list")
        wrong = np.flatnonzero(~((lengths >= 0) & (lengths <= MAX_LENGTH_TOKENS)))
        if wrong.size:
            raise ValueError(
                f"length {wrong[0] + 1} is {lengths[wrong[0]]:g}; it must be from 0 to {MAX_LENGTH_TOKENS}"
            )
        weights = np.ones(lengths.size) if self.weights is None else np.asarray(self.weights, np.float64)
        if weights.shape != lengths.shape or not np.isfinite(weights).all() or (weights < 0).any():
            raise ValueError("there must be one weight a length, finite and at least 0")
        if weights.sum() <= 0:
            raise ValueError("the weights are all 0")
        values, index = np.unique(lengths, return_inverse=True)
        object.__setattr__(self, "lengths", values)
        object.__setattr__(self, "weights", None)
        object.__setattr__(self, "_shares", np.bincount(index, weights) / weights.sum())

    @property
    def low(self) -> float:
        return float(self.lengths[0])

    @property
    def high(self) -> float:
        return float(self.lengths[-1])

    def share_above(self, thresholds: ArrayLike) -> Floats:
        # Exactly 1 below all lengths and 0 above them, whatever the rounding: a planner divides by p and 1 − p.
        share: Floats = self._from(self._shares, thresholds) / self._from(self._shares, -1.0)
        return share

    def means(self, thresholds: ArrayLike) -> Halves:
        return self.means_of(lambda x: x, thresholds)

    def means_of(self, function: Callable[[Floats], Floats], thresholds: ArrayLike) -> Halves:
        weighted = self._shares * function(self.lengths)
        below, share_below = self._up_to(weighted, thresholds), self._up_to(self._shares, thresholds)
        # Sums from the top: the difference from the total would lose the digits of a thin upper end.
        above, share_above = self._from(weighted, thresholds), self._from(self._shares, thresholds)
        return Halves(_ratio(above, share_above), _ratio(below, share_below))

    def mean(self) -> float:
        return float(self._shares @ self.lengths)

    def mean_of(self, function: Callable[[Floats], Floats]) -> float:
        return float(self._shares @ function(self.lengths))

    def quantile(self, q: float) -> float:
        index = np.searchsorted(np.cumsum(self._shares), q * (1 - 1e-12))
        return float(self.lengths[min(int(index), self.lengths.size - 1)])

    def scaled(self, factor: float) -> Empirical:
        return Empirical(self.lengths * factor, self._shares)

    def _up_to(self, values: Floats, thresholds: ArrayLike) -> Floats:
        sums = np.r_[0.0, np.cumsum(values)]
        result: Floats = sums[np.searchsorted(self.lengths, thresholds, side="right")]
        return result

    def _from(self, values: Floats, thresholds: ArrayLike) -> Floats:
        sums = np.r_[np.cumsum(values[::-1])[::-1], 0.0]
        result: Floats = sums[np.searchsorted(self.lengths, thresholds, side="right")]
        return result


@dataclass(frozen=True)
class TruncatedLogNormal:
    """exp(N(mu, sigma²)) given that it lies in [low, high]; the paper: 9.90, 1.00, 128, 131,072.

    Shares and means are in closed form: E[Lᵏ; a < L < b] = exp(kμ + k²σ²/2) · (Φ((ln b − μ)/σ − kσ) − Φ((ln a − μ)/σ −
    kσ)). Expectations of other functions sum over 4,096 equally likely parts of it, each at its own mean.
    Raises ValueError for sigma ≤ 0 or bounds that don't hold 0 < low < high, or that leave nothing.
    """

    mu: float
    sigma: float
    low: float
    high: float
    _atoms: Empirical = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mu) and math.isfinite(self.sigma) and self.sigma > 0):
            raise ValueError(f"mu = {self.mu}, sigma = {self.sigma}: they must be finite, and sigma above 0")
        if not 0 < self.low < self.high <= MAX_LENGTH_TOKENS:
            raise ValueError(f"bounds {self.low:g} to {self.high:g} must hold 0 < low < high ≤ {MAX_LENGTH_TOKENS}")
        if self._mass(self.low, self.high, 0) < 1e-9:
            raise ValueError(f"the log-normal has nothing between {self.low:g} and {self.high:g}")
        edges = np.array([self.quantile(q) for q in np.linspace(0, 1, ATOMS + 1)])
        edges[0], edges[-1] = self.low, self.high
        mass = self._mass(edges[:-1], edges[1:], 0)
        means = np.clip(_ratio(self._mass(edges[:-1], edges[1:], 1), mass), edges[:-1], edges[1:])
        object.__setattr__(self, "_atoms", Empirical(means, mass))

    def share_above(self, thresholds: ArrayLike) -> Floats:
        t = self._clipped(thresholds)
        return np.asarray(self._mass(t, self.high, 0) / self._mass(self.low, self.high, 0))

    def means(self, thresholds: ArrayLike) -> Halves:
        t = self._clipped(thresholds)
        above = _ratio(self._mass(t, self.high, 1), self._mass(t, self.high, 0))
        return Halves(above, _ratio(self._mass(self.low, t, 1), self._mass(self.low, t, 0)))

    def means_of(self, function: Callable[[Floats], Floats], thresholds: ArrayLike) -> Halves:
        halves, means = self._atoms.means_of(function, thresholds), self.means(thresholds)
        # A threshold between the end and the outermost of the 4,096 parts leaves a sliver: it counts as one length.
        return Halves(*(np.where(np.isnan(of), function(mean), of) for of, mean in zip(halves, means, strict=True)))

    def mean(self) -> float:
        return float(self._mass(self.low, self.high, 1) / self._mass(self.low, self.high, 0))

    def mean_of(self, function: Callable[[Floats], Floats]) -> float:
        return self._atoms.mean_of(function)

    def quantile(self, q: float) -> float:
        bottom, top = (_NORMAL.cdf((math.log(x) - self.mu) / self.sigma) for x in (self.low, self.high))
        inner = min(max(bottom + q * (top - bottom), 1e-300), 1 - 1e-16)
        return min(max(math.exp(self.mu + self.sigma * _NORMAL.inv_cdf(inner)), self.low), self.high)

    def scaled(self, factor: float) -> TruncatedLogNormal:
        return TruncatedLogNormal(self.mu + math.log(factor), self.sigma, self.low * factor, self.high * factor)

    def _mass(self, a: ArrayLike, b: ArrayLike, k: int) -> Floats:
        """E[Lᵏ; a < L < b], without the truncation's norm."""
        scale = math.exp(k * self.mu + k * k * self.sigma**2 / 2)
        upper, lower = ((np.log(x) - self.mu) / self.sigma - k * self.sigma for x in (b, a))
        return np.asarray(scale * np.maximum(_phi(upper) - _phi(lower), 0.0))

    def _clipped(self, thresholds: ArrayLike) -> Floats:
        return np.clip(np.asarray(thresholds, np.float64), self.low, self.high)


def fixed(length: float) -> Empirical:
    """Every request has this length."""
    return Empirical(np.array([length], np.float64))


def uniform(low: int, high: int) -> Empirical:
    """Whole numbers from low to high, equally likely; more than 4,096 of them are thinned out evenly.
    Raises ValueError when high < low."""
    if high < low:
        raise ValueError(f"lengths from {low} to {high}: the first must not be above the second")
    return Empirical(np.linspace(low, high, min(high - low + 1, ATOMS)))


def sample_of(lengths: Sequence[int] | NDArray[np.integer]) -> Empirical:
    """Measured lengths, one a request."""
    return Empirical(np.asarray(lengths, np.float64))


def _phi(x: ArrayLike) -> Floats:
    """The standard normal's distribution function."""
    return 0.5 * (1.0 + np.asarray(_erf(np.asarray(x, np.float64) / math.sqrt(2.0)), np.float64))


def _ratio(sums: Floats, shares: Floats) -> Floats:
    """NaN where there is nothing."""
    sums, shares = np.asarray(sums, np.float64), np.asarray(shares, np.float64)
    means: Floats = np.divide(sums, shares, out=np.full(shares.shape, np.nan), where=shares > 1e-12)
    return means
