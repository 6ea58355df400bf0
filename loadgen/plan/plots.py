"""Line plots as SVG text: no dependency, no script, readable in light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 40, 48
COLOURS = ("#2266cc", "#c2571a", "#2a8f4a", "#8a4fbf")


@dataclass(frozen=True, slots=True)
class Line:
    """Points that are not finite leave a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True, slots=True)
class LinePlot:
    """mark: an x to point out, with its word. y_top: what is above it is cut off; None: all is shown."""

    title: str
    x_name: str
    y_name: str
    lines: Sequence[Line]
    log_x: bool = False
    y_top: float | None = None
    mark: tuple[float, str] | None = None

    def svg(self) -> str:
        """One <svg> element."""
        x_low, x_high = self._x_range()
        y_high = self._y_top()

        def place(x: float, y: float) -> tuple[float, float]:
            across = (self._scaled(x) - self._scaled(x_low)) / (self._scaled(x_high) - self._scaled(x_low))
            up = min(y / y_high, 1.0)
            return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

        parts = [
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(self.title)}"'
            ' xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="12" fill="currentColor">',
            f'<text x="{LEFT}" y="16" font-weight="bold">{escape(self.title)}</text>',
        ]
        for y in nice_ticks(y_high):
            _, height = place(x_low, y)
            parts.append(_rule(LEFT, height, WIDTH - RIGHT, height))
            parts.append(_text(LEFT - 6, height + 4, f"{y:g}", "end"))
        for x in log_ticks(x_low, x_high) if self.log_x else (x for x in nice_ticks(x_high) if x >= x_low):
            across, _ = place(x, 0)
            parts.append(_rule(across, TOP, across, HEIGHT - BOTTOM))
            parts.append(_text(across, HEIGHT - BOTTOM + 16, short(x), "middle"))
        parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, self.x_name, "middle"))
        parts.append(_text(LEFT, TOP - 8, self.y_name, "start"))
        if self.mark is not None and x_low <= self.mark[0] <= x_high:
            across, _ = place(self.mark[0], 0)
            parts.append(_rule(across, TOP, across, HEIGHT - BOTTOM, dashed=True))
            near_end = across > WIDTH * 0.7
            parts.append(
                _text(across + (-5 if near_end else 5), TOP + 12, self.mark[1], "end" if near_end else "start")
            )
        for i, line in enumerate(self.lines):
            colour = COLOURS[i % len(COLOURS)]
            parts += [_polyline([place(*point) for point in run], colour) for run in self._runs(line, y_high)]
            if len(self.lines) > 1:
                row = TOP + 30 + 16 * i
                parts.append(f'<rect x="{LEFT + 10}" y="{row - 9}" width="10" height="10" fill="{colour}"/>')
                parts.append(_text(LEFT + 26, row, line.name, "start"))
        return "\n".join([*parts, "</svg>"])

    def _runs(self, line: Line, y_high: float) -> list[list[tuple[float, float]]]:
        """Pieces without gaps."""
        runs: list[list[tuple[float, float]]] = [[]]
        for x, y in zip(line.x, line.y, strict=True):
            if math.isfinite(x) and math.isfinite(y) and y <= y_high * 1.0001 and (x > 0 or not self.log_x):
                runs[-1].append((x, y))
            elif runs[-1]:
                runs.append([])
        return [run for run in runs if run]

    def _scaled(self, x: float) -> float:
        return math.log10(x) if self.log_x else x

    def _x_range(self) -> tuple[float, float]:
        xs = [x for line in self.lines for x in line.x if math.isfinite(x) and (x > 0 or not self.log_x)]
        low, high = (min(xs), max(xs)) if xs else (1.0, 10.0)
        return (low, high) if high > low else (low, low * 2 if low > 0 else low + 1)

    def _y_top(self) -> float:
        if self.y_top is not None and self.y_top > 0:
            return self.y_top
        return 1.05 * max((y for line in self.lines for y in line.y if math.isfinite(y)), default=1.0) or 1.0


def nice_ticks(high: float) -> list[float]:
    """From 0 to `high` by 1, 2 or 5 times a power of ten, four to ten of them."""
    step = 10.0 ** math.floor(math.log10(high / 4)) if high > 0 else 1.0
    for factor in (5, 2):
        if high / (step * factor) >= 4:
            step *= factor
            break
    return [round(i * step, 12) for i in range(int(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 of each power of ten in the range; powers alone when these are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= 5 else (1,)
    return [f * 10.0**p for p in powers for f in factors if low <= f * 10.0**p <= high]


def short(x: float) -> str:
    """20000 -> 20K."""
    return f"{x / 1000:g}K" if x >= 1000 else f"{x:g}"


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _rule(x1: float, y1: float, x2: float, y2: float, *, dashed: bool = False) -> str:
    look = ' stroke-dasharray="5 4"' if dashed else ' opacity="0.15"'
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="currentColor"{look}/>'


def _polyline(points: list[tuple[float, float]], colour: str) -> str:
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    if len(points) == 1:
        x, y = points[0]
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>'
    return f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="2"/>'
