"""Which congestion control a lane gets."""

from __future__ import annotations

import dataclasses

from prfaas.transport.lanes.api import LaneSample
from prfaas.transport.lanes.congestion import LOOK_BYTES, LossWatch

LANE = LaneSample(
    rtt_s=0.08,
    min_rtt_s=0.08,
    delivery_bytes_per_s=1e7,
    app_limited=False,
    sent_bytes=0,
    retransmitted_bytes=0,
    acknowledged_bytes=0,
    in_flight_bytes=0,
    queued_bytes=0,
    busy_s=1.0,
    receive_limited_s=0.0,
    send_limited_s=0.0,
)


def look(watch: LossWatch, n: int, retransmitted_bytes: int, rtt_s: float = 0.08) -> bool:
    """The n-th look, after as many bytes as one needs."""
    return watch.lossy(
        dataclasses.replace(LANE, sent_bytes=n * LOOK_BYTES, retransmitted_bytes=retransmitted_bytes, rtt_s=rtt_s)
    )


def test_loss_without_queueing_is_no_congestion() -> None:
    """Found at the second look that sees it, and for good."""
    watch = LossWatch()
    assert not look(watch, 1, 1500)
    assert look(watch, 2, 3000)
    assert look(watch, 3, 3000)


def test_loss_behind_a_queue_is_congestion() -> None:
    """However often: that is what cubic is for."""
    watch = LossWatch()
    assert not any(look(watch, n, 1500 * n, rtt_s=0.12) for n in range(1, 50))


def test_a_queue_at_any_sample_since_the_last_look_counts() -> None:
    """The loss may be counted when the queue has drained already."""
    watch = LossWatch()
    for n in range(1, 20):
        watch.lossy(dataclasses.replace(LANE, sent_bytes=n * LOOK_BYTES - 1, rtt_s=0.12))
        assert not look(watch, n, 1500 * n)


def test_a_clean_lane_stays() -> None:
    """No loss, whatever the round trip does."""
    watch = LossWatch()
    assert not any(look(watch, n, 0, rtt_s=rtt_s) for n, rtt_s in enumerate([0.08, 0.2, 0.08] * 10, 1))
