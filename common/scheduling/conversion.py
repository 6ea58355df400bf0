"""When home nodes change their role: the slow planner's second half.

`decide` is called with what was measured, every `period_s`. It plans the best split, goes at most `max_nodes` of the
way there, and does so only when all of this holds, so that a noisy load doesn't send nodes to and fro:

needed      the stage that would gain is busy (utilisation or queue) and busier than the stage that would lose;
gain        Λ_max rises by `min_gain`;
cost        what Λ_max gains over `horizon_s` is more than the nodes' average share of it while they are away. (Λ itself
            loses nothing: only the stage with room to spare is short of them. What is lost is that room, and caches.)
confirmed   the plan wanted this direction `confirmations` times running;
cooled      the last conversion was `cool_down_s` ago; to undo it twice as long, the next time four times …, at most
            `horizon_s`: a load that swings is expected to swing again. A split that lasts twice that is trusted anew.

The paper says when ("Θ_prfaas + Θ_pd-p ≪ Θ_pd-d", seen by queue depth and utilisation), not how much or how often: each
number is a setting. After a conversion the threshold is searched again for the split that then holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from prfaas.common.errors import InfeasibleError
from prfaas.common.scheduling.planner import LIVE, Demand, HomePool, OffloadPool, Plan, PlannerSettings, plan

Reason = Literal[
    "convert",
    "not_due",
    "balanced",
    "not_needed",
    "gain_too_small",
    "cost_too_high",
    "confirming",
    "cooling_down",
    "converting",
    "not_the_planner",
    "roles_fixed",
]
Hindrance = Literal["converting", "not_the_planner", "roles_fixed"]
"""Why the caller can't convert just now: a node is still changing its role; another router holds the planner's lease;
roles are not to be planned."""


@dataclass(frozen=True, slots=True)
class ConversionSettings:
    """The paper's open points of role conversion, with units."""

    period_s: float = 60.0
    """Between two plans."""
    min_gain: float = 0.05
    """Least relative rise of Λ_max that is worth a conversion."""
    switch_s: float = 60.0
    """The cost of a conversion: a node serves in neither role for so long, s. It drains, starts again, and warms up."""
    horizon_s: float = 1800.0
    """A load like the present one is expected to last this long; the cost must come back within it."""
    confirmations: int = 2
    """Plans in a row that must want the same direction."""
    cool_down_s: float = 300.0
    """Between two conversions; longer than a switch, so that the load is seen with the new split. Conversions that take
    one another back are further apart each time, up to `horizon_s`."""
    max_nodes: int = 1
    """Nodes in one conversion."""
    busy_utilisation: float = 0.85
    """A stage this busy, 0 to 1, needs nodes ..."""
    busy_queue_s: float = 5.0
    """... and so does one whose queue takes this long, s."""

    def __post_init__(self) -> None:
        for name in (
            "period_s",
            "min_gain",
            "switch_s",
            "horizon_s",
            "cool_down_s",
            "busy_utilisation",
            "busy_queue_s",
        ):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} = {getattr(self, name)} must be finite and at least 0")
        if self.confirmations < 1 or self.max_nodes < 1:
            raise ValueError("confirmations and max_nodes must be at least 1")


@dataclass(frozen=True, slots=True)
class StageLoad:
    """Of the home region's nodes in one role, over the last period. utilisation: busy share of prefill nodes, occupied
    share of decode slots, 0 to 1. queue_s: how long the work that waits for this stage would take it."""

    utilisation: float
    queue_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ConversionState:
    """What `decide` must remember; begin with ConversionState()."""

    planned_s: float = -math.inf
    converted_s: float = -math.inf
    direction: int = 0
    """1: plans want more prefill nodes; -1: more decode nodes."""
    agreed: int = 0
    """Plans in a row with that direction."""
    converted_to: int = 0
    """The direction of the last conversion; 0: there was none."""
    undone: int = 0
    """Conversions lately that each took back what the one before had done."""


@dataclass(frozen=True, slots=True)
class ConversionDecision:
    """to_prefill: home nodes to convert from decode to prefill; negative: the other way; 0: none. plan: what holds now
    (or after the conversion), with its threshold; None when no plan was due. gain: relative rise of Λ_max that the
    conversion would bring. wanted: what to_prefill is or, were there no reason against it, would be. reason: one word
    for logs and metrics."""

    to_prefill: int
    reason: Reason
    plan: Plan | None = None
    gain: float = 0.0
    wanted: int = 0


def converted(state: ConversionState, now_s: float, direction: int, settings: ConversionSettings) -> ConversionState:
    """The state after a conversion in this direction, whoever decided it. What plans had agreed on begins anew."""
    undone = state.undone if now_s < state.converted_s + 2 * settings.horizon_s else 0
    if direction * state.converted_to < 0:
        undone += 1
    return ConversionState(state.planned_s, now_s, converted_to=direction, undone=undone)


def cool_down_s(state: ConversionState, direction: int, settings: ConversionSettings) -> float:
    """From the last conversion to one in this direction, at least."""
    if direction * state.converted_to >= 0:
        return settings.cool_down_s
    longer = settings.cool_down_s * 2.0 ** min(1 + state.undone, 64)
    return max(settings.cool_down_s, min(longer, settings.horizon_s))


def decide(
    state: ConversionState,
    now_s: float,
    demand: Demand,
    home: HomePool,
    offload: Sequence[OffloadPool],
    n_prefill: int,
    prefill: StageLoad,
    decode: StageLoad,
    settings: ConversionSettings = ConversionSettings(),
    planner: PlannerSettings = LIVE,
    hindrance: Hindrance | None = None,
) -> tuple[ConversionState, ConversionDecision]:
    """The state to keep, and what to do. `home.nodes` counts nodes that serve, `n_prefill` of them prefill. hindrance:
    nothing is converted, whatever is planned.

    Raises InfeasibleError when no split can serve the demand at all, ConfigError as `plan` does.
    """
    if now_s < state.planned_s + settings.period_s:
        return state, ConversionDecision(0, "not_due")
    wanted = plan(demand, home, offload, planner).n_prefill - n_prefill
    step = max(-settings.max_nodes, min(settings.max_nodes, wanted))
    direction = (step > 0) - (step < 0)
    agreed = state.agreed + 1 if direction and direction == state.direction else abs(direction)
    state = replace(state, planned_s=now_s, direction=direction, agreed=agreed)
    now = _plan_with(demand, home, offload, planner, n_prefill)
    if not step:
        return state, ConversionDecision(0, "balanced", now)
    after = _plan_with(demand, home, offload, planner, n_prefill + step)
    carried_now, carried_after = _rate(now), _rate(after)
    gain = carried_after / carried_now - 1 if carried_now > 0 else math.inf
    reason = _against(state, now_s, settings, gain, (prefill, decode) if step > 0 else (decode, prefill))
    away_s = settings.switch_s * abs(step) / home.nodes
    if reason is None and (carried_after - carried_now) * settings.horizon_s <= carried_now * away_s:
        reason = "cost_too_high"
    reason = reason or hindrance
    if reason is not None:
        return state, ConversionDecision(0, reason, now, gain, step)
    return converted(state, now_s, direction, settings), ConversionDecision(step, "convert", after, gain, step)


def _against(
    state: ConversionState,
    now_s: float,
    settings: ConversionSettings,
    gain: float,
    loads: tuple[StageLoad, StageLoad],
) -> Reason | None:
    """What speaks against it, cost aside; loads: of the stage that gains nodes, of the one that loses them."""
    gaining, losing = loads
    busy = gaining.utilisation >= settings.busy_utilisation or gaining.queue_s >= settings.busy_queue_s
    if not busy or (losing.utilisation, losing.queue_s) >= (gaining.utilisation, gaining.queue_s):
        return "not_needed"
    if gain < settings.min_gain:
        return "gain_too_small"
    if state.agreed < settings.confirmations:
        return "confirming"
    if now_s < state.converted_s + cool_down_s(state, state.direction, settings):
        return "cooling_down"
    return None


def _plan_with(
    demand: Demand, home: HomePool, offload: Sequence[OffloadPool], planner: PlannerSettings, n_prefill: int
) -> Plan | None:
    """None: this split serves nothing."""
    try:
        return plan(demand, home, offload, planner, n_prefill=n_prefill)
    except InfeasibleError:
        return None


def _rate(made: Plan | None) -> float:
    return 0.0 if made is None else made.lambda_max
