"""What a run comes to: latencies, throughput, goodput at a service-level objective, and intervals over seeds. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from prfaas.loadgen.report.objective import Objective, mean_gap_s
from prfaas.loadgen.simulator.columns import DONE, Outcome

Floats = NDArray[np.float64]

# Student's t, two-sided 95 %, by degrees of freedom from 1; then the normal's.
_T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
_Z95 = 1.960
OBJECTIVE = Objective(ttft_s=10.0, tpot_s=0.0275, ttft_prefills=2.0)
"""TTFT ≤ max(10 s, 2 × the bare prefill time of the pool that served the request) and TPOT ≤ 27.5 ms: what the policies
admit by."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over seeds with its 95 % confidence interval (Student's t)."""

    mean: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        return {"mean": self.mean, "ci95_low": self.low, "ci95_high": self.high}


def interval(values: Sequence[float]) -> Interval:
    """Of one value a seed; a single one has no interval (infinite)."""
    array = np.asarray(values, np.float64)
    mean = float(array.mean())
    if array.size < 2:
        return Interval(mean, -math.inf, math.inf)
    t = _T95[array.size - 2] if array.size - 2 < len(_T95) else _Z95
    half = t * float(array.std(ddof=1)) / math.sqrt(array.size)
    return Interval(mean, mean - half, mean + half)


def ttft_s(outcome: Outcome) -> Floats:
    """From arrival to the first token, NaN where there was none."""
    return outcome.first_token_s - outcome.arrival_s


def tpot_s(outcome: Outcome) -> Floats:
    """Mean gap between tokens of each request; NaN where there was one token or none."""
    return mean_gap_s(outcome.first_token_s, outcome.end_s, outcome.output_tokens)


def good(outcome: Outcome, objective: Objective) -> NDArray[np.bool_]:
    """Which requests were served within the objective."""
    within = objective.within(ttft_s(outcome), tpot_s(outcome), outcome.prefill_s)
    return np.asarray((outcome.status == DONE) & within)


def goodput(outcome: Outcome, objective: Objective, start_s: float, end_s: float) -> float:
    """Requests/s that arrived in [start_s, end_s) and were served within the objective."""
    inside = (outcome.arrival_s >= start_s) & (outcome.arrival_s < end_s)
    return float(np.count_nonzero(good(outcome, objective) & inside)) / (end_s - start_s)


def offered(outcome: Outcome, start_s: float, end_s: float) -> float:
    """Requests/s that arrived in [start_s, end_s)."""
    inside = (outcome.arrival_s >= start_s) & (outcome.arrival_s < end_s)
    return float(np.count_nonzero(inside)) / (end_s - start_s)


def saturated_throughput(outcome: Outcome, from_share: float = 0.2, to_share: float = 0.8) -> float:
    """Requests/s of a closed loop, between the ends of two shares of all: neither filling nor running empty."""
    ends = np.sort(outcome.end_s[outcome.status == DONE])
    first, last = int(ends.size * from_share), int(ends.size * to_share) - 1
    if last <= first or ends[last] <= ends[first]:
        return math.nan
    return float((last - first) / (ends[last] - ends[first]))


def latencies(outcome: Outcome, from_share: float = 0.1) -> dict[str, float]:
    """Means and percentiles over requests that were served, without the first `from_share` of arrivals."""
    later = np.arange(outcome.arrival_s.size) >= outcome.arrival_s.size * from_share
    served = (outcome.status == DONE) & later
    first = ttft_s(outcome)[served]
    second = (outcome.second_token_s - outcome.arrival_s)[served]
    gap = tpot_s(outcome)[served]
    count = max(1, int(np.count_nonzero(later)))
    objective_met = np.count_nonzero(good(outcome, OBJECTIVE) & later) / count
    return {
        "ttft_mean_s": float(first.mean()),
        "ttft_p50_s": float(np.quantile(first, 0.5)),
        "ttft_p90_s": float(np.quantile(first, 0.9)),
        "ttft_p99_s": float(np.quantile(first, 0.99)),
        "second_token_mean_s": float(second.mean()),
        "tpot_mean_s": float(np.nanmean(gap)),
        "tpot_p99_s": float(np.nanquantile(gap, 0.99)),
        "queue_mean_s": float((outcome.prefill_start_s - outcome.arrival_s)[served].mean()),
        "prefill_mean_s": float(outcome.prefill_s[served].mean()),
        "exposed_mean_s": float((outcome.kv_ready_s - outcome.prefill_start_s - outcome.prefill_s)[served].mean()),
        "first_step_mean_s": float((outcome.first_token_s - outcome.kv_ready_s)[served].mean()),
        "share_offloaded": float(outcome.offloaded[served].mean()),
        "share_good": float(objective_met),
        "share_refused": float(np.count_nonzero((outcome.status != DONE) & later) / count),
    }
