"""Whose turn it is: bytes, not chunks, are shared out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
from prfaas.transport.fairness import BOOST, DeficitRoundRobin

QUANTUM = 1000


@dataclass(eq=False)
class Transfer:
    chunk_bytes: int
    left_bytes: int = 1 << 40
    urgent: bool = False
    asked: int = 0

    @property
    def next_bytes(self) -> int:
        self.asked += 1
        return min(self.chunk_bytes, self.left_bytes)


def serve(turns: DeficitRoundRobin[Transfer], total_bytes: int) -> Counter[Transfer]:
    """What each got of so many bytes."""
    got: Counter[Transfer] = Counter()
    while sum(got.values()) < total_bytes and (flow := turns.next()) is not None:
        size = flow.next_bytes
        flow.left_bytes -= size
        got[flow] += size
    return got


def among(*flows: Transfer) -> DeficitRoundRobin[Transfer]:
    turns: DeficitRoundRobin[Transfer] = DeficitRoundRobin(QUANTUM)
    for flow in flows:
        turns.activate(flow)
    return turns


def test_bytes_are_shared_evenly_whatever_the_chunks() -> None:
    """Within one quantum and one chunk, at any time."""
    flows = [Transfer(1000), Transfer(10), Transfer(333), Transfer(999)]
    turns = among(*flows)
    so_far: Counter[Transfer] = Counter()
    for _ in range(200):
        so_far += serve(turns, 700)
        assert max(so_far.values()) - min(so_far[flow] for flow in flows) <= 2 * QUANTUM, so_far


def test_a_chunk_larger_than_the_quantum_leaves_too() -> None:
    """It saves up; the share stays even."""
    large, small = Transfer(3500), Transfer(100)
    got = serve(among(large, small), 700_000)
    assert abs(got[large] - got[small]) <= 3500 + QUANTUM


def test_one_whose_slack_has_run_out_gets_more_and_starves_nobody() -> None:
    """BOOST times the others' share."""
    late, other, another = Transfer(500, urgent=True), Transfer(500), Transfer(100)
    got = serve(among(late, other, another), 600_000)
    assert got[late] == pytest.approx(BOOST * got[other], rel=0.05)
    assert got[other] == pytest.approx(got[another], rel=0.05)


@pytest.mark.parametrize("before", [0, 1, 500, 999, 1000, 1500])
def test_a_small_one_beside_a_large_one_waits_for_a_quantum_at_most(before: int) -> None:
    """Whenever it comes: a megabyte is not stuck behind a gigabyte."""
    large, small = Transfer(500), Transfer(100, left_bytes=QUANTUM)
    turns = among(large)
    serve(turns, before)
    turns.activate(small)
    waited = 0
    while (flow := turns.next()) is large:
        waited += flow.next_bytes
    assert flow is small
    assert waited <= QUANTUM


def test_among_many_the_newest_waits_for_one_round() -> None:
    """A quantum of each, no more."""
    turns = among(*(Transfer(1000) for _ in range(1000)))
    serve(turns, 12_345)
    turns.activate(small := Transfer(10, left_bytes=10))
    waited = 0
    while (flow := turns.next()) is not small:
        assert flow is not None
        waited += flow.next_bytes
    assert waited <= 1000 * QUANTUM


def test_leaving_and_coming_back_gains_nothing() -> None:
    """One that has a chunk now and then gets no more than its share."""
    steady, fitful = Transfer(100), Transfer(100)
    turns = among(steady, fitful)
    got: Counter[Transfer] = Counter()
    for _ in range(2000):
        flow = turns.next()
        assert flow is not None
        got[flow] += flow.next_bytes
        fitful.left_bytes = 0 if flow is fitful else 1 << 40
        turns.activate(fitful)
    assert got[fitful] <= got[steady]


def test_idle_ones_cost_nothing() -> None:
    """Each is looked at once, when it leaves; then only when it has been woken."""
    idle = [Transfer(100, left_bytes=0) for _ in range(1000)]
    busy = Transfer(100)
    turns = among(*idle, busy)
    serve(turns, 50_000)
    assert all(flow.asked == 1 for flow in idle)
    turns.activate(idle[0])
    serve(turns, 50_000)
    assert idle[0].asked == 2
    idle[1].left_bytes = 100
    turns.activate(idle[1])
    assert serve(turns, 5000)[idle[1]] == 100


def test_one_that_was_removed_gets_no_turn() -> None:
    """At once, and nobody else's turn is lost; twice is once."""
    gone, other = Transfer(100), Transfer(100)
    turns = among(gone, other)
    turns.next()
    turns.remove(gone)
    turns.remove(gone)
    assert serve(turns, 1000) == {other: 1000}
    turns.remove(other)
    assert turns.next() is None
