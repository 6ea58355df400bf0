"""The plots of a report. Big runs are thinned: curves to some hundred points, dots and rows to an even sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from prfaas.loadgen.records import Records
from prfaas.loadgen.report.objective import e2e_s, tpot_s, ttft_s
from prfaas.loadgen.report.summary import duration_s
from prfaas.loadgen.report.svg import COLOURS, Bars, Plot, Series

CDF_POINTS = 300
DOTS = 1500
TIME_BINS = 120
REQUESTS_A_SLICE, FEWEST_SLICES = 20, 8
"""Of a line of percentiles over time: below that it is noise."""
ROWS = 60
LOG_SPREAD = 50
"""A CDF's axis is logarithmic when its greatest value is so many times its median."""

Floats = NDArray[np.float64]
WAITED, FIRST, OUTPUT, BROKEN = range(4)
KINDS = (
    ("waiting in the client", "#999999"),
    ("to the first token", "#d9622b"),
    ("output", "#2f7ed8"),
    ("failed", "#c0262b"),
)
PART_KINDS = (
    ("router, queue", "#999999"),
    ("prefill", "#d9622b"),
    ("exposed transfer", "#9560c9"),
    ("first step, rest", "#d8b12f"),
    ("output", "#2f7ed8"),
    ("failed", "#c0262b"),
)


@dataclass(frozen=True, slots=True)
class Run:
    """A run with its name; several are compared."""

    name: str
    records: Records


def plots(runs: Sequence[Run]) -> list[Plot | Bars]:
    """CDFs, latency and throughput against time, and for a single run each request's own line."""
    made: list[Plot | Bars | None] = [
        cdf("Time to the first token", "TTFT, s", [(r.name, ttft_s(r.records)[r.records.ok]) for r in runs]),
        cdf("Time per output token", "TPOT, ms", [(r.name, 1e3 * tpot_s(r.records)[r.records.ok]) for r in runs]),
        cdf("Gaps between tokens", "ITL, ms", [(r.name, 1e3 * np.asarray(r.records.itl_s, np.float64)) for r in runs]),
        cdf("Whole answers", "E2E latency, s", [(r.name, e2e_s(r.records)[r.records.ok]) for r in runs]),
        against_time(runs),
        throughput(runs),
        in_flight(runs),
    ]
    if len(runs) == 1:
        made += [parts_against_length(runs[0]), each_request(runs[0])]
    return [plot for plot in made if plot is not None]


def cdf(title: str, x_name: str, values: Sequence[tuple[str, Floats]]) -> Plot | None:
    """None: there is nothing to plot."""
    series = []
    spread = 1.0
    for name, column in values:
        known = column[np.isfinite(column)]
        if known.size:
            shares = np.linspace(0, 1, min(CDF_POINTS, max(known.size, 2)))
            x = np.quantile(known, shares)
            series.append(Series(name, x.tolist(), (100 * shares).tolist()))
            spread = max(spread, float(x[-1] / x[x.size // 2]) if x[x.size // 2] > 0 else 1.0)
    log_x = spread > LOG_SPREAD
    return Plot(title, x_name, "% of all at or below", series, log_x=log_x, y_top=100.0) if series else None


def against_time(runs: Sequence[Run]) -> Plot | None:
    """TTFT over the scheduled send: dots for requests, lines for percentiles of each slice of time."""
    series = []
    for i, run in enumerate(runs):
        latency_s = ttft_s(run.records)
        known = np.flatnonzero(run.records.ok & np.isfinite(latency_s))
        if not known.size:
            continue
        x, y = run.records.scheduled_s[known], latency_s[known]
        some = thinned(known.size, DOTS // len(runs))
        own = COLOURS[i % len(COLOURS)]
        name = run.name if len(runs) > 1 else "a request"
        series.append(Series(name, x[some].tolist(), y[some].tolist(), "dots", own))
        slices = min(TIME_BINS, known.size // REQUESTS_A_SLICE)
        if slices < FEWEST_SLICES:
            continue
        bins = np.linspace(x.min(), x.max() + 1e-9, slices + 1)
        place = np.digitize(x, bins)
        # One run has room for its tail; of several, each has its median in its own colour.
        wanted = ((50, COLOURS[1]), (99, COLOURS[4])) if len(runs) == 1 else ((50, own),)
        for q, colour in wanted:
            line = _quantiles(place, y, slices, q)
            named = f"p{q}" if len(runs) == 1 else f"{run.name} p{q}"
            series.append(Series(named, _centres(bins), line, "line", colour))
    return Plot("Time to the first token against time", "scheduled send, s", "TTFT, s", series) if series else None


def throughput(runs: Sequence[Run]) -> Plot | None:
    """Output tokens a second over time: a request's tokens lie evenly between its first and its last."""
    series = []
    for run in runs:
        bins = _bins(run.records)
        known = np.flatnonzero(np.isfinite(run.records.first_token_s) & np.isfinite(run.records.last_token_s))
        if not known.size or bins[-1] <= bins[0]:
            continue
        first_s, last_s = run.records.first_token_s[known], run.records.last_token_s[known]
        tokens = run.records.output_tokens[known].astype(np.float64)
        rate = np.diff(_spread_over(bins, first_s, last_s, tokens)) / np.diff(bins)
        series.append(Series(run.name, _centres(bins), rate.tolist()))
    return Plot("Throughput", "time, s", "output tokens/s", series) if series else None


def in_flight(runs: Sequence[Run]) -> Plot | None:
    series = []
    for run in runs:
        bins = _bins(run.records)
        known = np.isfinite(run.records.sent_s) & np.isfinite(run.records.end_s)
        if not known.any():
            continue
        begun = np.searchsorted(np.sort(run.records.sent_s[known]), bins, side="right")
        ended = np.searchsorted(np.sort(run.records.end_s[known]), bins, side="right")
        series.append(Series(run.name, bins.tolist(), (begun - ended).astype(float).tolist()))
    return Plot("Requests in flight", "time, s", "requests sent and not ended", series) if series else None


def parts_against_length(run: Run) -> Plot | None:
    """TTFT over the prompt's length, offloaded and not."""
    latency_s = ttft_s(run.records)
    known = np.flatnonzero(run.records.ok & np.isfinite(latency_s))
    if not known.size or np.ptp(run.records.prompt_tokens[known]) == 0:
        return None
    some = known[thinned(known.size, DOTS)]
    where = run.records.offloaded[some]
    series = []
    for code, name in ((1, "offloaded"), (0, "prefilled at home"), (-1, "a request")):
        rows = some[where == code]
        if rows.size:
            series.append(Series(name, run.records.prompt_tokens[rows].tolist(), latency_s[rows].tolist(), "dots"))
    return Plot("Time to the first token against length", "prompt tokens", "TTFT, s", series)


def each_request(run: Run) -> Bars | None:
    """A line a request, by its schedule; with TTFT's parts where most of the lines know them."""
    order = np.argsort(run.records.scheduled_s, kind="stable")
    order = order[np.isfinite(run.records.end_s[order])]
    if not order.size:
        return None
    some = order[thinned(order.size, ROWS)].tolist()
    parted = np.isfinite(run.records.prefill_s[some]).mean() > 0.5
    rows = [(_parted_row if parted else _plain_row)(run.records, row) for row in some]
    shown = f"{len(some)} of {order.size:,} requests" if order.size > len(some) else "each request"
    low = float(run.records.scheduled_s[some].min())
    high = float(np.nanmax(run.records.end_s[some]))
    return Bars(f"Timeline of {shown}", "time, s", PART_KINDS if parted else KINDS, rows, low, high)


def _plain_row(records: Records, row: int) -> list[tuple[float, float, int]]:
    scheduled_s, sent_s, first_s, end_s = (
        float(column[row]) for column in (records.scheduled_s, records.sent_s, records.first_token_s, records.end_s)
    )
    if not np.isfinite(first_s):
        return [(scheduled_s, end_s, BROKEN)]
    last = OUTPUT if records.status[row] == "ok" else BROKEN
    return [(scheduled_s, sent_s, WAITED), (sent_s, first_s, FIRST), (first_s, end_s, last)]


def _parted_row(records: Records, row: int) -> list[tuple[float, float, int]]:
    scheduled_s, first_s, end_s = (
        float(column[row]) for column in (records.scheduled_s, records.first_token_s, records.end_s)
    )
    failed = len(PART_KINDS) - 1
    if not np.isfinite(first_s):
        return [(scheduled_s, end_s, failed)]
    prefill_s, exposed_s, step_s = (
        float(np.nan_to_num(column[row])) for column in (records.prefill_s, records.exposed_s, records.first_step_s)
    )
    # The way between client and router belongs to the first and the last part; all of it is drawn as before the first.
    prefill_at_s = max(first_s - step_s - exposed_s - prefill_s, scheduled_s)
    marks = [scheduled_s, prefill_at_s, prefill_at_s + prefill_s, prefill_at_s + prefill_s + exposed_s, first_s, end_s]
    kinds = [*range(4), 4 if records.status[row] == "ok" else failed]
    return [(marks[i], marks[i + 1], kind) for i, kind in enumerate(kinds)]


def thinned(count: int, most: int) -> NDArray[np.int64]:
    """Indices of an even sample, all when there are few."""
    if count <= most:
        return np.arange(count)
    return np.unique(np.linspace(0, count - 1, max(most, 1)).astype(np.int64))


def _bins(records: Records) -> Floats:
    start_s = float(records.scheduled_s.min())
    return np.linspace(start_s, start_s + max(duration_s(records), 1e-6), TIME_BINS + 1)


def _centres(bins: Floats) -> list[float]:
    centres: list[float] = ((bins[1:] + bins[:-1]) / 2).tolist()
    return centres


def _quantiles(place: NDArray[np.int64], values: Floats, bins: int, q: float) -> list[float]:
    """Of the values of each bin, NaN where there are none. place: 1 … bins, as np.digitize gives."""
    made = [float("nan")] * bins
    order = np.argsort(place, kind="stable")
    edges = np.searchsorted(place[order], np.arange(1, bins + 2))
    for i in range(bins):
        if edges[i] < edges[i + 1]:
            made[i] = float(np.percentile(values[order[edges[i] : edges[i + 1]]], q))
    return made


def _spread_over(at_s: Floats, first_s: Floats, last_s: Floats, tokens: Floats) -> Floats:
    """How many tokens had come by each of `at_s`: a request's first at first_s, the others evenly up to last_s."""
    # The sum of ramps is piecewise linear: its value follows from sorted ends and cumulative sums of slope and offset.
    lasting = last_s > first_s
    slope = np.divide(tokens - 1, last_s - first_s, out=np.zeros(tokens.size), where=lasting)
    step = np.where(lasting, 1.0, tokens)
    came = _cumulative(at_s, first_s, step)
    came += _cumulative(at_s, first_s, slope) * at_s - _cumulative(at_s, first_s, slope * first_s)
    came -= _cumulative(at_s, last_s, slope) * at_s - _cumulative(at_s, last_s, slope * last_s)
    return came


def _cumulative(at_s: Floats, when_s: Floats, amount: Floats) -> Floats:
    """The sum of the amounts whose time is at or before each of `at_s`."""
    order = np.argsort(when_s, kind="stable")
    sums = np.concatenate(([0.0], np.cumsum(amount[order])))
    return np.asarray(sums[np.searchsorted(when_s[order], at_s, side="right")], np.float64)
