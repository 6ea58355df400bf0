"""A trace as a workload: its requests in their order, at their own times or at others."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from prfaas.common.errors import ConfigError
from prfaas.loadgen.workloads.arrivals import MAX_CONCURRENCY, Load, spread_ticks, tick_of
from prfaas.loadgen.workloads.prefixes import TracePrefixes
from prfaas.loadgen.workloads.rngs import Rngs
from prfaas.loadgen.workloads.traces import Trace
from prfaas.loadgen.workloads.workload import Workload


@dataclass(frozen=True, slots=True)
class TraceTimes:
    """The times of the trace itself, divided by `speedup`. Times that were recorded in ticks are spread within their
    tick first, in trace time; `tick_s` None: as `arrivals.tick_of` finds, 0: they stay as they are."""

    speedup: float = 1.0
    tick_s: float | None = None
    max_concurrency: int | None = None
    until_s: float = math.inf
    """In seconds of the replay."""

    def __post_init__(self) -> None:
        problems = []
        if not (math.isfinite(self.speedup) and self.speedup > 0):
            problems.append(f"a speedup is above 0, not {self.speedup:g}")
        if self.tick_s is not None and not 0 <= self.tick_s < math.inf:
            problems.append(f"a tick is 0 s or longer, not {self.tick_s:g} s")
        if self.max_concurrency is not None and not 1 <= self.max_concurrency <= MAX_CONCURRENCY:
            problems.append(f"a concurrency is from 1 to {MAX_CONCURRENCY:,}, not {self.max_concurrency:,}")
        if not self.until_s > 0:
            problems.append(f"a duration is above 0, not {self.until_s:g} s")
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, slots=True)
class TraceCut:
    """The first `requests` of those from `start_s` to before `end_s`, in seconds of trace time from its first one."""

    start_s: float = 0.0
    end_s: float = math.inf
    requests: int | None = None

    def rows(self, at_s: NDArray[np.float64], name: str) -> tuple[int, int]:
        """(first, one past the last). Raises ConfigError when there are none, or fewer than `requests`."""
        first, end = np.searchsorted(at_s, [self.start_s, self.end_s], side="left").tolist()
        if end <= first:
            raise ConfigError([f"{name} has no request from {self.start_s:g} s to {self.end_s:g} s"])
        if self.requests is None:
            return first, end
        if not 1 <= self.requests <= end - first:
            raise ConfigError([f"{name} has {end - first:,} requests there; {self.requests:,} are asked for"])
        return first, first + self.requests


def trace_workload(trace: Trace, rngs: Rngs, times: Load | TraceTimes, cut: TraceCut | None = None) -> Workload:
    """The trace's requests, or a cut of them, at its own times or, in the same order, at those of a load."""
    tick_s = tick_of(trace.at_s) if not isinstance(times, TraceTimes) or times.tick_s is None else times.tick_s
    at_s = spread_ticks(trace.at_s, tick_s, rngs.ticks) if tick_s else trace.at_s
    first, end = (cut or TraceCut()).rows(at_s, trace.name)
    if isinstance(times, Load):
        arrival_s = times.times(end - first, rngs.arrivals)
    else:
        arrival_s = (at_s[first:end] - (cut.start_s if cut else 0.0)) / times.speedup
    if arrival_s[0] > times.until_s:
        raise ConfigError([f"{trace.name}: no request arrives within {times.until_s:g} s"])
    end -= int(np.count_nonzero(arrival_s > times.until_s))
    n = end - first
    prompt_tokens = trace.prompt_tokens[first:end]
    return Workload(
        name=trace.name,
        arrival_s=arrival_s[:n],
        prompt_tokens=prompt_tokens,
        output_tokens=trace.output_tokens[first:end],
        conversation=np.arange(n, dtype=np.int64),
        turn=np.zeros(n, np.int32),
        think_s=np.zeros(n),
        prefixes=TracePrefixes(
            trace.block_tokens, prompt_tokens, trace.block_offsets[first : end + 1], trace.block_ids
        ),
        content_seed=rngs.content_seed,
        max_concurrency=times.max_concurrency,
        until_s=times.until_s,
    )
