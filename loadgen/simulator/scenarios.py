"""Further than the paper: what happens to its PrfaaS system on a bad day, and to whom a region's nodes are lost.

Every scenario is the paper's cluster at `load_share` of its planned Λ_max, steady for `EVENT_S`, then the event, then
recovery. The window in which goodput is counted begins with the event and ends `RECOVERY_S` after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from prfaas.common.perfmodel.links import LinkProfile
from prfaas.loadgen.plan import case_paper as planned
from prfaas.loadgen.simulator.caches import RegionCaches
from prfaas.loadgen.simulator.case_paper import AWAY, HOME, RTT_S, systems
from prfaas.loadgen.simulator.cluster import Change, Cluster, LinkChange, NodesBack, NodesLost
from prfaas.loadgen.simulator.columns import Load
from prfaas.loadgen.workloads.arrivals import RateCurve
from prfaas.loadgen.workloads.lengths import PAPER_INPUT_LENGTHS, PAPER_OUTPUT_LENGTHS, TruncatedLogNormal
from prfaas.loadgen.workloads.rngs import Rngs

EVENT_S = 120.0
RECOVERY_S = 120.0
LOAD_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class Phase:
    """From `start_s` on: requests/s as a multiple of the steady rate, and the lengths' μ shifted by `mu_shift`."""

    start_s: float
    rate: float = 1.0
    mu_shift: float = 0.0


@dataclass(frozen=True, slots=True)
class Scenario:
    """steady_rate: requests/s before and after. window_s: in which goodput is counted. instants_s: at which a
    clairvoyant would change its mind."""

    name: str
    title: str
    cluster: Cluster
    planned_threshold_tokens: float
    steady_rate: float
    phases: tuple[Phase, ...]
    changes: tuple[Change, ...]
    window_s: tuple[float, float]
    instants_s: tuple[float, ...]

    def load(self, seed: int) -> Load:
        """The same for every policy: arrivals of a Poisson process whose rate follows the phases."""
        rngs = Rngs.from_seed(seed)
        starts = np.array([phase.start_s for phase in self.phases])
        rates = RateCurve(starts, np.array([phase.rate * self.steady_rate for phase in self.phases]))
        end_s = self.window_s[1]
        expected = rates.expected(end_s)
        count = int(expected + 6 * np.sqrt(expected)) + 10
        arrival_s = rates.times_of(np.cumsum(rngs.arrivals.exponential(1.0, count)))
        arrival_s = arrival_s[arrival_s < end_s]
        return Load(
            arrival_s,
            self._prompts(arrival_s, rngs),
            PAPER_OUTPUT_LENGTHS.sample(arrival_s.size, rngs.output_lengths),
        )

    def caches(self, seed: int) -> RegionCaches | None:
        """New ones for one run; None: the prompts have nothing in common."""
        return None

    def _prompts(self, arrival_s: NDArray[np.float64], rngs: Rngs) -> NDArray[np.int64]:
        """Lengths of each phase's distribution from the same quantiles: a shift keeps who is long."""
        base = PAPER_INPUT_LENGTHS
        state = rngs.input_lengths.bit_generator.state
        prompts = np.zeros(arrival_s.size, np.int64)
        phase_of = np.searchsorted([phase.start_s for phase in self.phases], arrival_s, side="right") - 1
        for i, phase in enumerate(self.phases):
            rngs.input_lengths.bit_generator.state = state
            shifted = TruncatedLogNormal(base.mu + phase.mu_shift, base.sigma, base.low, base.high)
            drawn = shifted.sample(arrival_s.size, rngs.input_lengths)
            prompts[phase_of == i] = drawn[phase_of == i]
        return prompts


def scenarios(load_share: float = LOAD_SHARE) -> list[Scenario]:
    """The events of the paper's cluster that need no trace."""
    plan = planned.systems()["prfaas"].plan
    cluster = systems()["prfaas"].cluster
    steady = load_share * plan.lambda_max
    narrow, wide = (LinkProfile.of_gbps(gbps, RTT_S) for gbps in (8, 100))

    def scenario(
        name: str, title: str, lasts_s: float, phases: Sequence[Phase] = (), changes: Sequence[Change] = ()
    ) -> Scenario:
        end_s = EVENT_S + lasts_s
        return Scenario(
            name,
            title,
            cluster,
            plan.threshold_tokens,
            steady,
            (Phase(0.0), *phases),
            tuple(changes),
            (EVENT_S, end_s + RECOVERY_S),
            (EVENT_S, end_s),
        )

    return [
        scenario("steady", "nothing happens", 120),
        scenario(
            "link",
            "the link falls from 100 to 8 Gbps for two minutes",
            120,
            changes=[LinkChange(EVENT_S, AWAY, HOME, narrow), LinkChange(EVENT_S + 120, AWAY, HOME, wide)],
        ),
        scenario("burst", "a burst of 4× for a minute", 60, [Phase(EVENT_S, 4.0), Phase(EVENT_S + 60)]),
        scenario(
            "longer",
            "prompts get twice as long for four minutes, half as many",
            240,
            [Phase(EVENT_S, 0.5, np.log(2.0)), Phase(EVENT_S + 240)],
        ),
        scenario(
            "shorter",
            "prompts get half as long for four minutes, 1.3 times as many",
            240,
            [Phase(EVENT_S, 1.3, -np.log(2.0)), Phase(EVENT_S + 240)],
        ),
        scenario(
            "prfaas_half",
            "the PrfaaS region loses half its nodes for two minutes",
            120,
            changes=[NodesLost(EVENT_S, AWAY, 0.5), NodesBack(EVENT_S + 120, AWAY)],
        ),
        scenario(
            "home_half",
            "the home region loses half its nodes for two minutes",
            120,
            changes=[NodesLost(EVENT_S, HOME, 0.5), NodesBack(EVENT_S + 120, HOME)],
        ),
    ]
