"""Figures of a run from its records. Definitions are those of `vllm bench serve`, with one difference: latencies count
from when a request was scheduled, not from when the client got round to sending it.

| figure | over | definition |
|---|---|---|
| TTFT | ok requests | first token − scheduled |
| time to second token | ok requests with two pieces | second piece − scheduled |
| TPOT | ok requests with two tokens | (last − first token) / (output tokens − 1); aiperf's "inter token latency" |
| ITL | gaps | one piece of text − the one before |
| E2E | ok requests | last token − scheduled; aiperf's "request latency" |
| duration | run | first scheduled − last end |
| requests/s, tokens/s | run | of ok requests / duration |
| goodput | run | ok requests within the objective / duration |

Percentiles are interpolated linearly, as numpy's default is.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray
from prfaas.loadgen.records import FAILED, INTERRUPTED, REFUSED, Records
from prfaas.loadgen.report.objective import Objective, e2e_s, second_token_s, tpot_s, ttft_s
from prfaas.loadgen.report.offload import OffloadSummary, summarise_offload

PERCENTILES = (50, 90, 99)


class Spread(msgspec.Struct, frozen=True):
    """None: there is nothing to take it of."""

    count: int
    mean: float | None = None
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    min: float | None = None
    max: float | None = None
    std: float | None = None


class Summary(msgspec.Struct, frozen=True):
    """`goodput_per_s`, `share_good`: None without an objective. `share_good` is of all requests that were sent."""

    name: str
    requests: int
    ok: int
    failed: int
    refused: int
    interrupted: int
    errors: dict[str, int]
    duration_s: float
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    prompt_tokens: int
    output_tokens: int
    objective: str
    goodput_per_s: float | None
    share_good: float | None
    max_in_flight: int
    ttft_s: Spread
    second_token_s: Spread
    tpot_s: Spread
    itl_s: Spread
    e2e_s: Spread
    prompt_tokens_each: Spread
    output_tokens_each: Spread
    offload: OffloadSummary


def summarise(records: Records, objective: Objective, name: str = "run") -> Summary:
    """`records` in any order; of none there are no shares."""
    ok = records.ok
    length_s = duration_s(records)
    prompt_tokens, output_tokens = int(records.prompt_tokens[ok].sum()), int(records.output_tokens[ok].sum())
    good = int(np.count_nonzero(objective.met(records))) if objective else None
    return Summary(
        name=name,
        requests=len(records),
        ok=int(np.count_nonzero(ok)),
        **{status: int(np.count_nonzero(records.status.equal(status))) for status in (FAILED, REFUSED, INTERRUPTED)},
        errors=records.error.counts(),
        duration_s=length_s,
        requests_per_s=_rate(int(np.count_nonzero(ok)), length_s),
        output_tokens_per_s=_rate(output_tokens, length_s),
        total_tokens_per_s=_rate(prompt_tokens + output_tokens, length_s),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        objective=str(objective),
        goodput_per_s=None if good is None else _rate(good, length_s),
        share_good=None if good is None or not len(records) else good / len(records),
        max_in_flight=max_in_flight(records),
        ttft_s=spread(ttft_s(records)[ok]),
        second_token_s=spread(second_token_s(records)[ok]),
        tpot_s=spread(tpot_s(records)[ok]),
        itl_s=spread(records.itl_s),
        e2e_s=spread(e2e_s(records)[ok]),
        prompt_tokens_each=spread(records.prompt_tokens[ok]),
        output_tokens_each=spread(records.output_tokens[ok]),
        offload=summarise_offload(records, length_s),
    )


def spread(values: NDArray[np.float64] | NDArray[np.float32] | NDArray[np.int64]) -> Spread:
    """Of those that are finite."""
    known = values[np.isfinite(values)].astype(np.float64)
    if not known.size:
        return Spread(0)
    p50, p90, p99 = (float(p) for p in np.percentile(known, PERCENTILES))
    return Spread(
        int(known.size), float(known.mean()), p50, p90, p99, float(known.min()), float(known.max()), float(known.std())
    )


def duration_s(records: Records) -> float:
    """From the first scheduled send to the last end; 0 when nothing has ended."""
    ends = records.end_s[np.isfinite(records.end_s)]
    return max(0.0, float(ends.max() - records.scheduled_s.min())) if ends.size else 0.0


def max_in_flight(records: Records) -> int:
    """The most requests that were sent and not yet ended at one time."""
    known = np.isfinite(records.sent_s) & np.isfinite(records.end_s)
    times = np.concatenate((records.end_s[known], records.sent_s[known]))
    # At equal times ends go first: one that begins where another ends is not beside it.
    steps = np.repeat([-1, 1], np.count_nonzero(known))
    order = np.argsort(times, kind="stable")
    return int(np.cumsum(steps[order]).max(initial=0))


def _rate(count: float, length_s: float) -> float:
    return float(count) / length_s if length_s > 0 else 0.0


def as_rows(summaries: Sequence[Summary]) -> list[list[object]]:
    """The table of figures for a CSV file: a header, then a row a figure and run."""
    rows: list[list[object]] = [["run", "figure", "unit", "count", "mean", "p50", "p90", "p99", "min", "max", "std"]]
    for summary in summaries:
        for field, unit in (
            ("ttft_s", "s"),
            ("second_token_s", "s"),
            ("tpot_s", "s"),
            ("itl_s", "s"),
            ("e2e_s", "s"),
            ("prompt_tokens_each", "tokens"),
            ("output_tokens_each", "tokens"),
        ):
            s: Spread = getattr(summary, field)
            name = field.removesuffix("_s").removesuffix("_each")
            rows.append([summary.name, name, unit, s.count, s.mean, s.p50, s.p90, s.p99, s.min, s.max, s.std])
        for field, unit in (
            ("requests", ""),
            ("ok", ""),
            ("failed", ""),
            ("refused", ""),
            ("interrupted", ""),
            ("duration_s", "s"),
            ("requests_per_s", "1/s"),
            ("goodput_per_s", "1/s"),
            ("output_tokens_per_s", "1/s"),
            ("total_tokens_per_s", "1/s"),
            ("max_in_flight", ""),
        ):
            rows.append([summary.name, field, unit, None, getattr(summary, field), *[None] * 6])
        rows += [[summary.name, name, unit, None, value, *[None] * 6] for name, unit, value in summary.offload.rows()]
    return rows
