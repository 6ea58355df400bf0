"""Distributions of prompt and output lengths, in tokens.

Each is sampled by inverting its distribution function, one uniform number a length: a longer workload begins with the
shorter one of the same seed, and two distributions under the same seed are coupled (a long request stays long).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from prfaas.common.errors import ConfigError

MAX_LENGTH_TOKENS = 1 << 24
"""Of one prompt or output. Far above any model's context; it keeps sums of a whole workload inside 64 bits."""
MAX_VALUES = 10_000_000
"""Of an empirical distribution."""
GRID = 8192
"""Points of the tabulated distribution function of the log-normal; its error is far below the rounding to tokens."""
TAIL_SIGMAS = 8.0


class Lengths(Protocol):
    """A distribution over whole tokens from `low` to `high`, both included."""

    @property
    def low(self) -> int: ...

    @property
    def high(self) -> int: ...

    def mean(self) -> float:
        """Before rounding to whole tokens."""
        ...

    def sample(self, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """`n` lengths, shape [n]; takes exactly n numbers of `rng`, also where they decide nothing."""
        ...


@dataclass(frozen=True, slots=True)
class Fixed:
    tokens: int

    def __post_init__(self) -> None:
        _check_range(self.tokens, self.tokens)

    @property
    def low(self) -> int:
        return self.tokens

    @property
    def high(self) -> int:
        return self.tokens

    def mean(self) -> float:
        return float(self.tokens)

    def sample(self, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
        rng.random(n)
        return np.full(n, self.tokens, np.int64)


@dataclass(frozen=True, slots=True)
class Uniform:
    """Every whole number from `low` to `high`, both included."""

    low: int
    high: int

    def __post_init__(self) -> None:
        _check_range(self.low, self.high)

    @classmethod
    def around(cls, tokens: int, ratio: float) -> Uniform:
        """What `vllm bench serve --random-range-ratio` draws from: tokens × (1 ± ratio), outwards to whole tokens."""
        if not 0.0 <= ratio < 1.0:
            raise ConfigError([f"a range ratio is from 0 to below 1, not {ratio:g}"])
        return cls(max(1, math.floor(tokens * (1 - ratio))), math.ceil(tokens * (1 + ratio)))

    def mean(self) -> float:
        return (self.low + self.high) / 2

    def sample(self, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
        drawn = self.low + np.floor(rng.random(n) * (self.high - self.low + 1)).astype(np.int64)
        return np.minimum(drawn, self.high)


@dataclass(frozen=True, slots=True)
class TruncatedLogNormal:
    """exp(N(mu, sigma²)) on condition that it lies in [low, high]."""

    mu: float
    sigma: float
    low: int
    high: int

    def __post_init__(self) -> None:
        _check_range(self.low, self.high)
        if not (math.isfinite(self.mu) and math.isfinite(self.sigma) and self.sigma > 0):
            raise ConfigError(
                [f"a log-normal needs a finite mu and a sigma above 0, not {self.mu:g} and {self.sigma:g}"]
            )
        below, above = self._bounds()
        if below > TAIL_SIGMAS or above < -TAIL_SIGMAS:
            raise ConfigError(
                [
                    f"a log-normal of mu {self.mu:g}, sigma {self.sigma:g} has next to nothing between "
                    f"{self.low:,} and {self.high:,} tokens"
                ]
            )

    def mean(self) -> float:
        """Closed form: E[X | low ≤ X ≤ high] = e^(mu + sigma²/2) · (Φ(b − sigma) − Φ(a − sigma)) / (Φ(b) − Φ(a)), with
        a and b the bounds in standard units."""
        if self.low == self.high:
            return float(self.low)
        a, b = self._bounds()
        scale = math.exp(self.mu + self.sigma**2 / 2)
        return scale * _normal_mass(a - self.sigma, b - self.sigma) / _normal_mass(a, b)

    def sample(self, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
        a, b = (min(max(bound, -TAIL_SIGMAS), TAIL_SIGMAS) for bound in self._bounds())
        grid = np.linspace(a, b, GRID + 1)
        share = np.array([_normal_mass(a, float(z)) for z in grid]) / max(_normal_mass(a, b), math.ulp(0.0))
        normal = np.interp(rng.random(n), share, grid)
        return np.clip(np.rint(np.exp(self.mu + self.sigma * normal)), self.low, self.high).astype(np.int64)

    def _bounds(self) -> tuple[float, float]:
        return (math.log(self.low) - self.mu) / self.sigma, (math.log(self.high) - self.mu) / self.sigma


@dataclass(frozen=True, slots=True, eq=False)
class Empirical:
    """Lengths that were seen, each as likely as it was frequent. `values`: whole tokens, any order, shape [n]."""

    values: NDArray[np.int64]

    def __post_init__(self) -> None:
        if not 1 <= self.values.size <= MAX_VALUES:
            raise ConfigError([f"an empirical distribution has 1 to {MAX_VALUES:,} lengths, not {self.values.size:,}"])
        ordered = np.sort(self.values.astype(np.int64))
        _check_range(int(ordered[0]), int(ordered[-1]))
        ordered.flags.writeable = False
        object.__setattr__(self, "values", ordered)

    @property
    def low(self) -> int:
        return int(self.values[0])

    @property
    def high(self) -> int:
        return int(self.values[-1])

    def mean(self) -> float:
        return float(self.values.mean())

    def sample(self, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
        chosen = np.floor(rng.random(n) * self.values.size).astype(np.int64)
        return self.values[np.minimum(chosen, self.values.size - 1)]


def _check_range(low: int, high: int) -> None:
    if not 1 <= low <= high <= MAX_LENGTH_TOKENS:
        raise ConfigError(
            [f"lengths from {low:,} to {high:,} tokens; they must ascend, between 1 and {MAX_LENGTH_TOKENS:,}"]
        )


def _normal_mass(a: float, b: float) -> float:
    """Φ(b) − Φ(a) for a ≤ b, from the side on which no digits cancel."""
    root = math.sqrt(2)
    if a > 0:
        return 0.5 * (math.erfc(a / root) - math.erfc(b / root))
    return 0.5 * (math.erfc(-b / root) - math.erfc(-a / root))


PAPER_INPUT_LENGTHS = TruncatedLogNormal(9.90, 1.00, 128, 131_072)
"""arXiv 2604.15039, the case study; "128K" read as 131,072."""
PAPER_OUTPUT_LENGTHS = Fixed(1024)
