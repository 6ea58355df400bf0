"""When requests arrive: a renewal process in unit time, stretched by the rate.

Gaps of mean 1 are drawn, and the k-th request arrives when the expected number of arrivals, the integral of the rate,
reaches the sum of the first k gaps (time change; with exponential gaps an inhomogeneous Poisson process by inversion).
So a change of the rate keeps the requests, their order and the shape of the gaps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from prfaas.common.errors import ConfigError

MAX_RATE_STEPS = 1_000_000
MAX_CONCURRENCY = 1_000_000
MAX_EXPECTED = 5_000_000
Gaps = Literal["poisson", "gamma", "constant"]


class Rate(Protocol):
    """Requests a second as a function of time since the beginning."""

    def mean(self) -> float: ...

    def expected(self, until_s: float) -> float:
        """The integral of the rate from 0 to `until_s`."""
        ...

    def times_of(self, expected: NDArray[np.float64]) -> NDArray[np.float64]:
        """The instants, in seconds, at which the integral of the rate reaches `expected` (not descending)."""
        ...


@dataclass(frozen=True, slots=True)
class SteadyRate:
    """`requests_per_s` infinite: all at once, at 0."""

    requests_per_s: float

    def __post_init__(self) -> None:
        if not self.requests_per_s > 0:
            raise ConfigError([f"a request rate is above 0, not {self.requests_per_s:g}"])

    def mean(self) -> float:
        return self.requests_per_s

    def expected(self, until_s: float) -> float:
        return self.requests_per_s * until_s

    def times_of(self, expected: NDArray[np.float64]) -> NDArray[np.float64]:
        if math.isinf(self.requests_per_s):
            return np.zeros_like(expected)
        return expected / self.requests_per_s


@dataclass(frozen=True, slots=True, eq=False)
class RateCurve:
    """A rate in steps or, with `ends_per_s`, in straight lines.

    From starts_s[k] to the next start the rate goes from requests_per_s[k] to ends_per_s[k] (None: stays). starts_s
    ascends from 0. `period_s`: after it the curve begins anew (a day). Without one the last rate goes on for ever; it
    must be above 0 and level.
    """

    starts_s: NDArray[np.float64]
    requests_per_s: NDArray[np.float64]
    period_s: float | None = None
    ends_per_s: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        starts, rates, ends = self.starts_s, self.requests_per_s, self._ends()
        if not 1 <= starts.size <= MAX_RATE_STEPS or not starts.shape == rates.shape == ends.shape:
            raise ConfigError([f"a rate curve has 1 to {MAX_RATE_STEPS:,} steps, not {starts.size:,}"])
        if starts[0] != 0 or not np.all(np.diff(starts) > 0):
            raise ConfigError(["the times of a rate curve begin at 0 and ascend"])
        if not np.all(np.isfinite([rates, ends])) or np.any(np.minimum(rates, ends) < 0):
            raise ConfigError(["the rates of a rate curve are finite and not negative"])
        if self.period_s is None and not 0 < rates[-1] == ends[-1]:
            raise ConfigError(["the last rate of a curve without a period goes on for ever, so it must be above 0"])
        if self.period_s is not None and not (starts[-1] < self.period_s < math.inf and self._counts()[-1] > 0):
            raise ConfigError([f"a period of {self.period_s:g} s must hold the whole curve and at least some requests"])

    @classmethod
    def through(cls, times_s: NDArray[np.float64], requests_per_s: NDArray[np.float64]) -> RateCurve:
        """Straight lines through the points; the last rate goes on."""
        return cls(times_s, requests_per_s, None, np.append(requests_per_s[1:], requests_per_s[-1]))

    def mean(self) -> float:
        """Over a period, or, without one, over the time until the last change; of a single step its rate."""
        if self.period_s is not None:
            return float(self._counts()[-1] / self.period_s)
        if self.starts_s.size == 1:
            return float(self.requests_per_s[0])
        return float(self._counts()[-1] / self.starts_s[-1])

    def scaled(self, factor: float) -> RateCurve:
        """`factor` times as many requests at any time."""
        ends = None if self.ends_per_s is None else self.ends_per_s * factor
        return RateCurve(self.starts_s, self.requests_per_s * factor, self.period_s, ends)

    def faster(self, speedup: float) -> RateCurve:
        """The same requests in less time."""
        period_s = None if self.period_s is None else self.period_s / speedup
        curve = RateCurve(self.starts_s / speedup, self.requests_per_s, period_s, self.ends_per_s)
        return curve.scaled(speedup)

    def expected(self, until_s: float) -> float:
        rounds, within = (0.0, until_s) if self.period_s is None else divmod(until_s, self.period_s)
        k = int(np.searchsorted(self.starts_s, within, side="right")) - 1
        slopes, counts = self._slopes(), self._counts()
        passed = within - float(self.starts_s[k])
        part = passed * float(self.requests_per_s[k]) + passed**2 / 2 * float(slopes[k])
        return rounds * float(counts[-1]) + float(counts[k]) + part

    def times_of(self, expected: NDArray[np.float64]) -> NDArray[np.float64]:
        counts = self._counts()
        rounds = np.zeros_like(expected) if self.period_s is None else np.floor(expected / counts[-1])
        within = expected - rounds * counts[-1]
        # From the right: while the rate is 0 the integral stands still, and nothing arrives before it rises again.
        k = np.clip(np.searchsorted(counts, within, side="right") - 1, 0, self.starts_s.size - 1)
        missing, rate, slope = within - counts[k], self.requests_per_s[k], self._slopes()[k]
        # The root of rate · t + slope · t² / 2 = missing, in the form that has no difference of near numbers.
        below = rate + np.sqrt(np.maximum(rate**2 + 2 * slope * missing, 0.0))
        passed = np.divide(2 * missing, below, out=np.zeros_like(missing), where=below > 0)
        return np.asarray(rounds * (self.period_s or 0.0) + self.starts_s[k] + passed, np.float64)

    def _ends(self) -> NDArray[np.float64]:
        return self.requests_per_s if self.ends_per_s is None else self.ends_per_s

    def _widths(self) -> NDArray[np.float64]:
        """Of the steps that end: all with a period, all but the last without."""
        edges = self.starts_s if self.period_s is None else np.append(self.starts_s, self.period_s)
        return np.diff(edges)

    def _slopes(self) -> NDArray[np.float64]:
        """Of all steps; 0 for one without an end."""
        widths = self._widths()
        slopes = np.zeros(self.starts_s.size)
        slopes[: widths.size] = (self._ends() - self.requests_per_s)[: widths.size] / widths
        return slopes

    def _counts(self) -> NDArray[np.float64]:
        """The integral at each start and, with a period, at its end."""
        widths = self._widths()
        means = (self.requests_per_s + self._ends())[: widths.size] / 2
        return np.concatenate(([0.0], np.cumsum(widths * means)))


@dataclass(frozen=True, slots=True)
class Load:
    """How the requests of a workload come.

    rate: None is a closed loop of `max_concurrency` users; with a rate that is a cap on what is in flight, or None.
    gaps: "poisson" exponential; "gamma" of shape `burstiness`, as in `vllm bench serve` (below 1 bursty, 1 Poisson,
    above 1 even; the gaps' coefficient of variation is 1/√burstiness); "constant" equal, the first at 0. Unlike vLLM's,
    the times are not stretched afterwards to make the sample's mean rate exact. until_s: nothing is sent that is
    scheduled later.
    """

    rate: Rate | None
    gaps: Gaps = "poisson"
    burstiness: float = 1.0
    max_concurrency: int | None = None
    until_s: float = math.inf

    def __post_init__(self) -> None:
        problems = []
        if self.rate is None and self.max_concurrency is None:
            problems.append("a closed loop has a number of users")
        if self.max_concurrency is not None and not 1 <= self.max_concurrency <= MAX_CONCURRENCY:
            problems.append(f"a concurrency is from 1 to {MAX_CONCURRENCY:,}, not {self.max_concurrency:,}")
        if not (math.isfinite(self.burstiness) and self.burstiness > 0):
            problems.append(f"burstiness is above 0, not {self.burstiness:g}")
        elif self.gaps != "gamma" and self.burstiness != 1.0:
            problems.append(f"burstiness is the shape of gamma gaps; {self.gaps} ones have none")
        if not self.until_s > 0:
            problems.append(f"a duration is above 0, not {self.until_s:g} s")
        if problems:
            raise ConfigError(problems)

    def times(self, n: int, rng: np.random.Generator, share: float = 1.0) -> NDArray[np.float64]:
        """Of `n` first requests, shape [n]; NaN in a closed loop. `share` of the rate is theirs: requests a second are
        asked for, and a conversation is several."""
        if self.rate is None:
            return np.full(n, np.nan)
        # n / share arrivals at the whole rate last as long as n at the share of it.
        if self.gaps == "constant":
            return self.rate.times_of(np.arange(n, dtype=np.float64) / share)
        return self.rate.times_of(np.cumsum(self._unit_gaps(n, rng)) / share)

    def enough(self) -> int:
        """Requests, so many that fewer arrive before `until_s` about once in a billion runs."""
        if self.rate is None or math.isinf(self.until_s):
            raise ConfigError(["a number of requests is needed: nothing else bounds them"])
        expected = self.rate.expected(self.until_s)
        if not expected <= MAX_EXPECTED:
            raise ConfigError([f"{expected:.3g} requests in {self.until_s:g} s are too many; at most {MAX_EXPECTED:,}"])
        spread = math.sqrt(expected / min(self.burstiness, 1.0))
        return math.ceil(expected + 6 * spread) + 10

    def _unit_gaps(self, n: int, rng: np.random.Generator) -> NDArray[np.float64]:
        if self.gaps == "poisson":
            return rng.exponential(size=n)
        return rng.gamma(self.burstiness, 1.0 / self.burstiness, size=n)


def spread_ticks(at_s: NDArray[np.float64], tick_s: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Arrivals that were recorded in ticks, each moved to a random place in [its tick, the next).

    `at_s` not descending, shape [n]; so is the answer, and requests of one tick keep their order. A tick lasts
    `tick_s`, or until the next one that has requests if that comes sooner.
    """
    if not at_s.size:
        return at_s
    ticks, inverse = np.unique(at_s, return_inverse=True)
    lasts = np.minimum(np.diff(ticks, append=ticks[-1] + tick_s), tick_s)
    return np.sort(at_s + rng.random(at_s.size) * lasts[inverse])


def tick_of(at_s: NDArray[np.float64]) -> float:
    """The tick in which arrivals were recorded, in seconds: the median gap between distinct times where at least half
    of the requests share theirs with another, else 0 (fine enough as they are)."""
    ticks, counts = np.unique(at_s, return_counts=True)
    sharing = int(counts[counts > 1].sum())
    return float(np.median(np.diff(ticks))) if ticks.size > 1 and 2 * sharing >= at_s.size else 0.0
