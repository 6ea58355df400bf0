"""One direction of a WAN link: flows that share it fairly, each no faster than its prefill makes KV. Pure.

A flow *follows* its prefill while its fair share is no less than what the prefill makes; the link is then no matter.
Otherwise it is *behind*: what is left of it passes at the fair share, which is the same for all that are behind. One
counter, the bytes that each flow behind has had since the beginning, so holds the progress of all of them (processor
sharing by virtual time), and every change costs O(log flows).

A flow that is behind stays so until it is through. If the link recovers during its prefill it may thus draw, for the
rest of that prefill, a share that it can't fill yet; it is never through before its prefill.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

_EPSILON_BYTES = 1.0


@dataclass(slots=True)
class SharedLink:
    """rate_bytes_per_s: what all flows together get (a link's goodput). 0 stops them."""

    rate_bytes_per_s: float
    sent_bytes: float = 0.0
    """By all flows up to `_now_s`, those that were cancelled included."""
    _now_s: float = 0.0
    _caps: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Following: flow → (bytes/s that its prefill makes, when it began)."""
    _sizes: dict[int, float] = field(default_factory=dict)
    """Following: flow → bytes."""
    _by_cap: list[tuple[float, int]] = field(default_factory=list)
    """A heap of (−cap, flow), with entries of flows that have ended."""
    _cap_sum: float = 0.0
    _remaining_sum: float = 0.0
    """Bytes that the flows that follow have yet to send, at `_now_s`."""
    _ends: dict[int, float] = field(default_factory=dict)
    """Behind: flow → the counter at which it is through."""
    _by_end: list[tuple[float, int]] = field(default_factory=list)
    _end_sum: float = 0.0
    _served: float = 0.0
    """The counter: bytes that each flow behind has had."""

    def start(self, flow: int, size_bytes: float, prefill_s: float, now_s: float) -> None:
        """The flow's prefill begins, and makes `size_bytes` evenly in `prefill_s`."""
        self.advance(now_s)
        cap = size_bytes / prefill_s
        self._caps[flow] = (cap, now_s)
        self._sizes[flow] = size_bytes
        heapq.heappush(self._by_cap, (-cap, flow))
        self._cap_sum += cap
        self._remaining_sum += size_bytes
        self._share_out()

    def produced(self, flow: int, now_s: float) -> bool:
        """The flow's prefill has ended: True when all of it has passed but the last layer."""
        self.advance(now_s)
        if flow not in self._caps:
            return flow not in self._ends
        self._drop_following(flow, now_s)
        self._share_out()
        return True

    def cancel(self, flow: int, now_s: float) -> None:
        """Its node is gone; what was sent was sent."""
        self.advance(now_s)
        if flow in self._caps:
            self._drop_following(flow, now_s)
        elif flow in self._ends:
            self._end_sum -= self._ends.pop(flow)
        self._share_out()

    def set_rate(self, rate_bytes_per_s: float, now_s: float) -> None:
        self.advance(now_s)
        self.rate_bytes_per_s = rate_bytes_per_s
        self._share_out()

    def through(self, now_s: float) -> list[int]:
        """Flows behind that have passed wholly by now; they leave the link."""
        self.advance(now_s)
        done = []
        while self._by_end:
            end, flow = self._by_end[0]
            if self._ends.get(flow) != end:
                heapq.heappop(self._by_end)
                continue
            if end > self._served + _EPSILON_BYTES + 1e-9 * self._fair_share():
                break
            heapq.heappop(self._by_end)
            self._end_sum -= self._ends.pop(flow)
            done.append(flow)
        if done:
            self._share_out()
        return done

    def next_through_s(self) -> float:
        """When the next flow behind will be through if nothing changes; inf when none."""
        while self._by_end and self._ends.get(self._by_end[0][1]) != self._by_end[0][0]:
            heapq.heappop(self._by_end)
        rate = self._fair_share()
        if not self._by_end or rate <= 0:
            return float("inf")
        return self._now_s + max(0.0, self._by_end[0][0] - self._served) / rate

    def free_bytes_per_s(self) -> float:
        """What one more flow would get."""
        return max(self.rate_bytes_per_s - self._cap_sum, self.rate_bytes_per_s / 10) / (len(self._ends) + 1)

    def remaining_bytes(self, now_s: float) -> float:
        """Bytes of flows that have begun and are not through."""
        self.advance(now_s)
        behind = self._end_sum - len(self._ends) * self._served
        return max(0.0, self._remaining_sum) + max(0.0, behind)

    def advance(self, now_s: float) -> None:
        """Let time pass. Call `through` no later than `next_through_s` says."""
        passed_s = now_s - self._now_s
        if passed_s > 0:
            follow = self._cap_sum * passed_s
            share = self._fair_share() * passed_s
            self._remaining_sum -= follow
            self._served += share
            self.sent_bytes += follow + share * len(self._ends)
            self._now_s = now_s

    def _fair_share(self) -> float:
        if not self._ends:
            return 0.0
        return max(0.0, self.rate_bytes_per_s - self._cap_sum) / len(self._ends)

    def _drop_following(self, flow: int, now_s: float) -> None:
        cap, begun_s = self._caps.pop(flow)
        size = self._sizes.pop(flow)
        self._cap_sum -= cap
        self._remaining_sum -= size - cap * (now_s - begun_s)
        if not self._caps:
            self._cap_sum = self._remaining_sum = 0.0

    def _share_out(self) -> None:
        """Flows that follow and get less than they make fall behind, the fastest first."""
        while self._by_cap:
            cap, flow = -self._by_cap[0][0], self._by_cap[0][1]
            if flow not in self._caps or self._caps[flow][0] != cap:
                heapq.heappop(self._by_cap)
                continue
            spare = self.rate_bytes_per_s - self._cap_sum
            # Were it behind, it would share with those that are what it leaves.
            share = (spare + cap) / (len(self._ends) + 1)
            if cap <= share * (1 + 1e-12) + 1e-6:
                break
            heapq.heappop(self._by_cap)
            begun_s = self._caps[flow][1]
            left = self._sizes[flow] - cap * (self._now_s - begun_s)
            self._drop_following(flow, self._now_s)
            end = self._served + max(left, 0.0)
            self._ends[flow] = end
            self._end_sum += end
            heapq.heappush(self._by_end, (end, flow))
