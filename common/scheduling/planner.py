"""The slow planner: the threshold and the prefill : decode split that carry the most requests.

`plan` is a pure function of what was measured, and the router, the simulator and `prfaas-loadgen plan` call the same
one. It plans one home region (its nodes take either role) with any number of prefill regions behind links of their own;
a cluster of several homes plans each with the share of the prefill regions that it uses.

`plan` searches all thresholds on a grid and, for each, all splits; equation 8 says which two splits of a threshold can
be the best, so only these are computed. Of plans with the same Λ_max the one with more prefill capacity wins (equation
7, it has the shorter queues), then the one that sends less.

Where the paper says nothing there is a field of `PlannerSettings`. The sums behind T come in two modes:

time_of_mean   T(E[L]), what the paper's equations 3 to 5 put in; `--case paper` plans with it.
mean_time      E[T(L)], what a full queue finds, since a long prompt takes more than a mean one adds; live plans.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from prfaas.common.errors import InfeasibleError
from prfaas.common.perfmodel import throughput
from prfaas.common.perfmodel.curves import Curve
from prfaas.common.perfmodel.lengths import Halves, LengthDistribution
from prfaas.common.perfmodel.links import LinkProfile
from prfaas.common.perfmodel.profiles import NodeProfile

Floats = NDArray[np.float64]
Mode = Literal["time_of_mean", "mean_time"]
Bottleneck = Literal["prfaas_prefill", "link", "pd_prefill", "pd_decode"]

MAX_THRESHOLDS = 20_000


@dataclass(frozen=True, slots=True)
class Demand:
    """What requests look like.

    uncached: lengths that must be computed, at least 1 (decode computes the last prompt token whatever is cached).
    output_tokens: mean. context_tokens: mean tokens that a request holds while it decodes; None: the mean uncached
    length and half the output, which is too little where prefixes are cached.
    """

    uncached: LengthDistribution
    output_tokens: float
    context_tokens: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.output_tokens) and self.output_tokens > 0):
            raise ValueError(f"output_tokens = {self.output_tokens} must be above 0")

    @property
    def decode_context_tokens(self) -> float:
        return self.uncached.mean() + self.output_tokens / 2 if self.context_tokens is None else self.context_tokens


@dataclass(frozen=True, slots=True)
class HomePool:
    """The region that decodes: each of its nodes may take either role."""

    profile: NodeProfile
    nodes: int


@dataclass(frozen=True, slots=True)
class OffloadPool:
    """A region that only prefills, and the link from it to the home region."""

    profile: NodeProfile
    nodes: int
    link: LinkProfile


@dataclass(frozen=True, slots=True)
class PlannerSettings:
    """The paper's open points of the plan, with units."""

    mode: Mode = "mean_time"
    tpot_limit_s: float = 0.025
    """Longest decode step, s: the batch is the largest that keeps it (the paper's SLO of 40 tokens/s)."""
    link_share: float = 0.9
    """Most of a link's goodput that a plan may fill, 0 to 1: bursts need the rest. 1: the paper's arithmetic."""
    wire_ratio: float = 1.0
    """Bytes on the wire for a byte of KV; a codec brings it below 1."""
    threshold_step_tokens: int = 100
    """The grid of thresholds; wider where more than 20,000 would be needed."""
    min_prefill_nodes: int = 0
    """Nodes of the home region that always prefill. 0 is no risk: a decode node can prefill."""
    min_decode_nodes: int = 1

    def __post_init__(self) -> None:
        for name in ("tpot_limit_s", "link_share", "wire_ratio", "threshold_step_tokens"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} = {value} must be above 0")
        if self.link_share > 1:
            raise ValueError(f"link_share = {self.link_share} must be at most 1")
        if self.min_prefill_nodes < 0 or self.min_decode_nodes < 1:
            raise ValueError("min_prefill_nodes must be at least 0 and min_decode_nodes at least 1")


LIVE = PlannerSettings()
PAPER = PlannerSettings(mode="time_of_mean", link_share=1.0)
"""The paper's arithmetic: T(E[L]), and a link that may be filled."""


@dataclass(frozen=True, slots=True)
class Plan:
    """threshold_tokens: longer uncached lengths are offloaded; 0 = all, inf = none. Rates are requests/s of the whole
    system for `lambda_max`, of the stage's own requests for the thetas. egress_bytes_per_s: on all links, at
    lambda_max."""

    threshold_tokens: float
    n_prfaas: int
    n_prefill: int
    n_decode: int
    lambda_max: float
    theta_prfaas: float
    theta_pd_prefill: float
    theta_pd_decode: float
    share_offloaded: float
    mean_long_tokens: float
    mean_short_tokens: float
    egress_bytes_per_s: float
    link_utilisation: float
    """Egress over what the links carry, `link_share` not counted; 0 without links."""
    decode_batch: int
    decode_step_s: float
    bottleneck: Bottleneck
    mode: Mode


def plan(
    demand: Demand,
    home: HomePool,
    offload: Sequence[OffloadPool] = (),
    settings: PlannerSettings = LIVE,
    *,
    threshold_tokens: float | None = None,
    n_prefill: int | None = None,
) -> Plan:
    """The best plan; with `threshold_tokens` or `n_prefill` (of the home region) given, the best with these.

    Raises InfeasibleError when nothing can be served, with what is missing; ConfigError when the home region's profile
    doesn't decode.
    """
    decode_batch = batch_within(demand, home.profile, settings)
    grid = thresholds(demand.uncached, settings) if threshold_tokens is None else np.array([float(threshold_tokens)])
    columns = _Columns(demand, home, offload, settings, decode_batch, grid)
    splits = _splits(columns, home, settings, n_prefill)
    best: tuple[tuple[float, float, float], int, int] | None = None
    for split in splits:
        carried = columns.carried(split, home.nodes - split)
        prefill = np.minimum(columns.prfaas_full_at, columns.pd_prefill_full_at(split))
        index = int(np.lexsort((grid, prefill, carried))[-1])
        key = (float(carried[index]), float(prefill[index]), float(grid[index]))
        if best is None or key > best[0]:
            best = key, index, int(split[index])
    assert best is not None
    if best[0][0] <= 0:
        raise InfeasibleError(_nothing_served(home, offload, threshold_tokens, n_prefill))
    return columns.plan(best[1], best[2], sum(pool.nodes for pool in offload))


@dataclass(frozen=True, slots=True)
class Legs:
    """What bounds Λ at each threshold, for one split: the rates of the whole system, requests/s, at which each stage
    would be full (equation 6). Arrays have one entry a threshold; inf where a stage gets no requests."""

    thresholds: Floats
    prfaas: Floats
    pd_prefill: Floats
    pd_decode: float


def legs(
    demand: Demand,
    home: HomePool,
    offload: Sequence[OffloadPool],
    settings: PlannerSettings,
    n_prefill: int,
    grid: Floats,
) -> Legs:
    """For a plot of a plan: the three terms of equation 6 over the thresholds of `grid`. Raises as `plan` does."""
    columns = _Columns(demand, home, offload, settings, batch_within(demand, home.profile, settings), grid)
    pd_decode = (home.nodes - n_prefill) * columns.decode_node
    pd_prefill = columns.pd_prefill_full_at(np.full(grid.size, float(n_prefill)))
    return Legs(grid, columns.prfaas_full_at, pd_prefill, pd_decode)


def thresholds(lengths: LengthDistribution, settings: PlannerSettings) -> Floats:
    """The grid: 0 (all are offloaded), multiples of the step between the shortest and longest length, inf (none)."""
    step = float(settings.threshold_step_tokens)
    step *= max(1.0, math.ceil((lengths.high - lengths.low) / step / MAX_THRESHOLDS))
    between = np.arange(math.floor(lengths.low / step) + 1, math.ceil(lengths.high / step)) * step
    return np.concatenate(([0.0], between, [np.inf]))


def batch_within(demand: Demand, profile: NodeProfile, settings: PlannerSettings) -> int:
    """BS_max: the largest batch whose step keeps the limit and whose KV fits. Raises InfeasibleError if one request is
    too many already."""
    context = demand.decode_context_tokens
    most = profile.fits(context)
    if most < 1:
        raise InfeasibleError(
            f"{profile.name}: the KV of one request of {context:.0f} tokens is {profile.kv_bytes.at(context):.4g} bytes"
            f" and the node has {profile.kv_capacity_bytes}; missing: memory"
        )
    alone_s = profile.step_s(1, context)
    limit_s = settings.tpot_limit_s * (1 + 1e-9)
    if alone_s > limit_s:
        raise InfeasibleError(
            f"{profile.name}: a decode step takes {alone_s * 1e3:.4g} ms for one request of {context:.0f} tokens, the"
            f" limit is {settings.tpot_limit_s * 1e3:.4g} ms; missing: a faster node, or a limit of"
            f" {alone_s * 1e3:.4g} ms"
        )
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if profile.step_s(middle, context) <= limit_s else (low, middle - 1)
    return low


@dataclass(slots=True)
class _Columns:
    """Everything about each threshold that the split doesn't change. Arrays have one entry a threshold."""

    demand: Demand
    home: HomePool
    offload: Sequence[OffloadPool]
    settings: PlannerSettings
    decode_batch: int
    grid: Floats
    share: Floats = field(init=False)
    means: Halves = field(init=False)
    prfaas: Floats = field(init=False)
    prfaas_compute: Floats = field(init=False)
    prfaas_full_at: Floats = field(init=False)
    prefill_node: Floats = field(init=False)
    """Requests/s of one prefilling node of the home region."""
    decode_node: float = field(init=False)
    wire_bytes: list[tuple[Floats, Floats]] = field(init=False)
    """For each pool: requests/s that it carries, and bytes on the wire of each."""

    def __post_init__(self) -> None:
        lengths = self.demand.uncached
        self.means = lengths.means(self.grid)
        # A share so small that it has no mean is none: it must not count as requests that nobody can serve.
        share = np.where(np.isnan(self.means.above), 0.0, lengths.share_above(self.grid))
        self.share = np.where(np.isnan(self.means.below), 1.0, share)
        self.prfaas = np.zeros(self.grid.size)
        self.prfaas_compute = np.zeros(self.grid.size)
        self.wire_bytes = []
        for pool in self.offload:
            prefill_s = self._sides(pool.profile.prefill_s).above
            wire = self._sides(pool.profile.kv_bytes).above * self.settings.wire_ratio
            carries = pool.link.goodput_bytes_per_s * self.settings.link_share
            rate = np.nan_to_num(throughput.theta_prfaas(pool.nodes, prefill_s, carries, wire))
            self.prfaas += rate
            self.prfaas_compute += np.nan_to_num(pool.nodes / prefill_s)
            self.wire_bytes.append((rate, np.nan_to_num(wire)))
        self.prfaas_full_at = throughput.full_at(self.prfaas, self.share)
        one = np.ones(self.grid.size)
        short_s = self._sides(self.home.profile.prefill_s).below
        self.prefill_node = np.nan_to_num(throughput.theta_pd_prefill(one, short_s))
        step_s = self.home.profile.step_s(self.decode_batch, self.demand.decode_context_tokens)
        self.decode_node = throughput.theta_pd_decode(1.0, self.decode_batch, step_s, self.demand.output_tokens)

    def _sides(self, curve: Curve) -> Halves:
        if self.settings.mode == "time_of_mean":
            return Halves(curve(self.means.above), curve(self.means.below))
        return self.demand.uncached.means_of(_array_function(curve), self.grid)

    def pd_prefill_full_at(self, split: Floats) -> Floats:
        return throughput.full_at(split * self.prefill_node, 1.0 - self.share)

    def carried(self, split: Floats, decode: Floats) -> Floats:
        """Equation 6 at each threshold, with its own split."""
        return np.asarray(
            throughput.lambda_max(self.prfaas, self.share, split * self.prefill_node, decode * self.decode_node)
        )

    def plan(self, i: int, split: int, n_prfaas: int) -> Plan:
        decode = self.home.nodes - split
        pd_prefill, pd_decode = float(split * self.prefill_node[i]), decode * self.decode_node
        p = float(self.share[i])
        rate = float(throughput.lambda_max(self.prfaas[i], p, pd_prefill, pd_decode))
        # The pools share the offloaded requests by what each can carry.
        sent = sum(
            rate * p * theta[i] / self.prfaas[i] * wire[i] for theta, wire in self.wire_bytes if self.prfaas[i] > 0
        )
        links = sum(pool.link.goodput_bytes_per_s for pool in self.offload)
        return Plan(
            threshold_tokens=float(self.grid[i]),
            n_prfaas=n_prfaas,
            n_prefill=split,
            n_decode=decode,
            lambda_max=rate,
            theta_prfaas=float(self.prfaas[i]),
            theta_pd_prefill=pd_prefill,
            theta_pd_decode=pd_decode,
            share_offloaded=p,
            mean_long_tokens=float(self.means.above[i]),
            mean_short_tokens=float(self.means.below[i]),
            egress_bytes_per_s=float(sent),
            link_utilisation=float(sent / links) if links else 0.0,
            decode_batch=self.decode_batch,
            decode_step_s=self.home.profile.step_s(self.decode_batch, self.demand.decode_context_tokens),
            bottleneck=self._bottleneck(i, rate, pd_decode),
            mode=self.settings.mode,
        )

    def _bottleneck(self, i: int, rate: float, pd_decode: float) -> Bottleneck:
        if rate >= pd_decode:
            return "pd_decode"
        if rate >= self.prfaas_full_at[i]:
            return "link" if self.prfaas[i] < self.prfaas_compute[i] * (1 - 1e-9) else "prfaas_prefill"
        return "pd_prefill"


def _array_function(curve: Curve) -> Callable[[Floats], Floats]:
    return lambda lengths: curve(lengths)


def _splits(columns: _Columns, home: HomePool, settings: PlannerSettings, n_prefill: int | None) -> list[Floats]:
    """Prefilling nodes to try at each threshold: those beside the split at which both roles are full at the same rate.

    Λ rises with the split up to there and falls behind it, so the best of all splits is one of the two.
    """
    least, most = settings.min_prefill_nodes, home.nodes - settings.min_decode_nodes
    size = columns.grid.size
    if n_prefill is not None:
        if not 0 <= n_prefill < home.nodes:
            raise InfeasibleError(
                f"{n_prefill} of {home.nodes} home nodes prefill; missing: a node that decodes"
                if n_prefill >= home.nodes
                else f"{n_prefill} prefilling nodes can't be"
            )
        return [np.full(size, float(n_prefill))]
    if most < least:
        raise InfeasibleError(
            f"the home region has {home.nodes} nodes, and {least} must prefill and {settings.min_decode_nodes} decode;"
            f" missing: {least - most} home nodes"
        )
    full_at = throughput.full_at(columns.prefill_node, 1.0 - columns.share)
    even = home.nodes * columns.decode_node / (full_at + columns.decode_node)
    return [np.clip(np.floor(even), least, most), np.clip(np.floor(even) + 1, least, most)]


def _nothing_served(
    home: HomePool, offload: Sequence[OffloadPool], threshold_tokens: float | None, n_prefill: int | None
) -> str:
    """Why Λ is 0, with what is missing."""
    usable = [pool for pool in offload if pool.nodes > 0 and pool.link.bandwidth_bytes_per_s > 0]
    pinned = [f"threshold {threshold_tokens:g}"] if threshold_tokens is not None else []
    pinned += [f"{n_prefill} prefilling home nodes"] if n_prefill is not None else []
    given = f" with {' and '.join(pinned)}" if pinned else ""
    missing = []
    if not usable:
        dead = any(pool.nodes > 0 for pool in offload)
        missing.append("bandwidth to the prefill region" if dead else "nodes in a prefill region")
    if home.nodes < 2 or n_prefill == 0:
        missing.append(f"a home node that prefills (there are {home.nodes} nodes)")
    return f"nobody can prefill{given}; missing: {' or '.join(missing) or 'nodes that prefill'}"


# -- what more would be needed ----------------------------------------------------------------------------------------


def require(
    rate_per_s: float,
    demand: Demand,
    home: HomePool,
    offload: Sequence[OffloadPool] = (),
    settings: PlannerSettings = LIVE,
) -> Plan:
    """The best plan if it carries `rate_per_s`. Raises InfeasibleError that says what alone would make it do so."""
    best = plan(demand, home, offload, settings)
    if best.lambda_max >= rate_per_s:
        return best

    def carries(home: HomePool, offload: Sequence[OffloadPool]) -> bool:
        return plan(demand, home, offload, settings).lambda_max >= rate_per_s

    missing = []
    more = _least(lambda n: carries(replace(home, nodes=home.nodes + n), offload), home.nodes)
    if more:
        missing.append(f"{more} more home nodes ({home.profile.name})")
    for i, pool in enumerate(offload):
        others = list(offload)

        def with_pool(changed: OffloadPool, i: int = i, others: list[OffloadPool] = others) -> bool:
            return carries(home, [*others[:i], changed, *others[i + 1 :]])

        more = _least(lambda n, pool=pool: with_pool(replace(pool, nodes=pool.nodes + n)), pool.nodes)  # type: ignore[misc]
        if more:
            missing.append(f"{more} more nodes in the prefill region ({pool.profile.name})")
        gbps = math.ceil(pool.link.gbps)
        more = _least(
            lambda n, pool=pool, gbps=gbps: with_pool(replace(pool, link=_wider(pool.link, gbps + n))),  # type: ignore[misc]
            max(gbps, 1),
        )
        if more:
            missing.append(f"a link of {gbps + more} Gbps")
    raise InfeasibleError(
        f"{rate_per_s:g} requests/s are wanted, the best plan carries {best.lambda_max:.4g} (full: {best.bottleneck});"
        f" missing: {' or '.join(missing) or 'more home nodes, prefill nodes and bandwidth together'}"
    )


def _wider(link: LinkProfile, gbps: float) -> LinkProfile:
    return LinkProfile.of_gbps(gbps, link.rtt_s, link.loss)


def _least(enough: Callable[[int], bool], now: int) -> int | None:
    """The smallest n ≥ 1 that is enough, by doubling and halving; None if 16 times as much is not."""
    most = 15 * max(now, 1)
    if not enough(most):
        return None
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
