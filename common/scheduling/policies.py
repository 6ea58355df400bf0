"""The fast policy, and the baselines it is held against. All of them see the same predictions and admit alike.

    HomogeneousPd       prefill at home only
    OffloadAll          naive heterogeneous: every prefill is offloaded
    RoundRobin          nodes in turn, whatever they are
    StaticThreshold     an uncached length above a fixed threshold is offloaded
    AdaptiveThreshold   ours

**AdaptiveThreshold.** A threshold t is what a good router does on the average of a steady day: at t both regions are
full at the same rate. Two things follow from it. One second of an offload node is worth R = T_home(t) / T_offload(t)
seconds of a home node: at that rate of exchange a request of length t costs the same on either side, longer ones are
cheaper offloaded and shorter ones at home, since home nodes fall behind faster the longer the prompt. And how much it
matters depends on the load: seconds of a node that would idle cost nobody anything, those of one with a queue delay all
that come behind. So each route costs

    time to the first token + π · (seconds of the node, in home seconds)

and the cheaper one is taken. With π = 0 that is the sooner first token, with π → ∞ the threshold. t and π are moved by
`threshold.ThresholdController`. What the link costs is in the time to the first token (`routes.py`) and in t.

A route that would be too late for admission is given up for the other one only if that is worth it: a full system that
makes an exception for one request refuses several others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from prfaas.common.perfmodel.profiles import NodeProfile
from prfaas.common.scheduling.routes import (
    Place,
    Route,
    RouteSettings,
    Start,
    decode_place,
    local_route,
    place_at,
    place_of_holder,
    reachable,
    route_to,
    routes,
    sent_s,
    starts,
)
from prfaas.common.scheduling.threshold import ThresholdController, ThresholdSettings, observe
from prfaas.common.scheduling.types import (
    ROLE_DECODE,
    ROLE_PREFILL,
    ClusterSnapshot,
    Decision,
    Pool,
    Refused,
    RequestSnapshot,
)


@dataclass(frozen=True, slots=True)
class Admission:
    """A request that is predicted to miss its limit is refused at once. The limit: max(`ttft_floor_s`,
    `ttft_prefill_factor` × the bare prefill time of the node that would serve it), and the request's own deadline."""

    ttft_floor_s: float = 10.0
    """What an interactive user waits for (s); the SLO's first half."""
    ttft_prefill_factor: float = 2.0
    """A prompt of 128K tokens takes longer than that alone, so it may take twice its own time."""
    by_slo: bool = True
    """False: only the request's own deadline (`remaining_s`) counts."""
    min_retry_after_s: float = 1.0
    """Nobody is told to come back sooner (s): HTTP's Retry-After has whole seconds."""
    max_retry_after_s: float = 60.0
    """Nor later (s): by then the queues are others."""

    def limit_s(self, prefill_s: float) -> float:
        """The SLO's limit of the time to the first token."""
        return max(self.ttft_floor_s, self.ttft_prefill_factor * prefill_s)

    def late_by_s(self, request: RequestSnapshot, route: Route) -> float:
        """Above 0: the route would miss by so much."""
        late_s = -math.inf
        if request.admitted:
            return late_s
        if self.by_slo:
            late_s = request.waited_s + route.ttft_s - self.limit_s(route.prefill_s)
        if request.remaining_s is not None:
            late_s = max(late_s, route.ttft_s - request.remaining_s)
        return late_s

    def retry_after_s(self, late_s: float) -> float:
        return min(max(late_s, self.min_retry_after_s), self.max_retry_after_s)


ADMIT_ALL = Admission(by_slo=False)
"""Only deadlines that requests bring along."""


class _Choice(NamedTuple):
    place: Place
    route: Route
    reason: str


@dataclass(slots=True)
class _Admitting:
    """What all policies share: a decode node with room, the routes, one choice, admission.

    Where nodes have pools of their own, the decode node that holds most of the prompt is weighed against the least
    loaded one: by the time to the first token and that in which the KV passes which only the other would be sent.
    """

    admission: Admission = field(default_factory=Admission)
    settings: RouteSettings = field(default_factory=RouteSettings)

    _by_threshold: ClassVar[bool] = False

    def __call__(self, request: RequestSnapshot, cluster: ClusterSnapshot) -> Decision | Refused:
        closed = cluster.closed_nodes()
        must_fit = True
        place, why = decode_place(request, cluster, closed)
        if place is None and why == "full" and self.settings.queue_for_memory:
            must_fit = False
            place, why = decode_place(request, cluster, closed, must_fit)
        if place is None:
            return Refused(why, self.admission.min_retry_after_s)
        begun = starts(request, cluster, self.settings, closed)
        chosen = self._choice(request, cluster, place, begun)
        holder = place_of_holder(request, cluster, place, must_fit)
        if holder is not None:
            other = self._choice(request, cluster, holder, begun)
            if chosen is None or (
                other is not None and _cost_s(request, cluster, other) <= _cost_s(request, cluster, chosen)
            ):
                chosen = other
        if chosen is None:
            return Refused("pinned", self.admission.min_retry_after_s)
        return self._admitted(request, *chosen)

    def _choice(
        self, request: RequestSnapshot, cluster: ClusterSnapshot, place: Place, begun: Sequence[tuple[Pool, Start]]
    ) -> _Choice | None:
        """None: the pinned route isn't there."""
        if request.prompt_tokens - place.held < 2 and _of_nodes(request):
            return _Choice(place, local_route(request, cluster, place), "nothing_to_prefill")
        if request.pinned_route == "local":
            return _Choice(place, local_route(request, cluster, place), "pinned")
        found = routes(request, cluster, place, self.settings, begun)
        if request.pinned_route is not None:
            pinned = _soonest(found, offloaded=request.pinned_route == "offload")
            return None if pinned is None else _Choice(place, pinned, "pinned")
        if not found:
            return _Choice(place, local_route(request, cluster, place), "no_prefill_node")
        if self.settings.local_prefill and self._by_threshold and found[0].offloaded:
            found.insert(0, local_route(request, cluster, place))
        return _Choice(place, *self.choose(request, cluster, found))

    def choose(self, request: RequestSnapshot, cluster: ClusterSnapshot, found: Sequence[Route]) -> tuple[Route, str]:
        """One of `found` (never empty; home routes come first), and the reason."""
        raise NotImplementedError

    def threshold_of(self, home_region: int) -> float:
        """In tokens, that requests of a home region are decided with now; nan: none."""
        return math.nan

    def _admitted(self, request: RequestSnapshot, place: Place, route: Route, reason: str) -> Decision | Refused:
        late_s = self.admission.late_by_s(request, route)
        if late_s > 0:
            return Refused("deadline", self.admission.retry_after_s(late_s))
        return Decision(
            route.row,
            place.row,
            place.held,
            reason,
            route.prefill_start,
            route.fetch_region,
            route.ttft_s,
            route.fetch_node,
            route.prefill_s,
            route.wire_bytes,
            self.threshold_of(place.region),
        )


def _of_nodes(request: RequestSnapshot) -> bool:
    """Whether what a decode node holds it has itself. A region's pool is not in its nodes' memory: it is read, too."""
    return request.prefixes is None or request.prefixes.region_nodes is not None


def _cost_s(request: RequestSnapshot, cluster: ClusterSnapshot, choice: _Choice) -> float:
    return choice.route.ttft_s + sent_s(request, cluster, choice.place, choice.route)


def _soonest(found: Sequence[Route], offloaded: bool) -> Route | None:
    best: Route | None = None
    for route in found:
        if route.offloaded == offloaded and (best is None or route.ttft_s < best.ttft_s):
            best = route
    return best


class HomogeneousPd(_Admitting):
    """Prefill at home. Without a home prefill node, wherever there is one."""

    def choose(self, request: RequestSnapshot, cluster: ClusterSnapshot, found: Sequence[Route]) -> tuple[Route, str]:
        home = _soonest(found, offloaded=False)
        return (home, "home") if home else (found[0], "no_home_prefill_node")


class OffloadAll(_Admitting):
    """All prefill is offloaded, soonest route first. Without an offload node, at home."""

    def choose(self, request: RequestSnapshot, cluster: ClusterSnapshot, found: Sequence[Route]) -> tuple[Route, str]:
        away = _soonest(found, offloaded=True)
        return (away, "offloaded") if away else (found[0], "no_offload_node")


@dataclass(slots=True)
class StaticThreshold(_Admitting):
    """The paper's rule with a threshold that stays. The uncached length l counts from where a home prefill would start,
    which `routes` has found by the paper's two rules: with scarce bandwidth the home region's own cache, with abundant
    bandwidth the longest anywhere."""

    threshold_tokens: float = 0.0

    _by_threshold: ClassVar[bool] = True

    def threshold_of(self, home_region: int) -> float:
        return self.threshold_tokens

    def choose(self, request: RequestSnapshot, cluster: ClusterSnapshot, found: Sequence[Route]) -> tuple[Route, str]:
        home, away = _soonest(found, offloaded=False), _soonest(found, offloaded=True)
        if away is None:
            return found[0], "no_offload_node"
        if home is None:
            return away, "no_home_prefill_node"
        if request.prompt_tokens - home.prefill_start > self.threshold_tokens:
            return away, "offloaded"
        return home, "below_threshold"


class _Rate(NamedTuple):
    """Of exchange, between two profiles at a threshold; typical_s: a request of the threshold's length at home."""

    threshold: float
    home: NodeProfile
    away: NodeProfile
    exchange: float
    typical_s: float


@dataclass(slots=True)
class AdaptiveThreshold(_Admitting):
    """Ours; see the module's docstring. Call `adapt` every second or so, with a current snapshot.

    planned_tokens: the planner's threshold, for all home regions; `plan` gives one region another. It keeps one
    controller a home region. What decode nodes prefill themselves (`RouteSettings.local_prefill`) holds up the streams
    that run there, so it isn't weighed by prices: it is what the planned threshold leaves at home.
    """

    planned_tokens: float = 0.0
    spill: float = 0.3
    """How much a late request may cost elsewhere: (home seconds) × (wait there) against a request of the threshold's
    length × the admission's floor. Measured: flat from 0.15 to 0.6; without a bound, long prompts that are late away
    fill the home nodes near saturation, and half of what these could serve is lost."""
    threshold_settings: ThresholdSettings = field(default_factory=ThresholdSettings)
    _controllers: dict[int, ThresholdController] = field(init=False, default_factory=dict)
    _rates: dict[tuple[int, int, int], _Rate] = field(init=False, default_factory=dict)

    _by_threshold: ClassVar[bool] = True

    def controller(self, home_region: int) -> ThresholdController:
        """Of one home region."""
        if home_region not in self._controllers:
            self._controllers[home_region] = ThresholdController(self.planned_tokens, self.threshold_settings)
        return self._controllers[home_region]

    def plan(self, home_region: int, planned_tokens: float) -> None:
        """A new plan for one home region."""
        self.controller(home_region).plan(planned_tokens)

    def adapt(self, now_s: float, cluster: ClusterSnapshot) -> None:
        """Move the thresholds and prices of all home regions."""
        for region in sorted({pool.region for pool in cluster.pools(ROLE_DECODE)}):
            self.controller(region).update(observe(cluster, region), now_s)

    def choose(self, request: RequestSnapshot, cluster: ClusterSnapshot, found: Sequence[Route]) -> tuple[Route, str]:
        home, away = _soonest(found, offloaded=False), _soonest(found, offloaded=True)
        if away is None:
            return found[0], "no_offload_node"
        if home is None:
            return away, "no_home_prefill_node"
        if home.row is None:
            return self._local_or(home, away, request)
        control = self.controller(home.region)
        exchange, typical_s = self._rate(control.threshold_tokens, cluster, home, away)
        home_cost_s, away_cost_s = home.prefill_s, exchange * away.prefill_s
        home_late = self.admission.late_by_s(request, home) > 0
        if home_late != (self.admission.late_by_s(request, away) > 0):
            worth = self.spill * typical_s * self.admission.ttft_floor_s
            if home_late:
                spills = away_cost_s * away.wait_s <= worth
                return (away, "home_late") if spills else (home, "below_threshold")
            spills = home_cost_s * home.wait_s <= worth
            return (home, "offload_late") if spills else (away, "offloaded")
        if away.ttft_s + control.price * away_cost_s < home.ttft_s + control.price * home_cost_s:
            return away, "offloaded"
        return home, "below_threshold"

    def threshold_of(self, home_region: int) -> float:
        return self.controller(home_region).threshold_tokens

    def _local_or(self, local: Route, away: Route, request: RequestSnapshot) -> tuple[Route, str]:
        """Home has no prefill node."""
        local_late = self.admission.late_by_s(request, local) > 0
        away_late = self.admission.late_by_s(request, away) > 0
        if request.prompt_tokens - local.prefill_start <= self.controller(local.region).planned_tokens:
            return (away, "home_late") if local_late and not away_late else (local, "below_threshold")
        return (local, "offload_late") if away_late and not local_late else (away, "offloaded")

    def _rate(self, threshold: float, cluster: ClusterSnapshot, home: Route, away: Route) -> tuple[float, float]:
        """(R, home seconds of a request of the threshold's length), kept until the threshold moves or a profile is
        another one."""
        key = home.region, home.profile, away.profile
        home_profile, away_profile = cluster.profiles[home.profile], cluster.profiles[away.profile]
        kept = self._rates.get(key)
        if (
            kept is None
            or kept.threshold != threshold
            or kept.home is not home_profile
            or kept.away is not away_profile
        ):
            typical_s = home_profile.prefill_s.at(threshold)
            exchange = typical_s / away_profile.prefill_s.at(threshold)
            kept = self._rates[key] = _Rate(threshold, home_profile, away_profile, exchange, typical_s)
        return kept.exchange, kept.typical_s


@dataclass(slots=True)
class RoundRobin(_Admitting):
    """Prefill nodes in turn and decode nodes in turn, those that are usable, not full and reachable. It holds the two
    cursors."""

    _prefill: int = field(init=False, default=0)
    _decode: int = field(init=False, default=0)

    def __call__(self, request: RequestSnapshot, cluster: ClusterSnapshot) -> Decision | Refused:
        if request.pinned_route is not None:
            return _Admitting.__call__(self, request, cluster)
        closed = cluster.closed_nodes()
        place, why = decode_place(request, cluster, closed)
        if place is None and why == "full" and self.settings.queue_for_memory:
            place, why = decode_place(request, cluster, closed, must_fit=False)
        if place is None:
            return Refused(why, self.admission.min_retry_after_s)
        # decode_place has found one with room, so there is a next one; it may be the same.
        place = self._next_place(request, cluster) or place
        rows = _allowed(cluster, ROLE_PREFILL)
        regions = range(len(cluster.region_names))
        good = np.array([reachable(cluster, region, place.region) for region in regions], np.bool_)
        rows = rows[good[cluster.region[rows]]]
        if not rows.size:
            return self._admitted(request, place, local_route(request, cluster, place), "no_prefill_node")
        row, self._prefill = int(rows[self._prefill % rows.size]), self._prefill + 1
        chosen = route_to(row, request, cluster, place, self.settings)
        return self._admitted(request, place, chosen, "round_robin")

    def _next_place(self, request: RequestSnapshot, cluster: ClusterSnapshot) -> Place | None:
        rows = _allowed(cluster, ROLE_DECODE)
        for _ in range(rows.size):
            row, self._decode = int(rows[self._decode % rows.size]), self._decode + 1
            place = place_at(row, request, cluster)
            if place is not None:
                return place
        return None


def _allowed(cluster: ClusterSnapshot, role: int) -> NDArray[np.int64]:
    good = (cluster.role == role) & cluster.usable & (cluster.inflight_requests < cluster.max_inflight_requests)
    return np.flatnonzero(good)
