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
from prfaas.loadgen.simulator.measures import Objective, goodput, offered, ttft_s
from prfaas.loadgen.simulator.scenarios import Scenario
from prfaas.loadgen.simulator.simulation import DONE, Load, Outcome, Simulation

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
        float(outcome.wire_bytes[served].sum()) / (end_s - start_s) * 8e-9,
    )


def simulate(scenario: Scenario, load: Load, policy: AdmittingPolicy, on_tick: Tick | None = None) -> Outcome:
    """One run of one policy."""
    return Simulation(scenario.cluster, load, policy, scenario.changes, on_tick=on_tick).run()


def adaptive(scenario: Scenario, load: Load) -> Outcome:
    """Ours, as it starts from the plan."""
    policy = AdaptiveThreshold(planned_tokens=scenario.planned_threshold_tokens)
    return simulate(scenario, load, policy, policy.adapt)


def static(scenario: Scenario, load: Load, threshold_tokens: float) -> Outcome:
    """The paper's rule with a threshold that stays."""
    return simulate(scenario, load, StaticThreshold(threshold_tokens=threshold_tokens))


@dataclass(frozen=True, slots=True)
class Schedule:
    """Thresholds by phase: before the event, in it, after it. price None: the static rule."""

    thresholds: tuple[float, ...]
    price: float | None = None
    spill: float = 0.0


def scheduled(scenario: Scenario, load: Load, schedule: Schedule) -> Outcome:
    """A policy that knows when things change."""
    policy: StaticThreshold | AdaptiveThreshold
    if schedule.price is None:
        policy = StaticThreshold(threshold_tokens=schedule.thresholds[0])
    else:
        policy = AdaptiveThreshold(planned_tokens=schedule.thresholds[0], spill=schedule.spill)
    home = scenario.cluster.region_names.index("pd")

    def tick(now_s: float, _: ClusterSnapshot) -> None:
        phase = sum(now_s >= instant for instant in scenario.instants_s)
        if isinstance(policy, StaticThreshold):
            policy.threshold_tokens = schedule.thresholds[phase]
        else:
            control = policy.controller(home)
            control.threshold_tokens = schedule.thresholds[phase]
            control.price = schedule.price or 0.0

    tick(0.0, ClusterSnapshot())
    return simulate(scenario, load, policy, tick)


def compare(scenario: Scenario, seed: int) -> Compared:
    """All sides on one seed's requests."""
    load = scenario.load(seed)
    planned_tokens = scenario.planned_threshold_tokens
    ours = figures(scenario, adaptive(scenario, load))
    statics = {t: figures(scenario, static(scenario, load, t)) for t in static_grid(planned_tokens)}
    best = max(statics, key=lambda t: statics[t].goodput)
    schedule, found, tried = _search(scenario, load, best)
    named = f"static {best:.0f}"
    if found.goodput > statics[best].goodput:
        rule = "static" if schedule.price is None else f"price {schedule.price:g}, spill {schedule.spill:g}"
        named = f"{rule}: {' → '.join(f'{t:.0f}' for t in schedule.thresholds)}"
    else:
        found = statics[best]
    if ours.goodput > found.goodput:
        found, named = ours, "adaptive"
    return Compared(
        {"adaptive": ours, "planned": statics[planned_tokens], "static": statics[best], "clairvoyant": found},
        best,
        named,
        tried + len(statics),
    )


def static_grid(planned_tokens: float) -> list[float]:
    return [0.0, *(planned_tokens * factor for factor in STATIC_FACTORS), float("inf")]


def _search(scenario: Scenario, load: Load, best_static: float) -> tuple[Schedule, Figures, int]:
    """Coordinate ascent over the phases of each rule. The phase before the event stays as planned: the window begins
    with the event."""
    planned_tokens = scenario.planned_threshold_tokens
    grid = [planned_tokens * factor for factor in PHASE_FACTORS]
    best: tuple[Figures, Schedule] | None = None
    tried = 0
    for price, spill in ((None, 0.0), *PRICED):
        start = best_static if np.isfinite(best_static) else planned_tokens
        schedule = Schedule((planned_tokens, start, planned_tokens), price, spill)
        current = figures(scenario, scheduled(scenario, load, schedule))
        changed = True
        while changed:
            changed = False
            for phase in (1, 2):
                for other in _neighbours(schedule, phase, grid):
                    made = figures(scenario, scheduled(scenario, load, other))
                    tried += 1
                    if made.goodput > current.goodput:
                        current, schedule, changed = made, other, True
        if best is None or current.goodput > best[0].goodput:
            best = current, schedule
    assert best is not None
    return best[1], best[0], tried


def _neighbours(schedule: Schedule, phase: int, grid: Sequence[float]) -> Iterator[Schedule]:
    for tokens in grid:
        if tokens != schedule.thresholds[phase]:
            thresholds = (*schedule.thresholds[:phase], tokens, *schedule.thresholds[phase + 1 :])
            yield Schedule(thresholds, schedule.price, schedule.spill)
