"""The slow timescale, as one state machine: what was measured in, what to do and why out. Pure.

    a request came       ──▶ arrived ─▶ lengths of the last `demand_s`
    every second or so   ──▶ observe ─▶ how busy each stage is, on the average since the last step
    when `step` is due   ──▶ a decision for each home region: nodes that change their role, a new threshold, the reason

The router calls it on its own clock and snapshot, the simulator on a virtual one. A *home region* is one that decodes.
Its nodes in either role can take the other; nodes of other regions that prefill are what it may offload to. Where there
are several home regions, each is planned with the share of the others' nodes that its own requests are of all.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from prfaas.common.errors import ConfigError, InfeasibleError
from prfaas.common.perfmodel.lengths import sample_of
from prfaas.common.perfmodel.links import LinkProfile
from prfaas.common.perfmodel.profiles import NodeProfile
from prfaas.common.scheduling.conversion import (
    ConversionDecision,
    ConversionSettings,
    ConversionState,
    Hindrance,
    StageLoad,
    converted,
    cool_down_s,
    decide,
)
from prfaas.common.scheduling.planner import LIVE, Demand, HomePool, OffloadPool, Plan, PlannerSettings
from prfaas.common.scheduling.types import ROLE_DECODE, ROLE_PREFILL, ClusterSnapshot


@dataclass(frozen=True, slots=True)
class SlowSettings:
    """What the paper leaves open of the slow timescale, besides the plan and the conversions themselves."""

    conversion: ConversionSettings = field(default_factory=ConversionSettings)
    planner: PlannerSettings = LIVE
    demand_s: float = 600.0
    """Requests of so long a time make the demand that is planned for (s): long beside a burst, short beside a day."""
    demand_requests: int = 4096
    """Of these at most so many, the newest: 2 ms of planning."""
    min_requests: int = 100
    """With fewer nothing is planned: their lengths say too little."""
    threshold_change: float = 0.1
    """A planned threshold that differs by less, relatively, is no news: the fast policy's adaptation goes on."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.demand_s) and self.demand_s > 0) or self.threshold_change < 0:
            raise ValueError("demand_s must be above 0 and threshold_change at least 0")
        if not 1 <= self.min_requests <= self.demand_requests:
            raise ValueError("min_requests must be from 1 to demand_requests")


@dataclass(frozen=True, slots=True)
class SlowDecision:
    """For one home region. to_prefill: of its nodes, so many go from decode to prefill; negative: the other way.
    threshold_tokens: the fast policy's new plan, None: as before. reason: conversion.Reason, or why nothing could be
    planned: too_few_requests, no_profile, infeasible. plan: of the split that holds from now on."""

    home_region: int
    to_prefill: int
    reason: str
    threshold_tokens: float | None
    plan: Plan | None
    gain: float
    n_prefill: int
    n_decode: int
    rate_per_s: float
    """Requests/s that came."""
    prefill: StageLoad
    decode: StageLoad
    detail: str = ""
    wanted: int = 0
    """What to_prefill would be, were there no reason against it."""

    def sentence(self) -> str:
        """For a log or a person."""
        stages = (
            f"prefill is {self.prefill.utilisation:.0%} busy with a queue of {self.prefill.queue_s:.1f} s, decode"
            f" {self.decode.utilisation:.0%} with {self.decode.queue_s:.1f} s"
        )
        split = f"{self.n_prefill} : {self.n_decode}"
        if self.plan is None:
            return f"{_WHY.get(self.reason, self.reason)}{': ' + self.detail if self.detail else ''}"
        after = f"{self.n_prefill + self.to_prefill} : {self.n_decode - self.to_prefill}"
        if self.to_prefill:
            return f"{split} becomes {after}: it carries {self.gain:+.0%} requests; {stages}"
        better = ""
        if self.wanted:
            other = f"{self.n_prefill + self.wanted} : {self.n_decode - self.wanted}"
            better = f" ({other} would carry {self.gain:+.0%})"
        return f"{split} stays{better}: {_WHY.get(self.reason, self.reason)}; {stages}"


_WHY = {
    "balanced": "no other split carries more",
    "not_needed": "the stage that would gain nodes is not the busier one",
    "gain_too_small": "that is too little",
    "cost_too_high": "a conversion would cost more than it brings back in time",
    "confirming": "the next plan must say so, too",
    "cooling_down": "the last conversion is too recent",
    "converting": "a node is still changing its role",
    "not_the_planner": "another router plans, or none has the lease",
    "roles_fixed": "nodes keep their roles (planner.mode)",
    "too_few_requests": "too few requests to know their lengths",
    "no_profile": "there is no profile of the nodes",
    "infeasible": "no split serves these requests",
}


@dataclass(slots=True)
class _Home:
    """What is remembered of one home region."""

    state: ConversionState = field(default_factory=ConversionState)
    threshold_tokens: float = math.nan
    """That was given out last."""
    stepped_s: float = -math.inf
    observed: int = 0
    sums: NDArray[np.float64] = field(default_factory=lambda: np.zeros(4))
    """Of the looks since the last step: utilisation and queue of prefill, and of decode."""
    means: NDArray[np.float64] = field(default_factory=lambda: np.zeros(4))
    """Of the looks before it."""

    def loads(self) -> NDArray[np.float64]:
        return self.sums / self.observed if self.observed else self.means


@dataclass(slots=True)
class SlowPlanner:
    """One a router or simulation. Call `arrived`, `observe` and `step` from one thread."""

    settings: SlowSettings = field(default_factory=SlowSettings)
    _arrivals: deque[tuple[float, int, int, int, int]] = field(init=False)
    _homes: dict[int, _Home] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._arrivals = deque(maxlen=self.settings.demand_requests)

    def arrived(
        self, now_s: float, uncached_tokens: int, output_tokens: int, context_tokens: int, home_region: int | None
    ) -> None:
        """One request, served or refused. uncached_tokens: that no cache which could be used had. context_tokens: that
        it holds while it decodes, on the average. home_region: that decodes it, None where that was not decided."""
        home = -1 if home_region is None else home_region
        self._arrivals.append((now_s, max(1, uncached_tokens), output_tokens, context_tokens, home))

    def observe(self, cluster: ClusterSnapshot) -> None:
        """Look how busy the stages are; they are averaged over the looks."""
        for region in home_regions(cluster):
            home = self._homes.setdefault(region, _Home())
            prefill, decode = stage_loads(cluster, region, self._mean_output())
            home.sums += (prefill.utilisation, prefill.queue_s, decode.utilisation, decode.queue_s)
            home.observed += 1

    def due(self, now_s: float) -> bool:
        return any(self._is_due(home, now_s) for home in self._homes.values())

    def step(
        self, cluster: ClusterSnapshot, hindrance: Callable[[int], Hindrance | None] = lambda region: None
    ) -> list[SlowDecision]:
        """The decisions that are due now, one a home region; the state goes on as if each was carried out. hindrance:
        why a region's nodes can't change their role now, if they can't."""
        made = []
        for region in home_regions(cluster):
            home = self._homes.setdefault(region, _Home())
            if self._is_due(home, cluster.now_s):
                made.append(self._decide(cluster, region, home, hindrance(region)))
                home.means, home.stepped_s, home.observed, home.sums = home.loads(), cluster.now_s, 0, np.zeros(4)
        return made

    def preview(self, cluster: ClusterSnapshot, region: int, hindrance: Hindrance | None = None) -> SlowDecision:
        """What `step` would decide were it due now, and nothing changes."""
        kept = self._homes.get(region, _Home())
        copy = replace(kept, state=replace(kept.state, planned_s=-math.inf))
        return self._decide(cluster, region, copy, hindrance)

    def begin(self, region: int, now_s: float) -> None:
        """Remember nothing of a home region, not even whether somebody converted nodes there a moment ago: it is
        taken for so."""
        self._homes[region] = _Home(ConversionState(converted_s=now_s))

    def converted(self, region: int, now_s: float, to_role: int) -> None:
        """A node there has changed its role, whoever told it to: the load is to be seen with the new split first."""
        home = self._homes.setdefault(region, _Home())
        direction = 1 if to_role == ROLE_PREFILL else -1
        home.state = converted(home.state, now_s, direction, self.settings.conversion)
        home.observed, home.sums = 0, np.zeros(4)

    def cool_down_left_s(self, region: int, now_s: float, direction: int = 0) -> float:
        """Until the next conversion may follow the last one. direction: 1: one to prefill, -1: to decode, 0: either."""
        home = self._homes.get(region)
        if home is None:
            return 0.0
        return max(0.0, home.state.converted_s + cool_down_s(home.state, direction, self.settings.conversion) - now_s)

    def next_step_in_s(self, region: int, now_s: float) -> float:
        """Until the next decision is due."""
        home = self._homes.get(region)
        if home is None:
            return 0.0
        return max(0.0, home.stepped_s + self.settings.conversion.period_s - now_s)

    def _is_due(self, home: _Home, now_s: float) -> bool:
        return home.observed > 0 and now_s >= home.stepped_s + self.settings.conversion.period_s * (1 - 1e-9)

    def _decide(self, cluster: ClusterSnapshot, region: int, home: _Home, hindrance: Hindrance | None) -> SlowDecision:
        loads = home.loads().tolist()
        prefill, decode = StageLoad(*loads[:2]), StageLoad(*loads[2:])
        n_prefill, n_decode = (int(_rows(cluster, region, role).size) for role in (ROLE_PREFILL, ROLE_DECODE))
        arrivals = self._recent(cluster.now_s, region)
        span_s = cluster.now_s - arrivals[0][0] if arrivals else 0.0
        rate = len(arrivals) / span_s if span_s > 0 else 0.0

        def answer(reason: str, decision: ConversionDecision | None = None, detail: str = "") -> SlowDecision:
            made = decision or ConversionDecision(0, "not_due")
            threshold = self._news(home, made.plan)
            return SlowDecision(
                region, made.to_prefill, reason, threshold, made.plan, made.gain, n_prefill, n_decode, rate, prefill,
                decode, detail, made.wanted,
            )  # fmt: skip

        if len(arrivals) < self.settings.min_requests:
            return answer("too_few_requests", detail=f"{len(arrivals)} of {self.settings.min_requests}")
        profile = _home_profile(cluster, region)
        if profile is None:
            return answer("no_profile")
        columns = np.array([row[1:4] for row in arrivals], np.float64)
        demand = Demand(
            sample_of(columns[:, 0].astype(np.int64)), float(columns[:, 1].mean()), float(columns[:, 2].mean())
        )
        try:
            home.state, decision = decide(
                home.state,
                cluster.now_s,
                demand,
                HomePool(profile, n_prefill + n_decode),
                self._offload(cluster, region, len(arrivals)),
                n_prefill,
                prefill,
                decode,
                self.settings.conversion,
                self.settings.planner,
                hindrance,
            )
        except (InfeasibleError, ConfigError) as error:
            return answer("infeasible", detail=str(error))
        return answer(decision.reason, decision)

    def _news(self, home: _Home, plan: Plan | None) -> float | None:
        """The plan's threshold, if the fast policy should hear of it. Where decode nodes prefill what stays at home,
        the plan says nothing of it: it has that stage do nothing."""
        if plan is None or not plan.n_prefill:
            return None
        old, new = home.threshold_tokens, plan.threshold_tokens
        if old == new or abs(new - old) <= self.settings.threshold_change * old:
            return None
        home.threshold_tokens = new
        return new

    def _recent(self, now_s: float, region: int) -> list[tuple[float, int, int, int, int]]:
        while self._arrivals and self._arrivals[0][0] < now_s - self.settings.demand_s:
            self._arrivals.popleft()
        return [row for row in self._arrivals if row[4] in (-1, region)]

    def _mean_output(self) -> float:
        return sum(row[2] for row in self._arrivals) / len(self._arrivals) if self._arrivals else 0.0

    def _offload(self, cluster: ClusterSnapshot, home: int, requests: int) -> list[OffloadPool]:
        """Prefill nodes elsewhere that this region can be sent KV from; its share of them, at least one node each."""
        share = requests / max(1, len(self._arrivals)) if len(home_regions(cluster)) > 1 else 1.0
        away = [pool for pool in cluster.pools(ROLE_PREFILL) if pool.region != home]
        usable = [int(np.count_nonzero(cluster.usable[pool.rows])) for pool in away]
        in_region: dict[int, int] = {}
        for pool, nodes in zip(away, usable, strict=True):
            in_region[pool.region] = in_region.get(pool.region, 0) + nodes
        pools = []
        for pool, nodes in zip(away, usable, strict=True):
            bandwidth = float(cluster.links.bandwidth_bytes_per_s[pool.region, home])
            if not nodes or bandwidth <= 0:
                continue
            # Nodes with another profile in the same region share its link.
            carried = bandwidth * share * nodes / in_region[pool.region]
            link = LinkProfile(carried, float(cluster.links.rtt_s[pool.region, home]))
            pools.append(OffloadPool(cluster.profiles[pool.profile], max(1, round(nodes * share)), link))
        return pools


def home_regions(cluster: ClusterSnapshot) -> list[int]:
    """Regions with a decode node, usable or not."""
    return sorted({pool.region for pool in cluster.pools(ROLE_DECODE)})


def stage_loads(cluster: ClusterSnapshot, region: int, output_tokens: float) -> tuple[StageLoad, StageLoad]:
    """(prefill, decode) of a home region now. Without prefill nodes of its own, prefill's is that of the others':
    where these are full, nodes at home are needed."""
    rows = _rows(cluster, region, ROLE_PREFILL)
    if not rows.size:
        rows = np.flatnonzero((cluster.role == ROLE_PREFILL) & cluster.usable)
    waits = np.maximum(cluster.prefill_free_at_s[rows] - cluster.now_s, 0.0)
    prefill = StageLoad(float((waits > 0).mean()), float(waits.mean())) if rows.size else StageLoad(1.0, 0.0)
    rows = _rows(cluster, region, ROLE_DECODE)
    if not rows.size:
        return prefill, StageLoad(1.0, 0.0)
    profiles = [cluster.profiles[int(p)] for p in cluster.profile[rows]]
    places = sum(profile.max_batch for profile in profiles)
    running = float(cluster.decoding_requests[rows].sum())
    waiting = float(cluster.waiting_requests[rows].sum())
    step_s = profiles[0].step_s(profiles[0].max_batch, 0.0) if profiles[0].decode_step_s is not None else 0.0
    return prefill, StageLoad(min(1.0, running / places), waiting / places * output_tokens * step_s)


def to_convert(cluster: ClusterSnapshot, region: int, to_role: int) -> NDArray[np.int64]:
    """The usable nodes of a region that have the other role, the one first that is drained soonest."""
    rows = np.flatnonzero((cluster.role != to_role) & (cluster.region == region) & cluster.usable)
    return rows[np.argsort(cluster.inflight_requests[rows], kind="stable")]


def _rows(cluster: ClusterSnapshot, region: int, role: int) -> NDArray[np.int64]:
    return np.flatnonzero((cluster.role == role) & (cluster.region == region) & cluster.usable)


def _home_profile(cluster: ClusterSnapshot, region: int) -> NodeProfile | None:
    """That of most nodes there which can decode."""
    rows = np.concatenate([_rows(cluster, region, role) for role in (ROLE_PREFILL, ROLE_DECODE)])
    found: Sequence[int] = cluster.profile[rows].tolist()
    able = [p for p in found if 0 <= p < len(cluster.profiles) and cluster.profiles[p].decode_step_s is not None]
    return cluster.profiles[max(set(able), key=able.count)] if able else None
