"""The service-level objective of goodput, and its flag, `--goodput ttft:MS tpot:MS e2el:MS`, as `vllm bench serve` has
it; aiperf's names are taken too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from prfaas.common.errors import ConfigError
from prfaas.loadgen.records import Records

NAMES = {
    "ttft": "ttft_s",
    "tpot": "tpot_s",
    "e2el": "e2e_s",
    "time_to_first_token": "ttft_s",
    "inter_token_latency": "tpot_s",
    "request_latency": "e2e_s",
}
ROUNDING_S = 1e-9
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Objective:
    """Limits of one request, in seconds; None = none. With `ttft_prefills` x the limit of TTFT is at least x times the
    bare prefill time of the request (`prefill_s`), where that is known."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None
    ttft_prefills: float = 0.0

    def met(self, records: Records) -> NDArray[np.bool_]:
        """Which requests were answered within all limits, shape [n]."""
        found = records.ok & self.within(ttft_s(records), tpot_s(records), records.prefill_s)
        if self.e2e_s is not None:
            found = found & (e2e_s(records) <= self.e2e_s + ROUNDING_S)
        return found

    def within(self, ttft_s: Floats, tpot_s: Floats, prefill_s: Floats) -> NDArray[np.bool_]:
        """Whose first token and gaps are within their limits, shape [n] as the arguments. A single token has no TPOT to
        miss (NaN); no first token misses."""
        found = np.ones(ttft_s.shape, np.bool_)
        if self.ttft_s is not None:
            limit_s = np.fmax(self.ttft_s, self.ttft_prefills * prefill_s)
            found &= ttft_s <= limit_s + ROUNDING_S
        if self.tpot_s is not None:
            found &= np.isnan(tpot_s) | (tpot_s <= self.tpot_s + ROUNDING_S)
        return found

    def __bool__(self) -> bool:
        return any(limit is not None for limit in (self.ttft_s, self.tpot_s, self.e2e_s))

    def __str__(self) -> str:
        limits = (("TTFT", self.ttft_s), ("TPOT", self.tpot_s), ("E2E", self.e2e_s))
        said = [f"{name} ≤ {limit * 1e3:g} ms" for name, limit in limits if limit is not None]
        if self.ttft_prefills and self.ttft_s is not None:
            said[0] += f" or {self.ttft_prefills:g} × its bare prefill"
        return ", ".join(said) or "none"


def parse_objective(given: Sequence[str]) -> Objective:
    """Of words like ttft:500, in ms; one word may hold several. Raises ConfigError with one line a mistake."""
    limits: dict[str, float] = {}
    problems = []
    for word in " ".join(given).split():
        name, _, text = word.partition(":")
        try:
            limit_ms = float(text)
        except ValueError:
            limit_ms = math.nan
        if name not in NAMES:
            problems.append(f"--goodput {word}: there are {', '.join(NAMES)}")
        elif not 0 < limit_ms < math.inf:
            problems.append(f"--goodput {word}: the limit is in ms, above 0, as in {name}:500")
        elif NAMES[name] in limits:
            problems.append(f"--goodput {word}: that limit is given twice")
        else:
            limits[NAMES[name]] = limit_ms / 1e3
    if problems:
        raise ConfigError(problems)
    return Objective(**limits)


def ttft_s(records: Records) -> NDArray[np.float64]:
    """From the scheduled send to the first token; NaN where there was none. Shape [n], as the others."""
    return records.first_token_s - records.scheduled_s


def second_token_s(records: Records) -> NDArray[np.float64]:
    """From the scheduled send to the second token."""
    return records.second_token_s - records.scheduled_s


def e2e_s(records: Records) -> NDArray[np.float64]:
    """From the scheduled send to the last token."""
    return records.last_token_s - records.scheduled_s


def tpot_s(records: Records) -> NDArray[np.float64]:
    """(last token − first token) / (output tokens − 1); NaN below two tokens."""
    return mean_gap_s(records.first_token_s, records.last_token_s, records.output_tokens)


def mean_gap_s(first_s: Floats, last_s: Floats, output_tokens: NDArray[np.int64]) -> Floats:
    """TPOT of columns of instants and counts, shape [n]; NaN below two tokens."""
    gaps = (output_tokens - 1).astype(np.float64)
    return np.asarray(np.divide(last_s - first_s, gaps, out=np.full(gaps.shape, np.nan), where=gaps > 0), np.float64)
