"""How the threshold and the price move with what is measured: a state machine, time and observations are arguments.

The planner's threshold is right for the day that was planned. When the link narrows, a region loses nodes, or lengths
shift, one of the regions falls behind; the threshold then leaves it more to the other until both are behind alike, and
goes home when the queues are gone.

    up      the offload side is behind: its nodes' queues or the link's backlog, or the link is near its ceiling
    down    the home prefill nodes are behind, and the link isn't full
    back    towards the planned one, when neither is behind

The price π (`policies.py`) says how much the threshold matters: little in an empty system, much in a full one. It
follows the time that requests wait.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from prfaas.common.scheduling.types import ROLE_PREFILL, ClusterSnapshot

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ThresholdSettings:
    """The paper's open points of the threshold's movement, with units."""

    period_s: float = 1.0
    """Between two moves (s): some requests' time to show an effect, well below what a user waits."""
    step: float = 1.1
    """Factor of one move. Ten moves are a factor of 2.6: seconds to answer a link that falls to a tenth."""
    behind_s: float = 3.0
    """A side begins to count as behind when its wait is this much (s) longer than the other's: a queue that surges, and
    that one or two long prompts don't make; the routes' own predictions level what is less …"""
    level_s: float = 1.5
    """… and until it is less than this: the hysteresis."""
    full_utilisation: float = 0.95
    """A link that is used more (0 to 1) is at its ceiling when it has a backlog too; alone, a full link is no harm."""
    full_backlog_s: float = 1.0
    """That backlog (s)."""
    back_step: float = 1.05
    """Factor of a move back (each period in which neither side is behind): half as fast as away."""
    min_tokens: float = 512.0
    """Below it a prefill costs little more than a round trip."""
    max_tokens: float = 1 << 20
    idle_price: float = 1.0
    """π when nobody waits (seconds of latency for a second of a node): at 0 short prompts would be offloaded for
    milliseconds, and be in the way of the next long one."""
    full_price: float = 3.0
    """π when requests wait `full_wait_s`. Measured over the events of `loadgen/simulator/scenarios.py`: from 2 to 5 the
    goodput is the same within 0.2 %, at 16 a burst costs 2 %."""
    full_wait_s: float = 2.0
    """Mean wait (s) of both sides at which the system counts as full; π is straight between. A prefill's time or so."""
    price_weight: float = 0.2
    """Of one period's wait in its moving average (0 to 1)."""

    def __post_init__(self) -> None:
        problems = []
        if not (math.isfinite(self.period_s) and self.period_s > 0):
            problems.append(f"period_s = {self.period_s} must be above 0")
        if not (1 < self.step <= 10 and 1 < self.back_step <= 10):
            problems.append(f"step = {self.step} and back_step = {self.back_step} must be above 1, at most 10")
        if not 0 <= self.level_s <= self.behind_s:
            problems.append(f"level_s = {self.level_s} must be from 0 to behind_s = {self.behind_s}")
        if not 0 < self.min_tokens <= self.max_tokens:
            problems.append(f"min_tokens = {self.min_tokens} must be above 0 and at most max_tokens")
        if not (0 <= self.idle_price <= self.full_price and self.full_wait_s > 0 and 0 < self.price_weight <= 1):
            problems.append("idle_price must be from 0 to full_price, full_wait_s above 0, price_weight in (0, 1]")
        if problems:
            raise ValueError("; ".join(problems))


@dataclass(frozen=True, slots=True)
class Observed:
    """One home region and what prefills for it."""

    home_wait_s: float
    """Prefill backlog of a usable home node, on the average; inf when there is none."""
    offload_wait_s: float
    """The same of the offload nodes."""
    link_backlog_s: float
    """Bytes that are to cross the link over what it carries in a second, of the least loaded link."""
    link_utilisation: float


@dataclass(slots=True)
class ThresholdController:
    """`planned_tokens`: where it starts and returns to; `plan` gives it a new one."""

    planned_tokens: float
    settings: ThresholdSettings = field(default_factory=ThresholdSettings)
    threshold_tokens: float = field(init=False)
    price: float = field(init=False)
    direction: int = field(init=False, default=0)
    """+1: rising, −1: falling, 0: level or going back."""
    _moved_s: float = field(init=False, default=-math.inf)
    _wait_s: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        if not self.planned_tokens >= 0:
            raise ValueError(f"planned_tokens = {self.planned_tokens} must be at least 0")
        self.threshold_tokens = self._bounded(self.planned_tokens)
        self.price = self.settings.idle_price

    def plan(self, planned_tokens: float) -> None:
        """The slow planner has searched again. The threshold starts anew from its result."""
        self.planned_tokens = planned_tokens
        self.threshold_tokens = self._bounded(planned_tokens)
        self.direction = 0

    def update(self, observed: Observed, now_s: float) -> float:
        """The threshold from now on; call it as often as you like, it moves once a period."""
        if now_s - self._moved_s < self.settings.period_s * (1 - 1e-9):
            return self.threshold_tokens
        self._moved_s = now_s
        self.direction = self._direction(observed)
        settings = self.settings
        if self.direction:
            self.threshold_tokens *= settings.step**self.direction
        elif self.threshold_tokens > self.planned_tokens:
            self.threshold_tokens = max(self.planned_tokens, self.threshold_tokens / settings.back_step)
        else:
            self.threshold_tokens = min(self.planned_tokens, self.threshold_tokens * settings.back_step)
        self.threshold_tokens = self._bounded(self.threshold_tokens)
        self._set_price(observed)
        return self.threshold_tokens

    def _direction(self, observed: Observed) -> int:
        settings = self.settings
        link_s = observed.link_backlog_s if observed.link_utilisation >= settings.full_utilisation else 0.0
        away_s = max(observed.offload_wait_s, link_s if link_s > settings.full_backlog_s else 0.0)
        ahead_s = away_s - observed.home_wait_s
        if ahead_s != ahead_s:
            return 0
        if ahead_s > (settings.level_s if self.direction > 0 else settings.behind_s):
            return 1
        if ahead_s < -(settings.level_s if self.direction < 0 else settings.behind_s):
            return -1
        return 0

    def _set_price(self, observed: Observed) -> None:
        settings = self.settings
        waits = [w for w in (observed.home_wait_s, observed.offload_wait_s) if math.isfinite(w)]
        if waits:
            # Longer waits say no more, and would keep the price up for long after them.
            wait_s = min(sum(waits) / len(waits), 10 * settings.full_wait_s)
            self._wait_s += settings.price_weight * (wait_s - self._wait_s)
        full = min(1.0, self._wait_s / settings.full_wait_s)
        self.price = settings.idle_price + full * (settings.full_price - settings.idle_price)

    def _bounded(self, tokens: float) -> float:
        return min(max(tokens, self.settings.min_tokens), self.settings.max_tokens)


def observe(cluster: ClusterSnapshot, home_region: int) -> Observed:
    """What the controller of one home region sees in a snapshot."""
    home: list[Floats] = []
    away: list[Floats] = []
    backlog_s, utilisation = math.inf, 0.0
    for pool in cluster.pools(ROLE_PREFILL):
        usable = cluster.usable[pool.rows]
        if not usable.any():
            continue
        waits = np.maximum(cluster.prefill_free_at_s[pool.rows][usable] - cluster.now_s, 0.0)
        if pool.region == home_region:
            home.append(waits)
            continue
        bandwidth = float(cluster.links.bandwidth_bytes_per_s[pool.region, home_region])
        if bandwidth <= 0:
            continue
        away.append(waits)
        link_s = float(cluster.links.queued_bytes[pool.region, home_region]) / bandwidth
        if link_s < backlog_s:
            backlog_s, utilisation = link_s, float(cluster.links.utilisation[pool.region, home_region])
    return Observed(_mean(home), _mean(away), backlog_s if away else 0.0, utilisation)


def _mean(waits: list[Floats]) -> float:
    return float(np.concatenate(waits).mean()) if waits else math.inf
