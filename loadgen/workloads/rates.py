"""Rates that change, from text: ServeGen's CSV, aiperf's JSON, or a line like `0:2,600:8,720:2`.

Files come as the numbered lines of `lines.read_lines`; the first wrong line ends the reading with a ConfigError.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import msgspec
import numpy as np
from prfaas.common.errors import ConfigError
from prfaas.loadgen.workloads.arrivals import MAX_RATE_STEPS, RateCurve
from prfaas.loadgen.workloads.tables import Line, csv_rows, decimal_cell, shown

RATE_COLUMNS = ("category", "window_start_s", "total_rate_req_per_s")


class _Point(msgspec.Struct, forbid_unknown_fields=True):
    time_s: float
    qps: float


class _Series(msgspec.Struct, forbid_unknown_fields=True):
    points: list[_Point]


def read_rates(lines: Iterable[Line], name: str, category: str | None = None) -> RateCurve:
    """ServeGen's rates in windows (`category`, `window_start_s`, `total_rate_req_per_s`) as steps that repeat after the
    last window: of one category, which may be left out where there is but one. `name` stands in errors."""
    windows: dict[str, list[tuple[float, float]]] = {}
    for number, (key, *cells) in csv_rows(lines, name, RATE_COLUMNS):
        start_s, rate = (decimal_cell(name, number, *cell) for cell in zip(RATE_COLUMNS[1:], cells, strict=True))
        windows.setdefault(key, []).append((start_s, rate))
    if not windows:
        raise ConfigError([f"{name} has no windows"])
    known = ", ".join(sorted(windows))
    if category is None and len(windows) > 1:
        raise ConfigError([f"{name} has several categories: {known}; name one of them"])
    if category is not None and category not in windows:
        raise ConfigError([f"{name} has no category {shown(category)}; it has {known}"])
    starts_s, rates = np.array(sorted(windows[category or known])).T
    if starts_s.size < 2:
        raise ConfigError([f"{name} has a single window of {category or known}; a curve needs at least two"])
    width_s = float(np.median(np.diff(starts_s)))
    return _named(name, lambda: RateCurve(starts_s - starts_s[0], rates, float(starts_s[-1] - starts_s[0]) + width_s))


def read_rate_series(lines: Iterable[Line], name: str) -> RateCurve:
    """aiperf's `{"points": [{"time_s": 0, "qps": 5}, …]}`: straight lines between the points; the last rate goes on."""
    try:
        series = msgspec.json.decode("\n".join(text for _, text in lines), type=_Series)
    except msgspec.DecodeError as error:
        raise ConfigError([f"{name}: {error}"]) from None
    if not 1 <= len(series.points) <= MAX_RATE_STEPS:
        raise ConfigError([f"{name} has {len(series.points):,} points; it has 1 to {MAX_RATE_STEPS:,}"])
    times_s, rates = np.array([(point.time_s, point.qps) for point in series.points]).T
    return _named(name, lambda: RateCurve.through(times_s, rates))


def parse_rate_schedule(text: str) -> RateCurve:
    """`SECONDS:RATE,…`, from 0: each rate holds until the next time, the last for ever."""
    steps = []
    for part in text.split(","):
        at, colon, rate = part.partition(":")
        try:
            steps.append((float(at), float(rate)))
        except ValueError:
            colon = ""
        if not colon or not all(math.isfinite(number) for number in steps[-1]):
            raise ConfigError([f"{shown(part)} is not SECONDS:RATE; like 0:2,600:8,720:2"])
    starts_s, rates = np.array(steps).T
    return RateCurve(starts_s, rates)


def _named(name: str, make: Callable[[], RateCurve]) -> RateCurve:
    try:
        return make()
    except ConfigError as error:
        raise ConfigError([f"{name}: {problem}" for problem in error.problems]) from None
