"""One scenario, several policies, and what could have been: the best threshold found afterwards, and a clairvoyant.

All sides are given the same requests and admit alike (`policies.Admission`: refused if predicted late where the policy
would send it), and are judged by goodput in the window. Per seed:

(a) planned      the static threshold that the planner finds for the steady case
(b) static       the best of all static thresholds of a grid, chosen afterwards for this very run
(c) clairvoyant  the best of (a), (b) and of schedules that know when the event begins and ends: for each of its phases
                 the best threshold, under the static rule and under the priced rule at several prices, searched in
                 turn for this very run until no single change helps

(c) is the best that was found by a search that sees the future, not a proof that there is nothing better. A bound over
*all* policies would have to refuse the longest prompts whenever there is a queue, since goodput counts requests; here
nobody may choose whom to refuse, on either side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from prfaas.common.scheduling.policies import AdaptiveThreshold, StaticThreshold
from prfaas.common.scheduling.types import AdmittingPolicy, ClusterSnapshot
from prfaas.loadgen.simulator.caches import CacheBlind
from prfaas.loadgen.simulator.case_paper import HOME
from prfaas.loadgen.simulator.columns import DONE, Load, Outcome
from prfaas.loadgen.simulator.measures import Objective, goodput, offered, ttft_s
from prfaas.loadgen.simulator.scenarios import Scenario
from prfaas.loadgen.simulator.simulation import Simulation

Tick = Callable[[float, ClusterSnapshot], None]
STATIC_FACTORS = (0.25, 0.35, 0.5, 0.7, 0.85, 1.0, 1.2, 1.4, 1.7, 2.0, 2.8, 4.0)
"""Thresholds tried, over the planned one; besides them 0 (all are offloaded) and infinity (none)."""
PHASE_FACTORS = (0.25, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 8.0)
PRICED = ((8.0, 0.3), (8.0, 0.0), (2.0, 0.3))
"""(price, spill) of the clairvoyant's priced schedules."""
OBJECTIVE = Objective()


@dataclass(slots=True)
class Figures:
    """Of one policy in one run."""

    goodput: float
    offered: float
    ttft_mean_s: float
    ttft_p90_s: float
    share_offloaded: float
    share_refused: float
    egress_gbps: float


@dataclass(slots=True)
class Compared:
    """One seed. goodput by name: adaptive, planned, static, clairvoyant."""

    figures: dict[str, Figures]
    best_static_tokens: float
    clairvoyant: str
    tried: int = field(default=0)


def figures(scenario: Scenario, outcome: Outcome) -> Figures:
    """Over requests that arrived in the scenario's window."""
    start_s, end_s = scenario.window_s
    inside = (outcome.arrival_s >= start_s) & (outcome.arrival_s < end_s)
    served = inside & (outcome.status == DONE)
    first_s = ttft_s(outcome)[served]
    return Figures(
        goodput(outcome, OBJECTIVE, start_s, end_s),
        offered(outcome, start_s, end_s),
        float(first_s.mean()) if first_s.size else float("nan"),
        float(np.quantile(first_s, 0.9)) if first_s.size else float("nan"),
        float(outcome.offloaded[served].mean()) if first_s.size else float("nan"),
        1 - int(np.count_nonzero(served)) / max(1, int(np.count_nonzero(inside))),
        float((outcome.wire_bytes + outcome.fetched_bytes)[served].sum()) / (end_s - start_s) * 8e-9,
    )


@dataclass(frozen=True, slots=True)
class Given:
    """What one seed gives to every policy."""

    scenario: Scenario
    seed: int
    load: Load

    @classmethod
    def of(cls, scenario: Scenario, seed: int) -> Given:
        return cls(scenario, seed, scenario.load(seed))

    def simulate(self, policy: AdmittingPolicy, on_tick: Tick | None = None) -> Outcome:
        """One run of one policy."""
        scenario = self.scenario
        caches = scenario.caches(self.seed)
        return Simulation(scenario.cluster, self.load, policy, scenario.changes, caches=caches, on_tick=on_tick).run()


def adaptive(given: Given) -> Outcome:
    """Ours, as it starts from the plan."""
    policy = AdaptiveThreshold(planned_tokens=given.scenario.planned_threshold_tokens)
    return given.simulate(policy, policy.adapt)


def cache_blind(given: Given) -> Outcome:
    """Ours, but not told what caches hold."""
    policy = AdaptiveThreshold(planned_tokens=given.scenario.planned_threshold_tokens)
    return given.simulate(CacheBlind(policy), policy.adapt)


def static(given: Given, threshold_tokens: float) -> Outcome:
    """The paper's rule with a threshold that stays."""
    return given.simulate(StaticThreshold(threshold_tokens=threshold_tokens))


@dataclass(frozen=True, slots=True)
class Schedule:
    """Thresholds by phase: before the event, in it, after it; one where nothing happens. price None: static rule."""

    thresholds: tuple[float, ...]
    price: float | None = None
    spill: float = 0.0


def scheduled(given: Given, schedule: Schedule) -> Outcome:
    """A policy that knows when things change."""
    policy: StaticThreshold | AdaptiveThreshold
    if schedule.price is None:
        policy = StaticThreshold(threshold_tokens=schedule.thresholds[0])
    else:
        policy = AdaptiveThreshold(planned_tokens=schedule.thresholds[0], spill=schedule.spill)
    home = given.scenario.cluster.region_names.index(HOME)

    def tick(now_s: float, _: ClusterSnapshot) -> None:
        phase = sum(now_s >= instant for instant in given.scenario.instants_s)
        if isinstance(policy, StaticThreshold):
            policy.threshold_tokens = schedule.thresholds[phase]
        else:
            control = policy.controller(home)
            control.threshold_tokens = schedule.thresholds[phase]
            control.price = schedule.price or 0.0

    tick(0.0, ClusterSnapshot())
    return given.simulate(policy, tick)


def compare(scenario: Scenario, seed: int) -> Compared:
    """All sides on one seed's requests."""
    given = Given.of(scenario, seed)
    planned_tokens = scenario.planned_threshold_tokens
    ours = figures(scenario, adaptive(given))
    statics = {t: figures(scenario, static(given, t)) for t in static_grid(planned_tokens)}
    best = max(statics, key=lambda t: statics[t].goodput)
    schedule, found, tried = _search(given, best)
    named = f"static {best:.0f}"
    if found.goodput > statics[best].goodput:
        rule = "static" if schedule.price is None else f"price {schedule.price:g}, spill {schedule.spill:g}"
        named = f"{rule}: {' → '.join(f'{t:.0f}' for t in schedule.thresholds)}"
    else:
        found = statics[best]
    if ours.goodput > found.goodput:
        found, named = ours, "adaptive"
    made = {"adaptive": ours, "planned": statics[planned_tokens], "static": statics[best], "clairvoyant": found}
    if scenario.caches(seed) is not None:
        made["cache_blind"] = figures(scenario, cache_blind(given))
    return Compared(made, best, named, tried + len(statics))


def static_grid(planned_tokens: float) -> list[float]:
    return [0.0, *(planned_tokens * factor for factor in STATIC_FACTORS), float("inf")]


def _search(given: Given, best_static: float) -> tuple[Schedule, Figures, int]:
    """Coordinate ascent over the phases of each rule. The phase before an event stays as planned: the window begins
    with the event."""
    scenario = given.scenario
    planned_tokens = scenario.planned_threshold_tokens
    grid = [planned_tokens * factor for factor in PHASE_FACTORS]
    best: tuple[Figures, Schedule] | None = None
    tried = 0
    start = best_static if np.isfinite(best_static) else planned_tokens
    for price, spill in ((None, 0.0), *PRICED):
        thresholds = (planned_tokens, start, planned_tokens) if scenario.instants_s else (start,)
        schedule = Schedule(thresholds, price, spill)
        current = figures(scenario, scheduled(given, schedule))
        changed = True
        while changed:
            changed = False
            for phase in range(1 if scenario.instants_s else 0, len(thresholds)):
                for other in _neighbours(schedule, phase, grid):
                    made = figures(scenario, scheduled(given, other))
                    tried += 1
                    if made.goodput > current.goodput:
                        current, schedule, changed = made, other, bool(scenario.instants_s)
        if best is None or current.goodput > best[0].goodput:
            best = current, schedule
    assert best is not None
    return best[1], best[0], tried


def _neighbours(schedule: Schedule, phase: int, grid: Sequence[float]) -> Iterator[Schedule]:
    for tokens in grid:
        if tokens != schedule.thresholds[phase]:
            thresholds = (*schedule.thresholds[:phase], tokens, *schedule.thresholds[phase + 1 :])
            yield Schedule(thresholds, schedule.price, schedule.spill)
