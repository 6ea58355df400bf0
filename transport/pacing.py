"""How fast bytes may leave: a token bucket. Pure: time is an argument."""

from __future__ import annotations

BURST_S = 0.02
"""The bucket holds what the rate gives in so long: enough that a lane is never idle for want of a timer's precision,
little enough that a policer on the way does not see a burst."""
MIN_BURST_BYTES = 64 << 10


class TokenBucket:
    """A chunk may leave while the bucket is not empty, and may overdraw it: the next one waits until the debt is paid.
    So the rate is exact over time for chunks of any size."""

    def __init__(self, rate_bytes_per_s: float, now_s: float) -> None:
        self._rate = rate_bytes_per_s
        self._burst = max(MIN_BURST_BYTES, rate_bytes_per_s * BURST_S)
        self._tokens = self._burst
        self._filled_s = now_s

    def wait_s(self, now_s: float) -> float:
        """How long until a chunk may leave; 0.0: now."""
        self._tokens = min(self._burst, self._tokens + (now_s - self._filled_s) * self._rate)
        self._filled_s = now_s
        return 0.0 if self._tokens > 0 else max(1e-4, -self._tokens / self._rate)

    def take(self, nbytes: int) -> None:
        self._tokens -= nbytes
