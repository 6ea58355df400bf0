"""The conversation trace on the paper's hardware: real lengths, real arrivals, and prefixes that repeat.

The threshold and the split of the home nodes are planned from the trace's uncached lengths, as one pool that saw all
requests would leave them: what a planner measures where the day before was like this one. The trace is replayed faster
than it was recorded, so that the cluster is loaded to `LOAD_SHARE` of what that plan carries.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from prfaas.common.errors import ConfigError
from prfaas.common.perfmodel.lengths import sample_of
from prfaas.common.perfmodel.links import LinkProfile
from prfaas.common.perfmodel.profiles import NodeProfile, shipped
from prfaas.common.prefixcache.sizes import CacheSizes
from prfaas.common.scheduling.planner import LIVE, Demand, HomePool, OffloadPool, plan
from prfaas.loadgen.plan.case_paper import LINK
from prfaas.loadgen.simulator.caches import RegionCaches
from prfaas.loadgen.simulator.case_paper import AWAY, HOME, RTT_S
from prfaas.loadgen.simulator.cluster import Cluster, Group
from prfaas.loadgen.simulator.columns import Load
from prfaas.loadgen.simulator.scenarios import Scenario
from prfaas.loadgen.workloads.lines import read_lines
from prfaas.loadgen.workloads.prefixes import TracePrefixes
from prfaas.loadgen.workloads.replay import TraceCut, TraceTimes, trace_workload
from prfaas.loadgen.workloads.rngs import Rngs
from prfaas.loadgen.workloads.traces import Trace, read_mooncake
from prfaas.loadgen.workloads.workload import Workload

LOAD_SHARE = 0.9
"""Of the planned Λ_max, in which cache hits are counted."""
TRACE_S = 1800.0
"""So much of the trace, in its own time."""
WARM_SHARE = 0.25
"""Of the replay, before the window: caches fill."""
CAPACITY_BYTES = {HOME: 4 << 40, AWAY: 2 << 40}
"""Of the regions' pools: half a TiB of host memory a node, open in the paper."""
NAMES = ("mooncake_conversation_trace.jsonl.gz", "conversation_trace.jsonl.gz", "conversation_trace.jsonl")


def find(folder: Path) -> Path | None:
    """The conversation trace in a folder. Raises ConfigError when that isn't one."""
    if not folder.is_dir():
        raise ConfigError([f"--traces {folder}: no such folder"])
    return next((folder / name for name in NAMES if (folder / name).is_file()), None)


@dataclass(frozen=True, slots=True)
class TraceScenario(Scenario):
    """A seed spreads the arrivals within their ticks; the requests are always the trace's."""

    trace: Trace = field(kw_only=True)
    speedup: float = field(kw_only=True)
    trace_s: float = field(kw_only=True)

    def load(self, seed: int) -> Load:
        workload = self._workload(seed)
        return Load(workload.arrival_s, workload.prompt_tokens, workload.output_tokens)

    def caches(self, seed: int) -> RegionCaches:
        workload = self._workload(seed)
        names = self.cluster.region_names
        capacity = {names.index(region): size for region, size in CAPACITY_BYTES.items() if region in names}
        sizes = cache_sizes(self.cluster.groups[0].profile, self.trace.block_tokens)
        return RegionCaches(workload.prefixes, workload.prompt_tokens, sizes, capacity)

    def _workload(self, seed: int) -> Workload:
        times = TraceTimes(speedup=self.speedup)
        return trace_workload(self.trace, Rngs.from_seed(seed), times, TraceCut(0.0, self.trace_s))


def cache_sizes(profile: NodeProfile, block_tokens: int) -> CacheSizes:
    """What grows with the length lies in blocks; what doesn't is the state of a hybrid model, one snapshot."""
    fixed = profile.kv_bytes.at(0.0)
    longest = profile.kv_bytes.longest
    per_token = (profile.kv_bytes.at(longest) - fixed) / longest
    return CacheSizes(round(per_token * block_tokens), block_tokens, round(fixed))


def trace_scenario(path: Path, load_share: float = LOAD_SHARE, trace_s: float = TRACE_S) -> TraceScenario:
    """Raises ConfigError that names the line of a broken trace."""
    return scenario_of(read_mooncake(read_lines(str(path)), path.name), load_share, trace_s)


def scenario_of(trace: Trace, load_share: float = LOAD_SHARE, trace_s: float = TRACE_S) -> TraceScenario:
    """Of a trace that is read already."""
    lasts_s = min(trace_s, float(trace.at_s[-1]) + 1e-6)
    seen = trace.at_s < lasts_s
    h20, h200 = shipped("paper-h20"), shipped("paper-h200")
    output = trace.output_tokens[seen]
    context_tokens = float(trace.prompt_tokens[seen].mean() + output.mean() / 2)
    uncached = uncached_lengths(trace, int(np.count_nonzero(seen)), cache_sizes(h200, trace.block_tokens))
    demand = Demand(sample_of(uncached), float(output.mean()), context_tokens)
    link = LinkProfile(LINK.bandwidth_bytes_per_s, RTT_S)
    best = plan(demand, HomePool(h20, 8), (OffloadPool(h200, 4, link),), replace(LIVE, tpot_limit_s=0.025))
    rate = load_share * best.lambda_max
    speedup = rate * lasts_s / int(np.count_nonzero(seen))
    end_s = lasts_s / speedup
    cluster = Cluster(
        [
            Group(HOME, "prefill", h20, best.n_prefill),
            Group(HOME, "decode", h20, best.n_decode),
            Group(AWAY, "prefill", h200, 4),
        ],
        {(AWAY, HOME): link, (HOME, AWAY): link},
    )
    title = f"{trace.name}, {speedup:.2g} times as fast as recorded, with its prefix hits"
    return TraceScenario(
        "trace",
        title,
        cluster,
        best.threshold_tokens,
        rate,
        (),
        (),
        (end_s * WARM_SHARE, end_s),
        # Nothing certain happens: a clairvoyant may change its mind in the middle.
        (end_s * WARM_SHARE, end_s * (1 + WARM_SHARE) / 2),
        trace=trace,
        speedup=speedup,
        trace_s=lasts_s,
    )


def uncached_lengths(trace: Trace, requests: int, sizes: CacheSizes) -> NDArray[np.int64]:
    """What one pool of the home region's size leaves to be computed of the trace's first requests, in their order."""
    prompts = trace.prompt_tokens[:requests]
    prefixes = TracePrefixes(trace.block_tokens, prompts, trace.block_offsets[: requests + 1], trace.block_ids)
    pool = RegionCaches(prefixes, prompts, sizes, {0: CAPACITY_BYTES[HOME]})
    held = np.zeros(requests, np.int64)
    for i in range(requests):
        matches = pool.matches(i)
        held[i] = 0 if matches is None else matches.in_region(0)
        pool.prefilled(i, 0, 0)
    return prompts - held


def synthetic(seed: int = 0, conversations: int = 400, block_tokens: int = 512) -> Trace:
    """A small stand-in where the trace isn't there: conversations whose turns begin with all that was said before, in
    the trace's format."""
    rng = np.random.default_rng(seed)
    rows: list[tuple[float, int, int, list[int]]] = []
    fresh = 0
    for _ in range(conversations):
        at_s, tokens = float(rng.uniform(0, 1500)), 0
        blocks: list[int] = []
        for _ in range(int(rng.geometric(0.35))):
            tokens += int(np.clip(rng.lognormal(8.3, 1.1), 64, 60_000))
            if tokens > 120_000:
                break
            while len(blocks) < tokens // block_tokens:
                blocks.append(fresh)
                fresh += 1
            tail = [fresh] if tokens % block_tokens else []
            fresh += len(tail)
            rows.append((at_s, tokens, int(np.clip(rng.lognormal(5.6, 0.8), 8, 2000)), [*blocks, *tail]))
            at_s += float(rng.exponential(60.0))
    rows.sort(key=lambda row: row[0])
    at_s_, prompts, outputs, ids = zip(*rows, strict=True)
    offsets = np.concatenate(([0], np.cumsum([len(each) for each in ids])))
    flat: NDArray[np.int64] = np.concatenate([np.array(each, np.int64) for each in ids])
    times = np.array(at_s_) - at_s_[0]
    return Trace("synthetic conversations", times, np.array(prompts), np.array(outputs), block_tokens, offsets, flat)
