"""The token bucket: time is an argument, so every figure here is exact."""

from __future__ import annotations

import random

import pytest
from prfaas.transport.pacing import BURST_S, MIN_BURST_BYTES, TokenBucket

START_S = 100.0


@pytest.mark.parametrize("rate", [1e5, 25e6, 1.25e9])
@pytest.mark.parametrize("chunk_bytes", [4096, 1 << 20, 16 << 20])
def test_the_rate_is_exact_over_time_for_chunks_of_any_size(rate: float, chunk_bytes: int) -> None:
    """Whoever waits as told has sent the rate, the first burst and the last chunk; a chunk above the burst leaves."""
    bucket, now, sent = TokenBucket(rate, START_S), START_S, 0
    for _ in range(400):
        while (wait_s := bucket.wait_s(now)) > 0:
            now += wait_s
        bucket.take(chunk_bytes)
        sent += chunk_bytes
    burst = max(MIN_BURST_BYTES, rate * BURST_S)
    allowed = rate * (now - START_S)
    assert sent <= allowed + burst + chunk_bytes
    assert sent >= allowed - rate * 2e-4  # the shortest wait


def test_no_window_of_time_sees_more_than_its_share_and_a_burst() -> None:
    """Chunks of mixed sizes at random times, the bucket asked early and late."""
    rate, rng = 10e6, random.Random(1)
    bucket, now, events = TokenBucket(rate, START_S), START_S, []
    for _ in range(2000):
        now += rng.choice([0.0, 0.0, 1e-4, 5e-3])
        if bucket.wait_s(now) == 0.0:
            size = rng.choice([500, 70_000, 300_000])
            bucket.take(size)
            events.append((now, size))
    burst = max(MIN_BURST_BYTES, rate * BURST_S)
    for first in range(0, len(events), 7):
        total = 0
        for at_s, size in events[first:]:
            total += size
            assert total <= rate * (at_s - events[first][0]) + burst + 300_000 + 1


def test_what_was_not_used_is_not_saved_up() -> None:
    """After an hour of silence there is one burst."""
    bucket = TokenBucket(10e6, START_S)
    now, sent = START_S + 3600, 0
    while bucket.wait_s(now) == 0.0:
        bucket.take(1000)
        sent += 1000
    assert sent == max(MIN_BURST_BYTES, 10e6 * BURST_S)


def test_the_wait_is_enough_and_not_too_long() -> None:
    """Before it is over nothing may leave; when it is, something may."""
    bucket = TokenBucket(1e6, START_S)
    bucket.take(1 << 20)
    wait_s = bucket.wait_s(START_S)
    assert wait_s == pytest.approx(((1 << 20) - MIN_BURST_BYTES) / 1e6)
    assert bucket.wait_s(START_S + wait_s * 0.999) > 0
    assert bucket.wait_s(START_S + wait_s + 1e-4) == 0.0
