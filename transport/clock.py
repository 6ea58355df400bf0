"""How far the peer's monotonic clock is from ours, from PINGs; pure.

A PING that left at t0 and whose PONG, stamped t by the peer, came back at t1: the peer stamped it at some moment
between t0 and t1 of our clock, so offset = t − (t0 + t1)/2 is wrong by at most (t1 − t0)/2. The fastest round trip of
the last many bounds it best; old ones are forgotten because clocks drift (some 50 ppm).
"""

from __future__ import annotations

import math
from collections import deque

from prfaas.transport.api import LinkClock

KEPT_SAMPLES = 64
DRIFT = 50e-6
"""Seconds of error that a sample gains each second of its age."""


class ClockEstimator:
    def __init__(self) -> None:
        self._samples: deque[tuple[float, float, float]] = deque(maxlen=KEPT_SAMPLES)

    def add(self, sent_s: float, peer_s: float, received_s: float) -> None:
        """One PING's three instants. A PONG that can't be true (a negative round trip, no finite number) is ignored."""
        rtt_s = received_s - sent_s
        if rtt_s >= 0 and math.isfinite(rtt_s) and math.isfinite(peer_s):
            self._samples.append((rtt_s, peer_s - (sent_s + received_s) / 2, received_s))

    def estimate(self, now_s: float) -> LinkClock | None:
        """None before the first PONG."""
        if not self._samples:
            return None
        rtt_s, offset_s, at_s = min(self._samples, key=lambda s: s[0] / 2 + DRIFT * (now_s - s[2]))
        return LinkClock(offset_s=offset_s, error_s=rtt_s / 2 + DRIFT * max(0.0, now_s - at_s), rtt_s=rtt_s)
