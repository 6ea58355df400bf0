"""Which congestion control a lane should have, from what the kernel measures of it; pure.

    near (round trip below WAN_RTT_S)       cubic: bbr's pacing costs half the rate there
    far, packets lost only when queues fill cubic: it fills a clean link to 97 %, bbr to 94 %
    far, packets lost on the way as well    bbr: cubic takes each loss for congestion and all but stops

Loss that comes without queueing tells the last two apart: a packet dropped by a full queue is preceded by a round trip
that has grown by that queue. A lane that was once found lossy stays with bbr.
"""

from __future__ import annotations

from prfaas.transport.lanes.api import LaneSample

WAN_RTT_S = 0.002
LOOK_BYTES = 1 << 20
"""Sent between two looks at a lane: some 700 packets."""
QUEUED_RTT = 1.25
"""Round trips above so many times the lowest have waited in a queue."""
LOSSES = 2
"""Looks that must have found loss without queueing: one may be a burst of somebody else's traffic."""


class LossWatch:
    """Of one lane. `lossy(sample)` at each sample; True once packets are found to be lost for other reasons than full
    queues, and from then on."""

    def __init__(self) -> None:
        self._sent_bytes = 0
        self._retransmitted_bytes = 0
        self._queued = False
        self._losses = 0

    def lossy(self, sample: LaneSample) -> bool:
        self._queued = self._queued or sample.rtt_s > QUEUED_RTT * sample.min_rtt_s
        if sample.sent_bytes - self._sent_bytes >= LOOK_BYTES:
            if sample.retransmitted_bytes > self._retransmitted_bytes and not self._queued:
                self._losses += 1
            self._sent_bytes, self._retransmitted_bytes = sample.sent_bytes, sample.retransmitted_bytes
            self._queued = False
        return self._losses >= LOSSES
