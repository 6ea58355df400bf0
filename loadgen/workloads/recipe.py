"""A recipe: everything about a workload but the seed, so that ten seeds don't read a trace ten times."""

from __future__ import annotations

from dataclasses import dataclass

from prfaas.loadgen.workloads.arrivals import Load
from prfaas.loadgen.workloads.replay import TraceCut, TraceTimes, trace_workload
from prfaas.loadgen.workloads.rngs import Rngs
from prfaas.loadgen.workloads.synthetic import SyntheticShape, synthetic_workload
from prfaas.loadgen.workloads.traces import Trace
from prfaas.loadgen.workloads.workload import Workload


@dataclass(frozen=True, slots=True, eq=False)
class SyntheticRecipe:
    """`requests` and `conversations`: how many; both None: as many as come in the load's time."""

    name: str
    seed: int
    shape: SyntheticShape
    times: Load
    requests: int | None = None
    conversations: int | None = None

    def workload(self, *, seed: int | None = None, load: Load | None = None) -> Workload:
        """Under another seed, or at another load. The load doesn't change what is asked for, as long as it doesn't
        decide how much."""
        rngs = Rngs.from_seed(self.seed if seed is None else seed)
        counts = {"requests": self.requests, "conversations": self.conversations}
        return synthetic_workload(self.name, self.shape, load or self.times, rngs, **counts)


@dataclass(frozen=True, slots=True, eq=False)
class TraceRecipe:
    seed: int
    trace: Trace
    times: Load | TraceTimes
    cut: TraceCut

    def workload(self, *, seed: int | None = None, load: Load | None = None) -> Workload:
        """Under another seed (times within ticks, arrivals of a load, tokens), or at another load."""
        rngs = Rngs.from_seed(self.seed if seed is None else seed)
        return trace_workload(self.trace, rngs, load or self.times, self.cut)


Recipe = SyntheticRecipe | TraceRecipe
