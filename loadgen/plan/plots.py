"""Line plots as SVG text: no dependency, no script, readable in light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from prfaas.loadgen.report.svg import log_ticks, rule, runs, text, ticks

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
        for y in ticks(y_high):
            _, height = place(x_low, y)
            parts.append(rule(LEFT, height, WIDTH - RIGHT, height))
            parts.append(text(LEFT - 6, height + 4, f"{y:g}", "end"))
        for x in log_ticks(x_low, x_high) if self.log_x else (x for x in ticks(x_high) if x >= x_low):
            across, _ = place(x, 0)
            parts.append(rule(across, TOP, across, HEIGHT - BOTTOM))
            parts.append(text(across, HEIGHT - BOTTOM + 16, short(x), "middle"))
        parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, self.x_name, "middle"))
        parts.append(text(LEFT, TOP - 8, self.y_name, "start"))
        if self.mark is not None and x_low <= self.mark[0] <= x_high:
            across, _ = place(self.mark[0], 0)
            parts.append(_mark(across))
            near_end = across > WIDTH * 0.7
            parts.append(text(across + (-5 if near_end else 5), TOP + 12, self.mark[1], "end" if near_end else "start"))
        for i, line in enumerate(self.lines):
            colour = COLOURS[i % len(COLOURS)]
            parts += [_polyline([place(*point) for point in run], colour) for run in runs(line, self.log_x, y_high)]
            if len(self.lines) > 1:
                row = TOP + 30 + 16 * i
                parts.append(f'<rect x="{LEFT + 10}" y="{row - 9}" width="10" height="10" fill="{colour}"/>')
                parts.append(text(LEFT + 26, row, line.name, "start"))
        return "\n".join([*parts, "</svg>"])

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


def short(x: float) -> str:
    """20000 -> 20K."""
    return f"{x / 1000:g}K" if x >= 1000 else f"{x:g}"


def _mark(x: float) -> str:
    return (
        f'<line x1="{x:.1f}" y1="{TOP:.1f}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM:.1f}" stroke="currentColor"'
        ' stroke-dasharray="5 4"/>'
    )


def _polyline(points: list[tuple[float, float]], colour: str) -> str:
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    if len(points) == 1:
        x, y = points[0]
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>'
    return f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="2"/>'
