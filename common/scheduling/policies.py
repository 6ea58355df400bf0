"""The fast policy, and the baselines it is held against. All of them see the same predictions and admit alike.

    HomogeneousPd      prefill at home only
    OffloadAll         naive heterogeneous: every prefill is offloaded
    RoundRobin         prefill nodes in turn, whatever they are
    StaticThreshold    uncached length above a fixed threshold is offloaded
    PricedThreshold    ours

**PricedThreshold.** A threshold t is what a good router does on the average of a steady day: at t both regions are full
at the same rate. Two things follow from it. One second of an offload node is worth R = T_home(t) / T_offload(t) seconds
of a home node: at that rate of exchange a request of length t costs the same on either side, longer ones are cheaper
offloaded, shorter ones at home, since the home nodes fall behind faster the longer the prompt. And how much it matters
depends on the load: seconds of a node that would idle cost nobody anything, those of one with a queue delay all that
come behind. So each route costs

    time to the first token + π · (seconds of the node, at the rate of exchange)

and the cheaper one is taken. With π = 0 (idle) that is the sooner first token; with π → ∞ (full) it is the threshold.
π grows with the time that requests now wait at the *better* of the two regions: both must be busy for a queue to mean
that the system is full. The link has its price in the time to the first token (`routes.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from prfaas.common.scheduling.routes import Place, Route, RouteSettings, decode_place, local_route, routes
from prfaas.common.scheduling.types import ROLE_DECODE, ROLE_PREFILL, ClusterSnapshot, Decision, Refused, RequestSnapshot


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
    max_retry_after_s: float = 60.0

    def limit_s(self, prefill_s: float) -> float:
        return max(self.ttft_floor_s, self.ttft_prefill_factor * prefill_s)

    def late_by_s(self, request: RequestSnapshot, route: Route) -> float:
        """Above 0: the route would miss by so much."""
        late_s = -math.inf
        if self.by_slo:
            late_s = request.waited_s + route.ttft_s - self.limit_s(route.prefill_s)
        if request.remaining_s is not None:
            late_s = max(late_s, route.ttft_s - request.remaining_s)
        return late_s


ADMIT_ALL = Admission(by_slo=False)


@dataclass(slots=True)
class _Admitting:
    """What all policies share: a decode node with room, the routes, one choice, admission."""

    admission: Admission = field(default_factory=Admission)
    settings: RouteSettings = field(default_factory=RouteSettings)

    def __call__(self, request: RequestSnapshot, cluster: ClusterSnapshot) -> Decision | Refused:
        place, why = decode_place(request, cluster)
        if place is None:
            return Refused(why, self.admission.min_retry_after_s)
        found = routes(request, cluster, place, self.settings)
        if not found:
            found, chosen, reason = [], local_route(request, place), "no_prefill_node"
        else:
            chosen, reason = self.choose(request, cluster, place, found)
        late_s = self.admission.late_by_s(request, chosen)
        if late_s > 0:
            retry_s = min(max(late_s, self.admission.min_retry_after_s), self.admission.max_retry_after_s)
            return Refused("deadline", retry_s)
        return _decision(request, place, chosen, reason)

    def choose(
        self, request: RequestSnapshot, cluster: ClusterSnapshot, place: Place, found: Sequence[Route]
    ) -> tuple[Route, str]:
        """One of `found` (never empty; home routes come first), and the reason."""
        raise NotImplementedError


def _decision(request: RequestSnapshot, place: Place, route: Route, reason: str) -> Decision:
    token_start = 0
    if request.prefixes is not None:
        token_start = min(request.prefixes.in_region(place.region), request.prompt_tokens - 1)
    return Decision(
        route.row, place.row, token_start, reason, route.prefill_start, route.fetch_region, route.ttft_s
    )


def _soonest(found: Sequence[Route], offloaded: bool) -> Route | None:
    best: Route | None = None
    for route in found:
        if route.offloaded == offloaded and (best is None or route.ttft_s < best.ttft_s):
            best = route
    return best


class HomogeneousPd(_Admitting):
    """Prefill at home. Without a home prefill node, wherever there is one."""

    def choose(
        self, request: RequestSnapshot, cluster: ClusterSnapshot, place: Place, found: Sequence[Route]
    ) -> tuple[Route, str]:
        home = _soonest(found, offloaded=False)
        return (home, "home") if home else (found[0], "no_home_prefill_node")


class OffloadAll(_Admitting):
    """All prefill is offloaded, soonest route first. Without an offload node, at home."""

    def choose(
        self, request: RequestSnapshot, cluster: ClusterSnapshot, place: Place, found: Sequence[Route]
    ) -> tuple[Route, str]:
        away = _soonest(found, offloaded=True)
        return (away, "offloaded") if away else (found[0], "no_offload_node")


@dataclass(slots=True)
class StaticThreshold(_Admitting):
    """`threshold_tokens`: uncached lengths above it are offloaded, as the paper plans it for the steady case."""

    threshold_tokens: float = 0.0

    def choose(
        self, request: RequestSnapshot, cluster: ClusterSnapshot, place: Place, found: Sequence[Route]
    ) -> tuple[Route, str]:
        home, away = _soonest(found, offloaded=False), _soonest(found, offloaded=True)
        if home is None or away is None:
            return found[0], "no_offload_node" if away is None else "no_home_prefill_node"
        if judged_length(request, home, away) > self.threshold_tokens:
            return away, "offloaded"
        return home, "below_threshold"


def judged_length(request: RequestSnapshot, home: Route, away: Route) -> int:
    """The paper's l. `routes` has applied its two rules: with scarce bandwidth a home route starts from the home
    region's cache alone, with abundant bandwidth from the longest."""
    return request.prompt_tokens - home.prefill_start


@dataclass(slots=True)
class PricedThreshold(_Admitting):
    """Ours; see the module's docstring."""

    threshold_tokens: float = 0.0
    """Planned, and moved by `threshold.ThresholdController`."""
    price_per_wait_s: float = 1.0
    """π for each second that requests wait at the better region (1/s)."""
    base_price: float = 0.0
    """π of an empty system, and what `threshold.ThresholdController` adds when the system is full on the average."""

    def choose(
        self, request: RequestSnapshot, cluster: ClusterSnapshot, place: Place, found: Sequence[Route]
    ) -> tuple[Route, str]:
        home, away = _soonest(found, offloaded=False), _soonest(found, offloaded=True)
        if home is None or away is None:
            return found[0], "no_offload_node" if away is None else "no_home_prefill_node"
        if home.row is None or away.row is None:
            return (home, "home") if away.row is None else (away, "offloaded")
        at_home = cluster.profiles[int(cluster.profile[home.row])].prefill_s
        away_s = cluster.profiles[int(cluster.profile[away.row])].prefill_s
        exchange = at_home.at(self.threshold_tokens) / away_s.at(self.threshold_tokens)
        price = self.base_price + self.price_per_wait_s * min(home.wait_s, away.wait_s)
        home_cost = home.ttft_s + price * home.prefill_s
        away_cost = away.ttft_s + price * exchange * away.prefill_s
        home_late = self.admission.late_by_s(request, home) > 0
        away_late = self.admission.late_by_s(request, away) > 0
        if home_late != away_late:
            return (away, "home_late") if home_late else (home, "offload_late")
        if away_cost < home_cost:
            return away, "offloaded"
        return home, "below_threshold"


@dataclass(slots=True)
class RoundRobin(_Admitting):
    """Prefill nodes in turn, decode nodes in turn, usable and with room. Holds the two cursors."""

    _prefill: int = 0
    _decode: int = 0

    def __call__(self, request: RequestSnapshot, cluster: ClusterSnapshot) -> Decision | Refused:
        place, why = decode_place(request, cluster)
        if place is None:
            return Refused(why, self.admission.min_retry_after_s)
        return _Admitting.__call__(self, request, cluster)

    def choose(
        self, request: RequestSnapshot, cluster: ClusterSnapshot, place: Place, found: Sequence[Route]
    ) -> tuple[Route, str]:
        rows = np.flatnonzero((cluster.role == ROLE_PREFILL) & cluster.usable)
        chosen = int(rows[self._prefill % rows.size])
        self._prefill += 1
        region = int(cluster.region[chosen])
        for route in found:
            if route.region == region:
                return route, "round_robin"
        return found[0], "round_robin"


_ = ROLE_DECODE
