"""What a session measures of its way to the peer, and how many lanes that way needs; pure.

Bandwidth is delivered bytes over time, from one acknowledgement to a later one, as TCP's BBR takes it: of a chunk that
left at s and was acknowledged at t, what was acknowledged between the last acknowledgement before s and t. It says
something of the link only if the session had bytes for it all the while. Where a lane found nothing to take (no KV is
ready, the codec is slow, no credit is left, a cap holds it back) the rate is a lower bound, and only raises the
estimate; unless what is under way says that the link is full all the same. Send buffers and proxies take whole
transfers, so that a link which has become slower would else never be seen full. Two signs, of which the second needs no
knowledge of the bandwidth, since the one that is believed may be far too high:

- more is under way than the link carries in `FULL_S` and two round trips;
- it *lingers*: half of it was handed over longer ago than a round trip and a slow start take, and it is still `MOST` of
  what it was when something was handed over last (the rest may be waiting for the slowest lane only).

Then the rate from one acknowledgement to a later one is the link's, since all that came had been waiting.

Samples age by the *busy* time that was measured, in which the link had enough to do: a link that sat idle is still what
it was, and one that has changed is noticed after `WINDOW_S` of work at most.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from prfaas.transport.api import LinkEstimate
from prfaas.transport.lanes.api import LaneSample

WINDOW_S = 3.0
"""Busy time that bandwidth is estimated from."""
QUANTILE = 0.75
"""Of the rates in the window, by time: above the slow starts, below what clumped acknowledgements make of a rate. A
slower link shows after three quarters of the window, a faster one after one quarter."""
SLOT_S = 0.05
"""At most one rate is kept for so much busy time, and none is measured over less while chunks flow."""
POINT_S = 0.005
SAMPLE_POINTS = 8
"""A rate spans at least so many acknowledgements (of those within `POINT_S` one): a chunk is the unit of delivery."""
KEPT_POINTS = 4096
FULL_S = 0.1
"""A link is full while so much of what it carries, and two round trips' worth, is under way."""
START_RTTS = 8
"""A lane that was idle has its window again after so many: it doubles each time, from some 15 KB."""
MOST = 0.25
USE_S = 1.0
"""Utilisation is of the last so long."""
LOSS_WINDOW_S = 10.0
LANES_WINDOW_S = 3.0
"""What holds the lanes back is of the last so long."""
MIN_RTT_S = 300.0
"""As long as the kernel keeps its own: a session under steady load hardly ever sees an empty path."""
RTT_GAIN = 0.25
PROXY_RTT = 4.0
"""A PING that never takes less than so many of TCP's own round trips goes further than TCP sees: there is a proxy. Less
than that is what a busy process or a full send buffer does to PINGs."""

LANE_BYTES = 2.5e6
"""What one lane keeps in flight under the usual limit of tcp_wmem (4 MiB, of which the kernel counts its overhead)."""
HEADROOM = 1.25
"""Lanes share a link unevenly, so the mean of what they keep in flight is below what each could."""
KEEP = 2.5
"""Lanes are given up only where so many times the bandwidth-delay product would fit into those that stay: giving one up
costs what is on it, and its successor would start slowly."""
TOO_FEW_S = 300.0
"""A number of lanes that was too small is not tried again for so long."""
LIMITED_SHARE = 0.1
"""Of its busy time in which a buffer or window, not the link, held a lane back: then more lanes carry more."""
CONGESTED_RTT = 2.0
CONGESTED_LOSS = 0.05


class _Point(NamedTuple):
    at_s: float
    delivered_bytes: int


class _Rate(NamedTuple):
    busy_s: float
    """The busy clock at its end: the weights of all rates so far."""
    bytes_per_s: float
    weight_s: float


class LinkEstimator:
    """Of one session, in the sending direction; all instants are of one monotonic clock and must not decrease."""

    def __init__(self) -> None:
        self._points: list[_Point] = []
        self._flight_s = -math.inf
        self._latest: _Point | None = None
        """Where the latest rate's span began."""
        self._rates: deque[_Rate] = deque()
        self._bounds: deque[_Rate] = deque()
        """Lower bounds, falling from the left to the right."""
        self._busy_s = 0.0
        self._unmeasured_s = 0.0
        """Time in which the link had enough to do, since the latest rate."""
        self._now_s = -math.inf
        self._hungry = True
        """A lane found nothing to take."""
        self._starved = True
        """And the link isn't full without."""
        self._starved_s = -math.inf
        self._full_bytes = math.inf
        """Under way, while the link is full; as of the last estimate."""
        self._supplied: deque[tuple[float, int]] = deque()
        """When lanes took chunks, and all bytes that they had taken by then; of the younger half under way."""
        self._supplied_bytes = 0
        self._most_bytes = 0
        """Under way when chunks were taken last, these included."""
        self._linger_s = math.inf
        """What is under way for longer waits for the link; as of the last estimate."""
        self._queued_bytes = 0
        self._in_flight_bytes = 0
        self._rtt_s = 0.0
        self._low_rtts: deque[tuple[float, float]] = deque()
        self._lanes = _LaneHistory()
        self._lane_bytes = LANE_BYTES
        self._too_few = 0
        self._too_few_until_s = -math.inf

    # -- what happens

    def acknowledged(self, wire_bytes: int, sent_s: float, now_s: float) -> None:
        """The peer has a chunk that was handed to its lane at `sent_s`."""
        self._advance(now_s)
        sent_s = min(sent_s, now_s)
        self._low_rtt(now_s - sent_s, now_s)
        points = self._points
        if not points or sent_s > points[-1].at_s:
            # Nothing was under way when it left: time counts from there.
            self._flight_s = sent_s
            points.append(_Point(sent_s, points[-1].delivered_bytes if points else 0))
        point = _Point(now_s, points[-1].delivered_bytes + wire_bytes)
        if len(points) > 1 and points[-1].at_s - points[-2].at_s < POINT_S and points[-2].at_s >= self._flight_s:
            points[-1] = point
        else:
            points.append(point)
        if len(points) > 2 * KEPT_POINTS:
            del points[:KEPT_POINTS]
        self._measure(sent_s, point)
        self._in_flight_bytes = max(0, self._in_flight_bytes - wire_bytes)
        self._look_if_starved()

    def starved(self, now_s: float) -> None:
        """A lane could take a chunk and there was none for it. Holds until `supplied`."""
        self._advance(now_s)
        self._hungry = True
        self._look_if_starved()

    def supplied(self, wire_bytes: int, now_s: float) -> None:
        """A lane took chunks of so many bytes."""
        self._advance(now_s)
        self._in_flight_bytes += wire_bytes
        self._most_bytes = self._in_flight_bytes
        self._supplied_bytes += wire_bytes
        self._supplied.append((now_s, self._supplied_bytes))
        self._hungry = self._starved = False

    def queue(self, queued_bytes: int, in_flight_bytes: int, now_s: float) -> None:
        """KV that is ready and not acknowledged, and bytes that lanes have taken and aren't acknowledged (chunks of
        lanes that died are not among them any more); now, at each tick."""
        self._advance(now_s)
        self._queued_bytes = queued_bytes
        self._in_flight_bytes = in_flight_bytes
        self._look_if_starved()

    def ping(self, rtt_s: float, now_s: float) -> None:
        """A PING's round trip. One that can't be true is ignored."""
        if not (0 <= rtt_s < math.inf):
            return
        self._rtt_s += (rtt_s - self._rtt_s) * (RTT_GAIN if self._rtt_s else 1.0)
        self._low_rtt(rtt_s, now_s)

    def lanes(self, samples: Mapping[Hashable, LaneSample], now_s: float) -> None:
        """All lanes that tell something, at each tick; the key names the connection: not a lane's index, which its
        successor inherits, while the counters begin anew."""
        self._lanes.add(samples, now_s)

    # -- what follows from it

    def estimate(self, now_s: float) -> LinkEstimate:
        self._advance(now_s)
        bandwidth = self._bandwidth(now_s)
        rtt_s, min_rtt_s = self._round_trip()
        self._full_bytes = bandwidth * (FULL_S + 2 * min_rtt_s) if bandwidth else math.inf
        self._linger_s = FULL_S + max(START_RTTS * min_rtt_s, rtt_s) if min_rtt_s else math.inf
        return LinkEstimate(
            bandwidth_bytes_per_s=bandwidth,
            rtt_s=rtt_s,
            min_rtt_s=min_rtt_s,
            loss=self._lanes.loss(),
            utilisation=self._utilisation(bandwidth, now_s),
            queued_bytes=self._queued_bytes,
        )

    def wanted_lanes(self, current: int, low: int, high: int, now_s: float) -> int:
        """See the function of this name; call it every `LANES_WINDOW_S`, so that it sees what the last change did."""
        recent = self._lanes.recent()
        held = [sample.in_flight_bytes for sample in recent if _is_limited(sample)]
        self._lane_bytes = max(held, default=0) or self._lane_bytes
        if now_s >= self._too_few_until_s:
            self._too_few = 0
        low = min(max(low, self._too_few + 1), high)
        wanted = wanted_lanes(self.estimate(now_s), recent, current, low, high, self._lane_bytes)
        if wanted > current:
            self._too_few, self._too_few_until_s = max(self._too_few, current), now_s + TOO_FEW_S
        return wanted

    # -- inside

    def _advance(self, now_s: float) -> None:
        busy_from_s = self._now_s
        if self._starved:
            busy_from_s = max(busy_from_s, self._lingers_from_s())
            self._starved, self._starved_s = now_s <= busy_from_s, min(now_s, busy_from_s)
        if now_s > busy_from_s > -math.inf:
            self._unmeasured_s += now_s - busy_from_s
        self._now_s = max(self._now_s, now_s)

    def _look_if_starved(self) -> None:
        """As of the last `_advance`."""
        lingers = self._now_s > self._lingers_from_s()
        starved = self._hungry and not lingers and self._in_flight_bytes <= self._full_bytes
        if starved and not self._starved:
            self._starved_s = self._now_s
        self._starved = starved

    def _lingers_from_s(self) -> float:
        """From when on half of what is under way has been so for too long, if nothing more is handed over."""
        supplied = self._supplied
        while supplied and supplied[0][1] < self._supplied_bytes - self._in_flight_bytes / 2:
            supplied.popleft()
        left = self._in_flight_bytes >= MOST * self._most_bytes > 0
        return supplied[0][0] + self._linger_s if supplied and left else math.inf

    def _measure(self, sent_s: float, end: _Point) -> None:
        begin = self._begin(sent_s, end)
        if begin is None or end.at_s <= begin.at_s:
            return  # it was under way for longer than anything is remembered
        rate = _rate(begin, end)
        if self._starved or self._starved_s >= begin.at_s:
            while self._bounds and self._bounds[-1].bytes_per_s <= rate:
                self._bounds.pop()
            self._bounds.append(_Rate(self._busy_s, rate, 0.0))
            full = None if self._starved else self._begin_of_waiting()
            if full is None or end.at_s - full.at_s < SLOT_S:
                return
            begin, rate = full, _rate(full, end)
        self._latest = begin
        weight_s = min(self._unmeasured_s, end.at_s - begin.at_s) if self._rates else SLOT_S
        if weight_s >= SLOT_S:
            self._busy_s += weight_s
            self._unmeasured_s = 0.0
            self._rates.append(_Rate(self._busy_s, rate, weight_s))

    def _begin(self, sent_s: float, end: _Point) -> _Point | None:
        points = self._points
        earliest = points[-SAMPLE_POINTS - 1].at_s if len(points) > SAMPLE_POINTS else -math.inf
        begin_s = min(sent_s, max(self._flight_s, min(end.at_s - SLOT_S, earliest)))
        index = bisect_right(points, begin_s, key=_at_s) - 1
        return points[index] if index >= 0 else None

    def _begin_of_waiting(self) -> _Point | None:
        """The first acknowledgement since the link has been full, after a slow start."""
        index = bisect_right(self._points, max(self._starved_s, self._flight_s + self._linger_s), key=_at_s)
        return self._points[index] if index < len(self._points) else None

    def _bandwidth(self, now_s: float) -> float:
        oldest_s = self._busy_s - WINDOW_S
        for kept in (self._rates, self._bounds):
            while len(kept) > 1 and kept[0].busy_s < oldest_s:
                kept.popleft()
        if not self._rates:
            return self._bounds[0].bytes_per_s if self._bounds else 0.0
        rates = list(self._rates)
        falling = self._falling_rate(now_s)
        if falling is not None:
            oldest_s = falling.busy_s - WINDOW_S
            rates = [rate for rate in rates if rate.busy_s >= oldest_s]
            rates.append(falling)
        bounds = (bound.bytes_per_s for bound in self._bounds if bound.busy_s >= oldest_s)
        return max(_quantile(rates), next(bounds, 0.0))

    def _falling_rate(self, now_s: float) -> _Rate | None:
        """Where nothing comes back though much is under way."""
        last = self._points[-1]
        since_s = max(last.at_s, self._starved_s)
        silent_s = now_s - since_s
        if self._starved or silent_s <= SLOT_S:
            return None
        begin = self._latest
        if begin is not None and begin.at_s > self._starved_s:
            falling = (last.delivered_bytes - begin.delivered_bytes) / (now_s - begin.at_s)
        else:
            falling = self._in_flight_bytes / silent_s  # it would be back by now
        return _Rate(self._busy_s + silent_s, min(self._rates[-1].bytes_per_s, falling), min(silent_s, WINDOW_S))

    def _utilisation(self, bandwidth: float, now_s: float) -> float:
        if not bandwidth:
            return 0.0
        if self._starved_s < now_s - USE_S:
            return 1.0
        index = bisect_right(self._points, now_s - USE_S, key=_at_s) - 1
        used = self._points[-1].delivered_bytes - self._points[max(0, index)].delivered_bytes
        return min(1.0, used / USE_S / bandwidth)

    def _low_rtt(self, rtt_s: float, now_s: float) -> None:
        if rtt_s < 0:
            return
        low = self._low_rtts
        while low and low[-1][1] >= rtt_s:
            low.pop()
        low.append((now_s, rtt_s))
        while low[0][0] < now_s - MIN_RTT_S:
            low.popleft()

    def _round_trip(self) -> tuple[float, float]:
        """Smoothed and lowest."""
        seen = [s for s in self._lanes.latest() if s.rtt_s > 0]
        low_s = self._low_rtts[0][1] if self._low_rtts else 0.0
        if not seen:
            return self._rtt_s or low_s, low_s
        near_s = min(sample.min_rtt_s for sample in seen)
        network_s = sum(sample.rtt_s for sample in seen) / len(seen)
        # What TCP measures doesn't wait in the send buffer, as chunks and PINGs do, but ends at a proxy.
        beyond_s = low_s - near_s if self._rtt_s and low_s > PROXY_RTT * near_s else 0.0
        return network_s + beyond_s, near_s + beyond_s


def _at_s(point: _Point) -> float:
    return point.at_s


def _rate(begin: _Point, end: _Point) -> float:
    return (end.delivered_bytes - begin.delivered_bytes) / (end.at_s - begin.at_s)


def _quantile(rates: list[_Rate]) -> float:
    """By time, of at least one."""
    rates.sort(key=lambda rate: rate.bytes_per_s)
    left_s = QUANTILE * sum(rate.weight_s for rate in rates)
    for rate in rates:
        left_s -= rate.weight_s
        if left_s <= 0:
            return rate.bytes_per_s
    return rates[-1].bytes_per_s


class _LaneHistory:
    """The lanes' samples of the last ticks."""

    def __init__(self) -> None:
        self._ticks: deque[tuple[float, Mapping[Hashable, LaneSample]]] = deque()
        self._changes: deque[tuple[float, int, int]] = deque()
        """At what time, bytes sent, and bytes sent again."""

    def add(self, samples: Mapping[Hashable, LaneSample], now_s: float) -> None:
        last = self._ticks[-1][1] if self._ticks else {}
        sent = again = 0
        for key, sample in samples.items():
            before = _before(last, key, sample)
            sent += sample.sent_bytes - (before.sent_bytes if before else 0)
            again += sample.retransmitted_bytes - (before.retransmitted_bytes if before else 0)
        self._changes.append((now_s, sent, again))
        self._ticks.append((now_s, dict(samples)))
        while self._changes[0][0] <= now_s - LOSS_WINDOW_S:
            self._changes.popleft()
        # The one before the window is what its counters are counted from.
        while len(self._ticks) > 1 and self._ticks[1][0] <= now_s - LANES_WINDOW_S:
            self._ticks.popleft()

    def loss(self) -> float:
        sent = sum(change[1] for change in self._changes)
        return min(1.0, sum(change[2] for change in self._changes) / sent) if sent else 0.0

    def latest(self) -> list[LaneSample]:
        return list(self._ticks[-1][1].values()) if self._ticks else []

    def recent(self) -> list[LaneSample]:
        """The lanes of the last tick; their counters count the last `LANES_WINDOW_S` only, bytes in flight are the most
        that was seen in it."""
        if not self._ticks:
            return []
        return [self._recent(key, sample) for key, sample in self._ticks[-1][1].items()]

    def _recent(self, key: Hashable, last: LaneSample) -> LaneSample:
        own = [tick[key] for _, tick in self._ticks if _before(tick, key, last) is not None]
        most = max(sample.in_flight_bytes for sample in own)
        # A lane that isn't in the first tick is younger than the window.
        first = _before(self._ticks[0][1], key, last) if len(self._ticks) > 1 else None
        if first is None:
            return replace(last, in_flight_bytes=most)
        return replace(
            last,
            sent_bytes=last.sent_bytes - first.sent_bytes,
            retransmitted_bytes=last.retransmitted_bytes - first.retransmitted_bytes,
            acknowledged_bytes=last.acknowledged_bytes - first.acknowledged_bytes,
            in_flight_bytes=most,
            busy_s=max(0.0, last.busy_s - first.busy_s),
            receive_limited_s=max(0.0, last.receive_limited_s - first.receive_limited_s),
            send_limited_s=max(0.0, last.send_limited_s - first.send_limited_s),
        )


def _before(tick: Mapping[Hashable, LaneSample], key: Hashable, now: LaneSample) -> LaneSample | None:
    """The lane's sample in an earlier tick, unless its counters are above today's: that was another connection."""
    sample = tick.get(key)
    if sample is None or sample.sent_bytes > now.sent_bytes or sample.retransmitted_bytes > now.retransmitted_bytes:
        return None
    return sample


def wanted_lanes(
    estimate: LinkEstimate,
    recent: Sequence[LaneSample],
    current: int,
    low: int,
    high: int,
    lane_bytes: float = LANE_BYTES,
) -> int:
    """How many lanes a session should have, from `low` to `high`, when it has `current`.

    `recent`: a sample a lane whose counters count the last seconds only, or nothing where lanes tell nothing.
    `lane_bytes`: what one lane keeps in flight when its send buffer or the receiver's window holds it back.

    Lanes × lane_bytes must be above the bandwidth-delay product. Too few lanes measure too little of it, so they double
    while buffers or windows hold most of them back. One lane a call is given up, and only where the rest do with much
    to spare, or where the path is congested.
    """
    product = estimate.bandwidth_bytes_per_s * estimate.min_rtt_s
    needed = product / lane_bytes
    held = sum(_is_limited(sample) for sample in recent)
    wanted = current
    if estimate.rtt_s > CONGESTED_RTT * estimate.min_rtt_s and estimate.loss > CONGESTED_LOSS:
        wanted = current - 1
    elif recent and 2 * held >= len(recent):
        wanted = 2 * current
    elif math.ceil(HEADROOM * needed) > current:
        wanted = math.ceil(HEADROOM * needed)
    elif estimate.bandwidth_bytes_per_s and math.ceil(KEEP * product / min(lane_bytes, LANE_BYTES)) < current:
        wanted = current - 1
    return min(max(wanted, low), high)


def _is_limited(sample: LaneSample) -> bool:
    return sample.busy_s > 0 and sample.receive_limited_s + sample.send_limited_s >= LIMITED_SHARE * sample.busy_s
