"""The slow timescale, simulated: the mix of requests changes for an hour, and nodes change their roles, or don't.

The paper's PrfaaS system at a rate that its split can't carry any more once the mix has changed, while another split
could. Both sides route by the adaptive policy and admit alike; one has the slow planner besides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from prfaas.common.perfmodel.lengths import TruncatedLogNormal
from prfaas.common.scheduling.planner import Demand, plan
from prfaas.common.scheduling.policies import AdaptiveThreshold
from prfaas.common.scheduling.slow_planner import SlowPlanner
from prfaas.loadgen.plan import case_paper as planned
from prfaas.loadgen.simulator.columns import Load
from prfaas.loadgen.simulator.compare import Figures, figures
from prfaas.loadgen.simulator.measures import interval
from prfaas.loadgen.simulator.scenarios import EVENT_S, Phase, Scenario, scenarios
from prfaas.loadgen.simulator.simulation import Simulation
from prfaas.loadgen.workloads.lengths import PAPER_INPUT_LENGTHS

DRIFT_S = 3600.0
SWING_S = 240.0
"""Half a period of a load that swings: shorter than a conversion pays."""
DEFAULT_SEEDS = 3
SIDES = ("stays", "replanned")


@dataclass(frozen=True, slots=True)
class Drift:
    """From `EVENT_S` on, or in every second `swing_s` from then on, outputs are `output_factor` as long and prompts'
    lengths and rate are those of the scenario's phases."""

    scenario: Scenario
    output_factor: float = 1.0
    swing_s: float = 0.0

    def load(self, seed: int) -> Load:
        drawn = self.scenario.load(seed)
        output = np.where(self._drifted(drawn.arrival_s), drawn.output_tokens * self.output_factor, drawn.output_tokens)
        return Load(drawn.arrival_s, drawn.prompt_tokens, output.astype(np.int64))

    def _drifted(self, at_s: Any) -> Any:
        after_s = at_s - EVENT_S
        if not self.swing_s:
            return after_s >= 0
        return (after_s >= 0) & (after_s // self.swing_s % 2 == 0)


def drifts() -> list[Drift]:
    """What an hour may bring."""
    steady = scenarios()[0]

    def drift(name: str, title: str, rate: float, mu_shift: float, output: float, swing_s: float = 0.0) -> Drift:
        phases = (Phase(0.0), Phase(EVENT_S, rate, mu_shift))
        window_s = (EVENT_S, EVENT_S + DRIFT_S)
        scenario = replace(steady, name=name, title=title, phases=phases, window_s=window_s, instants_s=())
        return Drift(scenario, output, swing_s)

    return [
        drift("answers_longer", "answers get twice as long for an hour", 1.0, 0.0, 2.0),
        drift("answers_shorter", "answers get half as long, 1.35 times as many, for an hour", 1.35, 0.0, 0.5),
        drift(
            "prompts_shorter", "prompts get half as long, 1.6 times as many, for an hour", 1.6, -float(np.log(2)), 1.0
        ),
        drift("swings", f"answers get twice as long every other {SWING_S / 60:.0f} minutes", 1.0, 0.0, 2.0, SWING_S),
    ]


@dataclass(frozen=True, slots=True)
class Drifted:
    """One seed of one drift. conversions: nodes that changed their role, to prefill and to decode. split: prefill and
    decode nodes at home in the end. reversals: conversions that undid the one before."""

    stays: Figures
    replanned: Figures
    conversions: tuple[int, int]
    reversals: int
    split: tuple[int, int]


def run(drift: Drift, seed: int) -> Drifted:
    """Both sides on the same requests."""
    load, scenario = drift.load(seed), drift.scenario

    def simulated(slow: SlowPlanner | None) -> tuple[Figures, list[int]]:
        policy = AdaptiveThreshold(planned_tokens=scenario.planned_threshold_tokens)
        simulation = Simulation(scenario.cluster, load, policy, scenario.changes, on_tick=policy.adapt, slow=slow)
        made = figures(scenario, simulation.run())
        return made, [decision.to_prefill for _, decision in simulation.slow_decisions if decision.to_prefill]

    stays, _ = simulated(None)
    replanned, moves = simulated(SlowPlanner())
    home = scenario.cluster.groups[0].nodes, scenario.cluster.groups[1].nodes
    return Drifted(
        stays,
        replanned,
        (sum(m for m in moves if m > 0), -sum(m for m in moves if m < 0)),
        sum(a * b < 0 for a, b in pairwise(moves)),
        (home[0] + sum(moves), home[1] - sum(moves)),
    )


def planned_rates(drift: Drift) -> tuple[float, float]:
    """Λ_max under the drifted mix: of the split that was planned before, and of the best one."""
    base, shift = PAPER_INPUT_LENGTHS, drift.scenario.phases[-1].mu_shift
    lengths = TruncatedLogNormal(base.mu + shift, base.sigma, base.low, base.high)
    demand = Demand(lengths, planned.DEMAND.output_tokens * drift.output_factor)
    system = planned.systems()["prfaas"]
    before = plan(demand, system.home, system.offload, n_prefill=system.plan.n_prefill)
    return before.lambda_max, plan(demand, system.home, system.offload).lambda_max


def summary(drift: Drift, runs: Sequence[Drifted]) -> dict[str, Any]:
    """Means over seeds."""
    before, best = planned_rates(drift)
    gains = [run.replanned.goodput / run.stays.goodput - 1 for run in runs]
    return {
        "name": drift.scenario.name,
        "title": drift.scenario.title,
        "seeds": len(runs),
        "lambda_max_before": before,
        "lambda_max_best": best,
        "offered": float(np.mean([run.stays.offered for run in runs])),
        **{
            side: {
                key: float(np.mean([getattr(getattr(run, side), key) for run in runs]))
                for key in ("goodput", "ttft_mean_s", "share_refused")
            }
            for side in SIDES
        },
        "gain": interval(gains).as_dict(),
        "conversions": [run.conversions for run in runs],
        "reversals": [run.reversals for run in runs],
        "split": [run.split for run in runs],
    }


def table(made: Sequence[dict[str, Any]]) -> str:
    """In Markdown."""
    lines = [
        "| the mix | seeds | offered | Λ_max: split as it was / best | goodput: roles stay | replanned | gain |"
        " mean TTFT, s | refused | nodes converted | undone | split in the end |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for each in made:
        stays, ours, gain = each["stays"], each["replanned"], each["gain"]
        half = (gain["ci95_high"] - gain["ci95_low"]) / 2
        splits = ", ".join(sorted({f"{p} : {d}" for p, d in each["split"]}))
        lines.append(
            f"| {each['title']} | {each['seeds']} | {each['offered']:.3f} |"
            f" {each['lambda_max_before']:.3f} / {each['lambda_max_best']:.3f} | {stays['goodput']:.3f} |"
            f" {ours['goodput']:.3f} | {gain['mean'] * 100 + 0.0:+.1f} ± {half * 100:.1f} % |"
            f" {stays['ttft_mean_s']:.2f} → {ours['ttft_mean_s']:.2f} |"
            f" {stays['share_refused'] * 100:.1f} → {ours['share_refused'] * 100:.1f} % |"
            f" {_range([sum(c) for c in each['conversions']])} | {_range(each['reversals'])} | {splits} |"
        )
    return "\n".join(lines)


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"
