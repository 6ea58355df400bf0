"""What the WAN between two regions can do, as the planner and the simulator see it."""

from __future__ import annotations

import math
from dataclasses import dataclass

BYTES_PER_S_PER_GBPS = 1e9 / 8


@dataclass(frozen=True, slots=True)
class LinkProfile:
    """One direction. bandwidth_bytes_per_s: of TCP payload. rtt_s: round trip. loss: share of bytes that must be sent
    again. Raises ValueError for a negative bandwidth or round trip, or a loss outside [0, 1)."""

    bandwidth_bytes_per_s: float
    rtt_s: float = 0.0
    loss: float = 0.0

    def __post_init__(self) -> None:
        for name in ("bandwidth_bytes_per_s", "rtt_s"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} = {value} must be finite and at least 0")
        if not 0 <= self.loss < 1:
            raise ValueError(f"loss = {self.loss} must be at least 0 and below 1")

    @classmethod
    def of_gbps(cls, gbps: float, rtt_s: float = 0.0, loss: float = 0.0) -> LinkProfile:
        """10⁹ bits a second."""
        return cls(gbps * BYTES_PER_S_PER_GBPS, rtt_s, loss)

    @property
    def gbps(self) -> float:
        return self.bandwidth_bytes_per_s / BYTES_PER_S_PER_GBPS

    @property
    def goodput_bytes_per_s(self) -> float:
        """What is left when lost bytes are sent again. This assumes lanes that loss doesn't slow down otherwise, as
        with bbr; cubic falls far lower."""
        return self.bandwidth_bytes_per_s * (1 - self.loss)
