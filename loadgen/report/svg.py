"""Plots as SVG text: no dependency, no script. Colours of text and rules are the page's (currentColor), so that a plot
is readable on light and on dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal, Protocol, Self

WIDTH, HEIGHT = 720, 340
WIDE = 1440
"""Of bars, which have a row of the page to themselves."""
LEFT, RIGHT, TOP, BOTTOM = 62, 18, 56, 46
COLOURS = ("#2f7ed8", "#d9622b", "#2e9e55", "#9560c9", "#c0429b", "#8a7a1f", "#1c9aa8", "#7d7d7d")
CHAR_PX = 7.2
"""Of 12-px text, as wide as sans-serif fonts have it on average in words with wide letters."""
LEGEND_GAP_PX, LEGEND_LINE_PX = 28, 18
EDGE = 1.02
"""So much further than its greatest value a linear x axis goes: what ends there is not drawn on the frame."""
ROW_PX = 9
FEW_DOTS = 400

Numbers = Sequence[float]


class Points(Protocol):
    @property
    def x(self) -> Numbers: ...

    @property
    def y(self) -> Numbers: ...


@dataclass(frozen=True, slots=True)
class Series:
    """Points that are not finite, or not above 0 on a logarithmic axis, leave a gap."""

    name: str
    x: Numbers
    y: Numbers
    look: Literal["line", "dashed", "dots"] = "line"
    colour: str | None = None
    """None: by its place in the plot."""


@dataclass(frozen=True, slots=True)
class Plot:
    """Axes begin at 0 unless they are logarithmic. The names of axes say their units."""

    title: str
    x_name: str
    y_name: str
    series: Sequence[Series]
    log_x: bool = False
    y_top: float | None = None
    """What is above it is cut off; None: all is shown."""
    mark: tuple[float, str] | None = None
    """An x to point out, with its word."""

    def svg(self) -> str:
        """One <svg> element."""
        x_low, x_high = self._x_range()
        y_high = self.y_top or 1.05 * _greatest(y for series in self.series for y in series.y)
        scale = _log if self.log_x else _same

        def place(x: float, y: float) -> tuple[float, float]:
            across = (scale(x) - scale(x_low)) / (scale(x_high) - scale(x_low))
            return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - min(y / y_high, 1.0) * (
                HEIGHT - TOP - BOTTOM
            )

        names = [(s.name, s.colour or COLOURS[i % len(COLOURS)]) for i, s in enumerate(self.series)]
        legend = Legend.of(names if len(names) > 1 else [], WIDTH, self.y_name)
        parts = [*_frame(self.title, WIDTH, HEIGHT, self.x_name, legend), text(LEFT, TOP - 8, self.y_name)]
        for y in ticks(y_high):
            height = place(x_low, y)[1]
            parts += [rule(LEFT, height, WIDTH - RIGHT, height), text(LEFT - 6, height + 4, short(y), "end")]
        for x in log_ticks(x_low, x_high) if self.log_x else ticks(x_high):
            across = place(x, 0)[0]
            parts += [
                rule(across, TOP, across, HEIGHT - BOTTOM),
                text(across, HEIGHT - BOTTOM + 16, short(x), "middle"),
            ]
        for i, series in enumerate(self.series):
            colour = series.colour or COLOURS[i % len(COLOURS)]
            for run in runs(series, self.log_x, y_high):
                points = [place(*point) for point in run]
                parts += _dots(points, colour) if series.look == "dots" else [_line(points, colour, series.look)]
        if self.mark is not None and x_low <= self.mark[0] <= x_high:
            parts += _mark(place(self.mark[0], 0)[0], self.mark[1])
        return "\n".join([*parts, "</svg>"])

    def _x_range(self) -> tuple[float, float]:
        xs = [x for series in self.series for x in series.x if math.isfinite(x) and (x > 0 or not self.log_x)]
        low, high = (min(xs), max(xs)) if xs else (0.1, 1.0)
        if not self.log_x:
            return 0.0, EDGE * high if high > 0 else 1.0
        return (low, high) if high > 1.01 * low else (low / 2, high * 2)


@dataclass(frozen=True, slots=True)
class Bars:
    """Rows of bars on a time axis: `rows[i]` holds (start, end, kind) of row i from the top; `kinds` are (name, colour)
    and go into the legend."""

    title: str
    x_name: str
    kinds: Sequence[tuple[str, str]]
    rows: Sequence[Sequence[tuple[float, float, int]]]
    x_low: float
    x_high: float

    def svg(self) -> str:
        """One <svg> element, as high as its rows need."""
        height = TOP + BOTTOM + ROW_PX * max(1, len(self.rows))
        span = self.x_high - self.x_low or 1.0

        def across(x: float) -> float:
            return LEFT + (x - self.x_low) / span * (WIDE - LEFT - RIGHT)

        parts = _frame(self.title, WIDE, height, self.x_name, Legend.of(self.kinds, WIDE))
        for tick in _ticks_between(self.x_low, self.x_high):
            x = across(tick)
            parts += [rule(x, TOP, x, height - BOTTOM), text(x, height - BOTTOM + 16, short(tick), "middle")]
        for i, row in enumerate(self.rows):
            top = TOP + i * ROW_PX + 1
            for start, end, kind in row:
                if math.isfinite(start) and math.isfinite(end) and end >= start:
                    wide = max(across(end) - across(start), 0.5)
                    parts.append(
                        f'<rect x="{across(start):.1f}" y="{top}" width="{wide:.1f}" height="{ROW_PX - 2}"'
                        f' fill="{self.kinds[kind][1]}"/>'
                    )
        return "\n".join([*parts, "</svg>"])


@dataclass(frozen=True, slots=True)
class Legend:
    """(name, colour) of each kind of line, in `lines`: one above the plot, or some below it."""

    lines: Sequence[Sequence[tuple[str, str]]]
    above: bool

    @classmethod
    def of(cls, names: Sequence[tuple[str, str]], width: int, y_name: str = "") -> Self:
        """Above where there is room for all beside the axis' name. A name that is longer than a line is cut."""
        room = width - LEFT - RIGHT
        taken = len(y_name) * CHAR_PX + LEGEND_GAP_PX if y_name else 0.0
        if sum(_legend_px(name) for name, _ in names) <= room - taken:
            return cls([names], above=True)
        most = int((room - LEGEND_GAP_PX) / CHAR_PX)
        lines: list[list[tuple[str, str]]] = [[]]
        left = float(room)
        for name, colour in names:
            shown = name if len(name) <= most else name[: most - 1] + "…"
            if lines[-1] and _legend_px(shown) > left:
                lines.append([])
                left = float(room)
            lines[-1].append((shown, colour))
            left -= _legend_px(shown)
        return cls(lines, above=False)

    @property
    def below_px(self) -> int:
        """What it adds to the plot's height."""
        return 0 if self.above else LEGEND_LINE_PX * len(self.lines)

    def svg(self, width: int, height: int) -> list[str]:
        """For a plot of this size without it."""
        made = []
        for i, line in enumerate(self.lines):
            y = TOP - 8 if self.above else height + LEGEND_LINE_PX * i + 6
            x = width - RIGHT - sum(_legend_px(name) for name, _ in line) + 10 if self.above else float(LEFT)
            for name, colour in line:
                made.append(f'<rect x="{x:.1f}" y="{y - 9}" width="10" height="10" fill="{colour}"/>')
                made.append(text(x + 14, y, name))
                x += _legend_px(name)
        return made


def _legend_px(name: str) -> float:
    return len(name) * CHAR_PX + LEGEND_GAP_PX


def ticks(high: float) -> list[float]:
    """From 0 to `high` by 1, 2 or 5 times a power of ten, four to ten of them."""
    if not (math.isfinite(high) and high > 0):
        return [0.0]
    step = 10.0 ** math.floor(math.log10(high / 4))
    step *= next((factor for factor in (5, 2) if high / (step * factor) >= 4), 1)
    return [round(i * step, 12) for i in range(int(high / step + 1e-9) + 1)]


def _ticks_between(low: float, high: float) -> list[float]:
    """Round ones, as `ticks` has them for the distance."""
    steps = ticks(high - low)
    if len(steps) < 2:
        return [low]
    first = math.ceil(low / steps[1] - 1e-9)
    return [round(i * steps[1], 12) for i in range(first, math.floor(high / steps[1] + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 of each power of ten in the range; powers alone when these are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= 5 else (1,)
    return [f * 10.0**p for p in powers for f in factors if low <= f * 10.0**p <= high]


def short(x: float) -> str:
    """20000 -> 20K."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "K")):
        if abs(x) >= size:
            return f"{x / (1e3 if letter == 'K' else size):.4g}{letter}"
    return f"{x:.4g}"


def text(x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="currentColor" opacity="0.15"/>'


def _frame(title: str, width: int, height: int, x_name: str, legend: Legend) -> list[str]:
    return [
        f'<svg viewBox="0 0 {width} {height + legend.below_px}" role="img" aria-label="{escape(title)}"'
        ' xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="12" fill="currentColor">',
        f'<text x="{LEFT}" y="18" font-size="14" font-weight="bold">{escape(title)}</text>',
        text((LEFT + width - RIGHT) / 2, height - 10, x_name, "middle"),
        *legend.svg(width, height),
    ]


def runs(series: Points, log_x: bool, y_high: float) -> list[list[tuple[float, float]]]:
    """Pieces without gaps."""
    made: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(series.x, series.y, strict=True):
        if math.isfinite(x) and math.isfinite(y) and y <= y_high * 1.0001 and (x > 0 or not log_x):
            made[-1].append((x, y))
        elif made[-1]:
            made.append([])
    return [run for run in made if run]


def _mark(x: float, words: str) -> list[str]:
    near_end = x > WIDTH * 0.7
    return [
        f'<line x1="{x:.1f}" y1="{TOP:.1f}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM:.1f}" stroke="currentColor"'
        ' stroke-dasharray="5 4"/>',
        # Low, where no curve is that is worth a mark.
        text(x + (-5 if near_end else 5), HEIGHT - BOTTOM - 8, words, "end" if near_end else "start"),
    ]


def _line(points: list[tuple[float, float]], colour: str, look: str) -> str:
    if len(points) == 1:
        return _dots(points, colour)[0]
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashes = ' stroke-dasharray="6 4"' if look == "dashed" else ""
    return f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="1.8"{dashes}/>'


def _dots(points: list[tuple[float, float]], colour: str) -> list[str]:
    radius = 2.6 if len(points) <= FEW_DOTS else 1.6
    return [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}" opacity="0.65"/>' for x, y in points]


def _greatest(values: object) -> float:
    found = max((v for v in values if math.isfinite(v)), default=0.0)  # type: ignore[attr-defined]
    return float(found) if found > 0 else 1.0


def _log(x: float) -> float:
    return math.log10(x)


def _same(x: float) -> float:
    return x
