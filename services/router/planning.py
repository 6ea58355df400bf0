"""The slow planner in a router: when it steps, whether it may act, which nodes are to change their role. Pure.

    a request        ─▶ arrived, ended   what the mix is
    a heartbeat      ─▶ heard            roles that have changed;  bid ─▶ its answer asks for the planner's lease
    every second     ─▶ tick             thresholds are planned in place; orders come out, for services/router/roles.py
    GET /plan        ─▶ report

Every router plans, from the requests that came to it; thresholds are its own. Roles are everybody's: only the router
that holds the lease (common/scheduling/planner_lease.py) gives orders, one at a time in a region.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from prfaas.common import log
from prfaas.common.config import PlannerConfig
from prfaas.common.metrics import RouterMetrics
from prfaas.common.scheduling import planner_lease
from prfaas.common.scheduling.conversion import ConversionSettings, Hindrance
from prfaas.common.scheduling.planner import Plan, PlannerSettings
from prfaas.common.scheduling.policies import AdaptiveThreshold
from prfaas.common.scheduling.slow_planner import SlowDecision, SlowPlanner, SlowSettings, home_regions, to_convert
from prfaas.common.scheduling.types import (
    ROLE_DECODE,
    ROLE_PREFILL,
    AdmittingPolicy,
    ClusterSnapshot,
    Decision,
    Refused,
    RequestSnapshot,
)
from prfaas.services.messages import (
    ChangingNode,
    PastDecision,
    PlanFigures,
    PlannerStanding,
    PlanReport,
    RegionPlan,
)
from prfaas.services.router.registry import MAX_NODES, ROLES, Node, Registry

HISTORY = 100
"""Decisions that `report` tells of: all that converted a node, and else those whose reason is a new one."""
ANY_STEP_S = 60.0
"""tpot_limit_s of a plan that any step will do for."""
OUTPUT_WEIGHT = 0.99
"""Of the requests before, for each that ends, in the share of its longest output that a request really has."""

logger = log.get_logger("router")


@dataclass(frozen=True, slots=True)
class Order:
    """`count` of these nodes, in this order, are to take `role`."""

    region: str
    role: str
    count: int
    nodes: list[Node]
    reason: str


def slow_settings(config: PlannerConfig) -> SlowSettings:
    """As the operator has set it."""
    conversion = ConversionSettings(
        config.period_s,
        config.min_gain,
        config.switch_s,
        config.horizon_s,
        config.confirmations,
        config.cool_down_s,
        config.max_nodes,
        config.busy_utilisation,
        config.busy_queue_s,
    )
    planner = PlannerSettings(tpot_limit_s=config.tpot_limit_s or ANY_STEP_S)
    return SlowSettings(conversion, planner, demand_s=config.demand_s, min_requests=config.min_requests)


@dataclass(slots=True)
class Planning:
    """One a router. holder: under which name it asks for the lease, unique to this process. why_off: "": it plans."""

    config: PlannerConfig
    router: str
    holder: str
    registry: Registry
    policy: AdmittingPolicy
    metrics: RouterMetrics
    why_off: str = field(init=False, default="")
    standing: planner_lease.Standing = field(init=False, default=planner_lease.NOBODY)
    _slow: SlowPlanner = field(init=False)
    _names: dict[int, str] = field(init=False, default_factory=dict)
    """Home regions that the slow planner knows, by index: an index can become another region's."""
    _ordered: set[str] = field(init=False, default_factory=set)
    """Regions with an order that is being carried out."""
    _asked_tokens: float = field(init=False, default=0.0)
    _made_tokens: float = field(init=False, default=0.0)
    _unfit: dict[str, str] = field(init=False, default_factory=dict)
    """Epochs, by node, that can't take another role: they are not asked again."""
    _history: deque[PastDecision] = field(init=False, default_factory=lambda: deque(maxlen=HISTORY))
    _words: dict[str, str] = field(init=False, default_factory=dict)
    _said: dict[int, str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._slow = SlowPlanner(slow_settings(self.config))
        if self.config.mode == "off":
            self.why_off = "planner.mode is off"
        elif not isinstance(self.policy, AdaptiveThreshold):
            self.why_off = "router.policy is not adaptive"

    # -- what is measured --------------------------------------------------------------------------------------------

    def arrived(self, request: RequestSnapshot, answer: Decision | Refused, cluster: ClusterSnapshot) -> None:
        """A new request and what was decided of it. How long its output gets is reckoned from those that have ended."""
        if self.why_off:
            return
        share = self._made_tokens / self._asked_tokens if self._asked_tokens else 1.0
        output = max(1, round(request.max_output_tokens * share))
        held, home = 0, request.home_region
        if isinstance(answer, Decision):
            held, home = answer.prefill_start, cluster.region.item(answer.decode_node)
        prompt = request.prompt_tokens
        self._slow.arrived(cluster.now_s, prompt - held, output, prompt + output // 2, home)

    def ended(self, max_output_tokens: int, output_tokens: int) -> None:
        """A request has had its whole output."""
        self._asked_tokens = OUTPUT_WEIGHT * self._asked_tokens + max_output_tokens
        self._made_tokens = OUTPUT_WEIGHT * self._made_tokens + output_tokens

    def converted(self, node: Node, now_s: float) -> None:
        """A node's heartbeat comes in another role, whoever told it to change."""
        self._slow.converted(node.region_index, now_s, ROLES[node.role])

    # -- the lease ---------------------------------------------------------------------------------------------------

    def bid(self) -> str:
        """For the answer to a heartbeat: under which name this router asks for the lease; "": it doesn't."""
        return self.holder if self.standing.bids and self._converts else ""

    @property
    def _converts(self) -> bool:
        return not self.why_off and self.config.mode == "convert"

    def _look_at_lease(self, now_s: float) -> None:
        held = self.standing.holds(now_s)
        votes = self.registry.votes(now_s)
        self.standing = planner_lease.standing(self.holder, votes, self.config.lease_s, now_s)
        holds = self.standing.holds(now_s)
        if holds != held:
            logger.info("planner_lease", holds=holds, grants=self.standing.grants, needed=self.standing.needed)
        self.metrics.planner_lease.set(holds)

    # -- planning ----------------------------------------------------------------------------------------------------

    def tick(self, cluster: ClusterSnapshot, unix_s: float) -> list[Order]:
        """Every second or so, with a current snapshot: the orders that are due. `carried_out` ends each."""
        now_s = cluster.now_s
        self._look_at_lease(now_s)
        if self.why_off:
            return []
        for region in home_regions(cluster):
            if self._names.get(region) != cluster.region_names[region]:
                self._names[region] = cluster.region_names[region]
                self._slow.begin(region, now_s)
        self._slow.observe(cluster)
        if not self._slow.due(now_s):
            return []
        made = self._slow.step(cluster, lambda region: self._hindrance(cluster.region_names[region], now_s))
        return [order for decision in made if (order := self._decided(decision, cluster, unix_s)) is not None]

    def carried_out(self, order: Order) -> None:
        """All nodes that could be told have been, or none could."""
        self._ordered.discard(order.region)

    def is_unfit(self, node: Node) -> None:
        """It has said that it can't take another role."""
        self._unfit[node.name] = node.epoch
        while len(self._unfit) > MAX_NODES:
            del self._unfit[next(iter(self._unfit))]

    def _hindrance(self, region: str, now_s: float) -> Hindrance | None:
        if self.config.mode != "convert":
            return "roles_fixed"
        if region in self._ordered or self.registry.changing(region, now_s):
            return "converting"
        return None if self.standing.holds(now_s) else "not_the_planner"

    def _decided(self, decision: SlowDecision, cluster: ClusterSnapshot, unix_s: float) -> Order | None:
        region, index = cluster.region_names[decision.home_region], decision.home_region
        self.metrics.plans.labels(region, decision.reason).inc()
        self._words[region] = decision.sentence()
        news = decision.to_prefill or decision.threshold_tokens is not None or self._said.get(index) != decision.reason
        if decision.threshold_tokens is not None and isinstance(self.policy, AdaptiveThreshold):
            self.policy.plan(index, decision.threshold_tokens)
        if news:
            self._said[index] = decision.reason
            self._history.append(
                PastDecision(unix_s, region, decision.reason, decision.to_prefill, decision.sentence())
            )
            planned = decision.threshold_tokens
            logger.info("plan", region=region, reason=decision.reason, why=decision.sentence(), threshold=planned)
        if not decision.to_prefill:
            return None
        role, wanted = ("prefill", ROLE_PREFILL) if decision.to_prefill > 0 else ("decode", ROLE_DECODE)
        nodes = [self.registry.node(row) for row in to_convert(cluster, index, wanted).tolist()]
        fit = [node for node in nodes if self._unfit.get(node.name) != node.epoch]
        self._ordered.add(region)
        return Order(region, role, abs(decision.to_prefill), fit, decision.sentence())

    # -- for people --------------------------------------------------------------------------------------------------

    def report(self, cluster: ClusterSnapshot, unix_s: float) -> PlanReport:
        """What the next plan would be as of now, why, and what was planned before."""
        lease = PlannerStanding(
            self.standing.holder.rpartition("/")[0],
            self.standing.holds(cluster.now_s),
            self.standing.grants,
            self.standing.needed,
        )
        regions = [] if self.why_off else [self._region(cluster, region) for region in home_regions(cluster)]
        return PlanReport(
            self.router, unix_s, self.config.mode, self.why_off, self.config.period_s, lease, regions,
            list(self._history),
        )  # fmt: skip

    def last_word(self, region: str) -> str:
        """Why a home region's roles are as they are, by the last plan; "": there was none."""
        return self._words.get(region, "")

    def _region(self, cluster: ClusterSnapshot, index: int) -> RegionPlan:
        name, now_s = cluster.region_names[index], cluster.now_s
        decision = self._slow.preview(cluster, index, self._hindrance(name, now_s))
        assert isinstance(self.policy, AdaptiveThreshold)
        control = self.policy.controller(index)
        return RegionPlan(
            region=name,
            prefill_nodes=decision.n_prefill,
            decode_nodes=decision.n_decode,
            changing=[
                ChangingNode(node.name, node.role, node.next_role) for node in self.registry.changing(name, now_s)
            ],
            to_prefill=decision.to_prefill,
            wanted_to_prefill=decision.wanted,
            reason=decision.reason,
            why=decision.sentence(),
            gain=_finite(decision.gain),
            requests_per_s=decision.rate_per_s,
            prefill_utilisation=decision.prefill.utilisation,
            prefill_queue_s=decision.prefill.queue_s,
            decode_utilisation=decision.decode.utilisation,
            decode_queue_s=decision.decode.queue_s,
            threshold_tokens=_finite(control.threshold_tokens),
            planned_threshold_tokens=_finite(control.planned_tokens),
            next_plan_in_s=self._slow.next_step_in_s(index, now_s),
            cool_down_left_s=self._slow.cool_down_left_s(index, now_s, decision.wanted),
            plan=None if decision.plan is None else _figures(decision.plan),
        )


def _figures(plan: Plan) -> PlanFigures:
    return PlanFigures(
        _finite(plan.threshold_tokens),
        plan.n_prfaas,
        plan.n_prefill,
        plan.n_decode,
        plan.lambda_max,
        plan.bottleneck,
        plan.share_offloaded,
        plan.egress_bytes_per_s,
        plan.link_utilisation,
        plan.decode_step_s,
    )


def _finite(value: float) -> float | None:
    """JSON has no infinity: a threshold that nothing is above, a gain over nothing."""
    return value if math.isfinite(value) else None
