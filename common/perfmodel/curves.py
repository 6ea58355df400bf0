"""Measured points made functions: `Curve` of one length, `Surface` of batch and context. Both never fall.

`Curve` between its points is a cubic by Fritsch and Carlson ("Monotone Piecewise Cubic Interpolation", SIAM J. Numer.
Anal. 17, 1980; derivatives by Fritsch and Butland's weighted harmonic mean, which no limiting step need correct), or
straight. A straight line between far points of a convex curve, as prefill time is, lies above it: with the paper's four
points it costs three percent of the throughput.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

MAX_POINTS = 4096
Interpolation = Literal["monotone_cubic", "linear"]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """A non-decreasing function of a length in tokens, from points.

    lengths: strictly increasing, ≥ 0; values: as many, finite, ≥ 0, never falling. One point is a constant.

    Below the first point the curve goes on straight with its slope there, or towards (0, 0) where that is flatter, so
    it stays ≥ 0. Above the last it goes on straight with its slope there, which is too little for what grows faster
    than linearly: measure up to the longest length you plan for. Lengths below 0 count as 0.

    Raises ValueError, in one line, for points that are none of this.
    """

    lengths: tuple[float, ...]
    values: tuple[float, ...]
    interpolation: Interpolation = "monotone_cubic"
    _starts: tuple[float, ...] = field(init=False, repr=False, compare=False)
    _cubics: tuple[tuple[float, float, float, float], ...] = field(init=False, repr=False, compare=False)
    _table: Floats = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        lengths = check_axis("lengths", self.lengths, least=0.0)
        values = np.asarray(self.values, np.float64)
        if values.shape != lengths.shape:
            raise ValueError(f"{len(lengths)} lengths have {values.size} values; each length needs one")
        check_rising("values", values, tuple(f"length {x:g}" for x in lengths))
        if self.interpolation not in ("monotone_cubic", "linear"):
            raise ValueError(f"interpolation {self.interpolation!r} must be monotone_cubic or linear")
        pieces = _pieces(lengths, values, self.interpolation)
        object.__setattr__(self, "lengths", tuple(lengths.tolist()))
        object.__setattr__(self, "values", tuple(values.tolist()))
        object.__setattr__(self, "_starts", tuple(lengths.tolist()))
        object.__setattr__(self, "_cubics", pieces)
        object.__setattr__(self, "_table", np.asarray(pieces))

    @overload
    def __call__(self, length: float) -> float: ...
    @overload
    def __call__(self, length: Floats) -> Floats: ...
    def __call__(self, length: float | Floats) -> float | Floats:
        """The value at a length, or at each of an array of lengths of any shape."""
        if isinstance(length, int | float):
            return self.at(length)
        x = np.maximum(np.asarray(length, np.float64), 0.0)
        index = np.searchsorted(self._starts, x, side="right")
        a, b, c, d = np.moveaxis(self._table[index], -1, 0)
        s = x - np.asarray((0.0, *self._starts))[index]
        result: Floats = a + s * (b + s * (c + s * d))
        return result

    def at(self, length: float) -> float:
        """The same for one length, without numpy: a microsecond."""
        x = length if length > 0.0 else 0.0
        index = bisect_right(self._starts, x)
        a, b, c, d = self._cubics[index]
        s = x - self._starts[index - 1] if index else x
        return a + s * (b + s * (c + s * d))

    @property
    def longest(self) -> float:
        """The last point's length; what lies beyond is extrapolated."""
        return self.lengths[-1]


@dataclass(frozen=True)
class Surface:
    """Seconds (or what else) by (batch, context tokens of one request), bilinear between grid points, and falling in
    neither.

    batches, contexts: strictly increasing, batches ≥ 1, contexts ≥ 0. values: one row a batch, one column a context.
    Below the first batch or context the edge holds; above the last it goes on straight, with the steepest of the grid's
    last slopes, since a slope of each row's own could make rows cross. One batch or one context means that the value
    doesn't depend on it.

    Raises ValueError, in one line, for a grid that is none of this.
    """

    batches: tuple[float, ...]
    contexts: tuple[float, ...]
    values: tuple[tuple[float, ...], ...]
    _batch_slope: float = field(init=False, repr=False, compare=False)
    _context_slope: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        batches = check_axis("batches", self.batches, least=1.0)
        contexts = check_axis("contexts", self.contexts, least=0.0)
        if len(self.values) != len(batches) or any(len(row) != len(contexts) for row in self.values):
            raise ValueError(f"values must be {len(batches)} rows (batches) of {len(contexts)} columns (contexts)")
        grid = np.asarray(self.values, np.float64)
        for batch, row in zip(batches, grid, strict=True):
            check_rising("values", row, tuple(f"batch {batch:g}, context {x:g}" for x in contexts))
        for context, column in zip(contexts, grid.T, strict=True):
            check_rising("values", column, tuple(f"batch {x:g}, context {context:g}" for x in batches))
        object.__setattr__(self, "batches", tuple(batches.tolist()))
        object.__setattr__(self, "contexts", tuple(contexts.tolist()))
        object.__setattr__(self, "values", tuple(tuple(row) for row in grid.tolist()))
        object.__setattr__(self, "_batch_slope", _last_slope(batches, grid))
        object.__setattr__(self, "_context_slope", _last_slope(contexts, grid.T))

    def at(self, batch: float, context_tokens: float) -> float:
        """For one batch size whose requests hold `context_tokens` each, on average."""
        row, up = _cell(self.batches, batch)
        column, right = _cell(self.contexts, context_tokens)
        value = _between(self.values[row], column, right)
        if up:
            value += up * (_between(self.values[row + 1], column, right) - value)
        if batch > self.batches[-1]:
            value += (batch - self.batches[-1]) * self._batch_slope
        if context_tokens > self.contexts[-1]:
            value += (context_tokens - self.contexts[-1]) * self._context_slope
        return value

    def __call__(self, batch: ArrayLike, context_tokens: ArrayLike) -> Floats:
        """For arrays, broadcast against each other."""
        at = np.vectorize(self.at, otypes=[np.float64])
        result: Floats = at(batch, context_tokens)
        return result


def check_axis(name: str, points: Sequence[float], *, least: float) -> Floats:
    """As an array of one dimension. Raises ValueError for none, too many, not finite, below `least`, not rising."""
    axis = np.asarray(points, np.float64)
    if axis.ndim != 1 or not 1 <= axis.size <= MAX_POINTS:
        raise ValueError(f"{name} must be a list of 1 to {MAX_POINTS} numbers")
    if not np.isfinite(axis).all():
        raise ValueError(f"{name} must be finite")
    if axis[0] < least:
        raise ValueError(f"{name} must be at least {least:g}, not {axis[0]:g}")
    if (wrong := np.flatnonzero(np.diff(axis) <= 0)).size:
        raise ValueError(f"{name} must rise: {axis[wrong[0] + 1]:g} comes after {axis[wrong[0]]:g}")
    return axis


def check_rising(name: str, values: Floats, places: Sequence[str]) -> None:
    """Raises ValueError, naming the place, for a value that is not finite, below 0 or below the one before it."""
    for value, place in zip(values, places, strict=True):
        if not np.isfinite(value) or value < 0:
            raise ValueError(f"{name} must be finite and at least 0; at {place} it is {value:g}")
    if (wrong := np.flatnonzero(np.diff(values) < 0)).size:
        i = int(wrong[0])
        raise ValueError(
            f"{name} must not fall: {values[i + 1]:g} at {places[i + 1]} after {values[i]:g} at {places[i]}"
        )


def _pieces(x: Floats, y: Floats, interpolation: Interpolation) -> tuple[tuple[float, float, float, float], ...]:
    """(a, b, c, d) of a + b·s + c·s² + d·s³, s from the piece's start: before the first point (from 0), one a gap
    between points, after the last."""
    width = np.diff(x)
    secant = np.diff(y) / width
    slope = _slopes(width, secant) if interpolation == "monotone_cubic" else np.r_[secant[:1], secant]
    if x.size == 1:
        slope = np.zeros(1)
    chord = y[0] / x[0] if x[0] > 0 else 0.0
    before = min(float(slope[0]), float(chord))
    pieces = [(float(y[0] - before * x[0]), before, 0.0, 0.0)]
    for i, h in enumerate(width):
        if interpolation == "linear":
            pieces.append((float(y[i]), float(secant[i]), 0.0, 0.0))
            continue
        c = (3 * secant[i] - 2 * slope[i] - slope[i + 1]) / h
        d = (slope[i] + slope[i + 1] - 2 * secant[i]) / h**2
        pieces.append((float(y[i]), float(slope[i]), float(c), float(d)))
    pieces.append((float(y[-1]), float(slope[-1]), 0.0, 0.0))
    return tuple(pieces)


def _slopes(width: Floats, secant: Floats) -> Floats:
    """Derivatives at the points that keep each cubic monotone."""
    slope = np.zeros(width.size + 1)
    if width.size == 0:
        return slope
    if width.size == 1:
        return np.full(2, secant[0])
    w1, w2 = 2 * width[1:] + width[:-1], width[1:] + 2 * width[:-1]
    with np.errstate(divide="ignore", over="ignore"):  # beside a flat piece: 1 / inf = 0
        slope[1:-1] = (w1 + w2) / (w1 / secant[:-1] + w2 / secant[1:])
    slope[0] = _end_slope(width[0], width[1], secant[0], secant[1])
    slope[-1] = _end_slope(width[-1], width[-2], secant[-1], secant[-2])
    return slope


def _end_slope(h0: float, h1: float, s0: float, s1: float) -> float:
    """The three-point formula, held within [0, 3 × the secant]: beyond that the end's cubic would turn."""
    return float(np.clip(((2 * h0 + h1) * s0 - h0 * s1) / (h0 + h1), 0.0, 3 * s0))


def _last_slope(axis: Floats, grid: Floats) -> float:
    """The steepest, over the columns, between the last two rows."""
    return float(((grid[-1] - grid[-2]) / (axis[-1] - axis[-2])).max()) if axis.size > 1 else 0.0


def _cell(axis: tuple[float, ...], x: float) -> tuple[int, float]:
    """The point below x and how far towards the next; x outside the axis counts as its end."""
    if x >= axis[-1]:
        return len(axis) - 1, 0.0
    if x <= axis[0]:
        return 0, 0.0
    i = bisect_right(axis, x) - 1
    return i, (x - axis[i]) / (axis[i + 1] - axis[i])


def _between(row: tuple[float, ...], column: int, right: float) -> float:
    return row[column] + right * (row[column + 1] - row[column]) if right else row[column]
