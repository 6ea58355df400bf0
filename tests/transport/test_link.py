"""LinkEstimator and wanted_lanes over simulated links."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prfaas.transport.api import LinkEstimate
from prfaas.transport.lanes.api import LaneSample
from prfaas.transport.link import LANE_BYTES, LANES_WINDOW_S, LinkEstimator, wanted_lanes

MIB = 1 << 20
ACK_DELAY_S = 0.005


class SimulatedLink:
    """Chunks go through one bottleneck, in order; each lane has at most `window_bytes` on the way."""

    def __init__(
        self,
        rate: float,
        rtt_s: float = 0.08,
        lanes: int = 4,
        window_bytes: int = 4 * MIB,
        chunk_bytes: int = MIB,
        jitter_s: float = 0.0,
    ) -> None:
        self.estimator = LinkEstimator()
        self.rate = rate
        self.now_s = 1000.0
        self._rtt_s = rtt_s
        self._room = [window_bytes] * lanes
        self._chunk_bytes = chunk_bytes
        self._jitter_s = jitter_s
        self._rng = random.Random(1)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._free_s = self.now_s
        self._backlog = 0
        self._endless = False
        self.in_flight_bytes = 0
        self.estimator.starved(self.now_s)
        for lane in range(lanes):
            self.estimator.ping(rtt_s + 0.001 * lane, self.now_s)

    def put(self, nbytes: int) -> None:
        self._backlog += nbytes
        self._fill()

    def saturate(self) -> None:
        self._endless = True
        self._fill()

    def relax(self) -> None:
        self._endless = False

    def run(self, seconds: float) -> LinkEstimate:
        end_s = self.now_s + seconds
        while self._events and self._events[0][0] <= end_s:
            self.now_s, _, event = heapq.heappop(self._events)
            event()
        self.now_s = end_s
        self.estimator.queue(self._backlog + self.in_flight_bytes, self.in_flight_bytes, self.now_s)
        return self.estimator.estimate(self.now_s)

    def bandwidth_after(self, seconds: float) -> float:
        return self.run(seconds).bandwidth_bytes_per_s

    def _at(self, at_s: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at_s, next(self._order), event))

    def _fill(self) -> None:
        for lane, room in enumerate(self._room):
            while room >= self._chunk_bytes:
                size = self._chunk_bytes if self._endless else min(self._chunk_bytes, self._backlog)
                if not size:
                    self.estimator.starved(self.now_s)
                    return
                self._backlog = max(0, self._backlog - size)
                self.estimator.supplied(size, self.now_s)
                room -= size
                self._send(lane, size)

    def _send(self, lane: int, size: int) -> None:
        self._room[lane] -= size
        self.in_flight_bytes += size
        sent_s = self.now_s
        self._free_s = max(self._free_s, sent_s) + size / self.rate
        back_s = self._free_s + self._rtt_s + self._rng.random() * self._jitter_s
        at_s = math.ceil(back_s / ACK_DELAY_S) * ACK_DELAY_S

        def acknowledged() -> None:
            self._room[lane] += size
            self.in_flight_bytes -= size
            self.estimator.acknowledged(size, sent_s, self.now_s)
            self._fill()

        self._at(at_s, acknowledged)


@given(
    rate=st.floats(2e6, 2e9),
    rtt_s=st.floats(0.0001, 0.2),
    lanes=st.integers(1, 8),
    chunk_bytes=st.sampled_from([256 << 10, MIB]),
    jitter_s=st.floats(0, 0.01),
)
@settings(max_examples=60, deadline=None)
def test_a_saturated_link_is_measured(rate: float, rtt_s: float, lanes: int, chunk_bytes: int, jitter_s: float) -> None:
    """Whatever its rate and round trip, with lanes whose windows cover them."""
    window = 2 * chunk_bytes + int(2 * rate * (rtt_s + jitter_s + 2 * ACK_DELAY_S) / lanes)
    link = SimulatedLink(rate, rtt_s, lanes, window, chunk_bytes, jitter_s)
    link.saturate()
    while link.now_s < 1000.0 + 1.0 + 40 * chunk_bytes / rate:
        found = link.run(0.05)
    assert found.bandwidth_bytes_per_s == pytest.approx(rate, rel=0.15)
    assert found.min_rtt_s == pytest.approx(rtt_s, abs=0.001)
    assert found.utilisation > 0.8
    assert found.queued_bytes == link.in_flight_bytes


@pytest.mark.parametrize("rtt_s", [0.001, 0.08])
def test_a_change_under_load_is_noticed(rtt_s: float) -> None:
    """Slower by 4 within four seconds, faster by 4 within two, and not by halves."""
    link = SimulatedLink(25e6, rtt_s)
    link.saturate()
    assert link.bandwidth_after(5) == pytest.approx(25e6, rel=0.1)
    link.rate = 6.25e6
    assert link.bandwidth_after(6) == pytest.approx(6.25e6, rel=0.15)
    link.rate = 25e6
    assert link.bandwidth_after(4.5) == pytest.approx(25e6, rel=0.15)


def test_a_slower_link_is_noticed_where_buffers_take_whole_transfers() -> None:
    """Lanes find nothing more to take though much is under way: the link is full all the same. And once it is faster
    again, that shows too."""
    link = SimulatedLink(25e6, rtt_s=0.005, window_bytes=16 * MIB)
    for _ in range(4):
        link.put(12 * MIB)
        found = link.run(1)
    assert found.bandwidth_bytes_per_s == pytest.approx(25e6, rel=0.1)
    link.rate = 2.5e6
    link.put(12 * MIB)
    assert link.run(2).utilisation == 1.0
    assert link.bandwidth_after(2) == pytest.approx(2.5e6, rel=0.15)
    link.run(10)
    link.rate = 25e6
    link.put(12 * MIB)
    assert link.bandwidth_after(1) == pytest.approx(25e6, rel=0.15)


@pytest.mark.parametrize("size_mib", [1, 2, 12])
def test_a_far_slower_link_is_noticed_by_transfers_that_buffers_take_whole(size_mib: int) -> None:
    """A fortieth of what is believed, so that what is under way looks like little, whatever a transfer's size: within
    seven seconds of traffic. Once the link is wide again, the first transfer shows it."""
    link = SimulatedLink(100e6, rtt_s=0.005, window_bytes=16 * MIB, chunk_bytes=128 << 10)
    link.saturate()
    assert link.bandwidth_after(5) == pytest.approx(100e6, rel=0.1)
    link.relax()
    link.run(1)
    link.rate, took_s = 2.5e6, 0.0
    while took_s < 7:
        link.put(size_mib * MIB)
        link.run(size_mib * MIB / link.rate)
        took_s += size_mib * MIB / link.rate
        found = link.run(0.5)
    assert found.bandwidth_bytes_per_s == pytest.approx(2.5e6, rel=0.15)
    link.rate = 100e6
    link.put(12 * MIB)
    assert link.bandwidth_after(0.3) == pytest.approx(100e6, rel=0.2)


def test_bandwidth_is_unknown_before_the_first_acknowledgement() -> None:
    """0.0, as documented; so are the times, and nothing is lost or in use."""
    assert LinkEstimator().estimate(5.0) == LinkEstimate(0.0, 0.0, 0.0, 0.0, 0.0, 0)


def test_a_session_short_of_data_never_lowers_the_estimate() -> None:
    """A trickle over a link that was measured at full load: the link is still what it was, and is hardly used."""
    link = SimulatedLink(100e6)
    link.saturate()
    known = link.bandwidth_after(5)
    link.relax()
    for _ in range(60):
        link.put(200_000)
        found = link.run(1)
    assert found.bandwidth_bytes_per_s == pytest.approx(known, rel=0.02)
    assert found.utilisation < 0.01


def known_and_idle(rate: float = 100e6, rtt_s: float = 0.005) -> tuple[LinkEstimator, float, float]:
    """A session's estimator that has measured its link and has nothing to send any more, the bandwidth, and now."""
    link = SimulatedLink(rate, rtt_s)
    link.saturate()
    known = link.bandwidth_after(5)
    link.relax()
    link.run(2)
    return link.estimator, known, link.now_s


def tell(estimator: LinkEstimator, events: list[tuple[float, int, float]]) -> list[LinkEstimate]:
    """Chunks, each with when it is handed over (a millisecond later its lane finds nothing more), its size and when it
    is acknowledged. The estimates in between, as of each tick."""
    told = [(sent_s, 0, size, sent_s) for sent_s, size, _ in events]
    told += [(sent_s + 0.001, 1, 0, 0.0) for sent_s, _, _ in events]
    told += [(acknowledged_s, 2, size, sent_s) for sent_s, size, acknowledged_s in events]
    begin_s, end_s = min(told)[0], max(told)[0]
    told += [(begin_s + 0.1 * tick, 3, 0, 0.0) for tick in range(int((end_s - begin_s) * 10) + 2)]
    found = []
    for now_s, kind, size, sent_s in sorted(told):
        if kind == 0:
            estimator.supplied(size, now_s)
        elif kind == 1:
            estimator.starved(now_s)
        elif kind == 2:
            estimator.acknowledged(size, sent_s, now_s)
        else:
            found.append(estimator.estimate(now_s))
    return found


def test_a_trickle_never_lowers_the_estimate_however_long_it_lasts() -> None:
    """Each chunk takes a moment until the lane has found that there is no other: that is no work to measure by."""
    estimator, known, now_s = known_and_idle()
    starts = [now_s + 0.05 * i for i in range(6000)]
    found = tell(estimator, [(at_s, 100_000, at_s + 0.012) for at_s in starts])
    assert {estimate.bandwidth_bytes_per_s for estimate in found} == {known}
    at_s = starts[-1] + 1.0  # and no moment of a slow link counts for all of them
    found = tell(estimator, [(at_s, 50_000, at_s + 0.02 * i) for i in range(1, 20)])
    assert found[-1].bandwidth_bytes_per_s == known


def test_a_trickle_that_halts_now_and_then_never_lowers_the_estimate() -> None:
    """A packet is lost and its timer runs out, a peer was busy: chunks wait for half a second and come all at once."""
    estimator, known, now_s = known_and_idle()
    starts = [now_s + 0.05 * i for i in range(4000)]
    halts = [now_s + 5 * (int((at_s - now_s) / 5)) for at_s in starts]
    events = [
        (at_s, 100_000, max(at_s + 0.012, halt_s + 0.5 + 0.006 * (at_s - halt_s)))
        for at_s, halt_s in zip(starts, halts, strict=True)
    ]
    found = tell(estimator, events)
    assert min(estimate.bandwidth_bytes_per_s for estimate in found) == pytest.approx(known, rel=0.02)
    assert found[-1].bandwidth_bytes_per_s == pytest.approx(known, rel=0.02)


@pytest.mark.parametrize(("wait_s", "rtt_s"), [(0.6, 0.6), (0.25, 0.005)])
def test_a_trickle_behind_what_others_send_never_lowers_the_estimate(wait_s: float, rtt_s: float) -> None:
    """It waits in a full queue of the network, which the round trip shows or a proxy hides: its rate is its own."""
    estimator, known, now_s = known_and_idle()
    estimator.lanes({1: lane(rtt_s=rtt_s, min_rtt_s=0.005)}, now_s)
    starts = [now_s + 3 * transfer + 0.05 * i for transfer in range(20) for i in range(40)]
    found = tell(estimator, [(at_s, 100_000, at_s + wait_s) for at_s in starts])
    assert found[-1].bandwidth_bytes_per_s == known


@pytest.mark.parametrize("size", [6_000_000, 32_000_000])
def test_a_slow_start_never_lowers_the_estimate(size: int) -> None:
    """Buffers take transfers whole, and each lane's window doubles from round trip to round trip: little comes back at
    first, be it little or much that is under way."""
    estimator, known, now_s = known_and_idle(rtt_s=0.08)
    events = []
    for transfer in range(30):
        at_s, sent, window, trip = now_s + 2.0 * transfer, 0, 4 * 14_480, 1
        while sent < size:
            events += [(at_s, window // 4, at_s + 0.08 * trip + 0.02 * i) for i in range(4)]
            sent, window, trip = sent + window, min(8_000_000, 2 * window), trip + 1
    assert tell(estimator, events)[-1].bandwidth_bytes_per_s == pytest.approx(known, rel=0.02)


def test_what_waits_for_the_slowest_lane_alone_is_not_the_link() -> None:
    """Eight lanes take a transfer in equal parts, seven are done at once and one takes seconds: a lane is no link."""
    estimator, known, now_s = known_and_idle()
    events = []
    for transfer in range(10):
        at_s = now_s + 4.0 * transfer
        events += [(at_s, 500_000, at_s + 0.005 + 0.006 * i) for i in range(7)]
        events += [(at_s, 50_000, at_s + 0.3 * (i + 1)) for i in range(10)]
    assert tell(estimator, events)[-1].bandwidth_bytes_per_s == known


def test_a_session_short_of_data_can_raise_the_estimate() -> None:
    """Bursts that end before the link is full show at least how much got through."""
    link = SimulatedLink(100e6, rtt_s=0.01)
    link.put(MIB)
    slow = link.bandwidth_after(1)
    assert 0 < slow < 100e6
    link.put(8 * MIB)
    faster = link.bandwidth_after(1)
    assert slow < faster <= 100e6 * 1.1
    link.put(MIB)
    assert link.bandwidth_after(1) == faster


def test_lanes_that_wait_for_the_codec_do_not_make_the_link_slow() -> None:
    """KV waits, but what is encoded comes too slowly for the lanes: that is the codec's speed, not the link's."""
    link = SimulatedLink(100e6, rtt_s=0.02)
    link.saturate()
    known = link.bandwidth_after(5)
    link.relax()
    link.run(1)
    for _ in range(300):
        link.put(MIB)
        found = link.run(0.04)
    assert found.bandwidth_bytes_per_s == pytest.approx(known, rel=0.02)
    assert found.utilisation == pytest.approx(MIB / 0.04 / known, rel=0.2)


def test_slow_starts_after_idle_times_do_not_make_the_link_slow() -> None:
    """Short busy times with idle ones between: a measurement ages by work, not by waiting."""
    link = SimulatedLink(100e6)
    link.saturate()
    known = link.bandwidth_after(5)
    link.relax()
    for _ in range(5):
        link.run(20)
        link.put(40 * MIB)
        found = link.run(2)
    assert found.bandwidth_bytes_per_s == pytest.approx(known, rel=0.05)


def test_a_link_that_stops_under_load_is_noticed() -> None:
    """Nothing comes back any more: the estimate falls, though no acknowledgement says so, and never to unknown."""
    link = SimulatedLink(25e6)
    link.saturate()
    known = link.bandwidth_after(5)
    link.rate = 1.0
    assert 0 < link.bandwidth_after(6) < known / 3
    assert 0 < link.bandwidth_after(20) < known / 20


def test_a_slow_link_is_not_taken_for_a_dead_one_before_its_first_chunk_is_there() -> None:
    """That takes longer than the window here, on a link that sat idle before and was far faster."""
    link = SimulatedLink(100e6, rtt_s=0.005, window_bytes=16 * MIB, chunk_bytes=8 * MIB)
    link.saturate()
    link.run(5)
    link.relax()
    link.run(10_000)
    link.rate = 2.5e6
    link.put(16 * MIB)
    assert min(link.bandwidth_after(0.1) for _ in range(80)) > 2e6


def test_chunks_that_come_all_at_once_after_a_halt_are_not_a_fast_link() -> None:
    """The first that a session ever sends: in ten milliseconds comes what had waited for a second."""
    estimator = LinkEstimator()
    estimator.ping(0.005, 0.0)
    first = [(1.0, 100_000, 1.1)]
    found = tell(estimator, [*first, *((2.0, 100_000, 3.0 + 0.006 * i) for i in range(6))])
    assert 0 < found[-1].bandwidth_bytes_per_s < 2e6


def test_a_chunk_stuck_on_a_slow_lane_is_not_counted_as_fast() -> None:
    """Its bytes took as long as they took: they don't fall into the short time since other lanes' chunks."""
    estimator = LinkEstimator()
    estimator.supplied(1000, 0.0)
    for i in range(1, 1000):
        estimator.acknowledged(1000, i * 0.01 - 0.01, i * 0.01)
    estimator.acknowledged(1_000_000, 0.0, 10.0)
    assert estimator.estimate(10.0).bandwidth_bytes_per_s < 250_000


@given(st.lists(st.tuples(st.integers(0, 6), st.floats(0, 2), st.floats(0, 20), st.integers(0, 1 << 30)), max_size=60))
def test_no_order_of_events_breaks_the_estimate(events: list[tuple[int, float, float, int]]) -> None:
    """All figures stay finite and in their ranges, however odd what is told."""
    estimator, now_s = LinkEstimator(), 50.0
    for kind, later_s, ago_s, size in events:
        now_s += later_s
        if kind == 0:
            estimator.acknowledged(size, now_s - ago_s, now_s)
        elif kind == 1:
            estimator.starved(now_s)
        elif kind == 2:
            estimator.supplied(size, now_s)
        elif kind == 3:
            estimator.ping(ago_s, now_s)
        elif kind == 4:
            estimator.queue(size, 2 * size, now_s)
        else:
            estimator.lanes({size % 3: lane(sent_bytes=size, retransmitted_bytes=size // 7)}, now_s)
        found = estimator.estimate(now_s)
        assert all(math.isfinite(value) and value >= 0 for value in dataclasses.astuple(found))
        assert found.loss <= 1
        assert found.utilisation <= 1
        assert 1 <= estimator.wanted_lanes(4, 1, 8, now_s) <= 8


# -- round trips ------------------------------------------------------------------------------------------------------

NO_SAMPLE = LaneSample(0.0, 0.0, 0.0, True, 0, 0, 0, 0, 0, 0.0, 0.0, 0.0)


def lane(**fields: float) -> LaneSample:
    return dataclasses.replace(NO_SAMPLE, **fields)  # type: ignore[arg-type]


def test_round_trips_without_tcp_info_are_those_of_pings() -> None:
    """Memory lanes and UCX: smoothed, and the lowest. An impossible one is ignored."""
    estimator = LinkEstimator()
    for at_s, rtt_s in enumerate([0.08, 0.3, 0.1, -1.0, math.nan]):
        estimator.ping(rtt_s, float(at_s))
    found = estimator.estimate(5.0)
    assert found.min_rtt_s == 0.08
    assert 0.08 < found.rtt_s < 0.3


def test_tcp_tells_the_network_from_the_send_buffer() -> None:
    """PINGs wait behind chunks, TCP's own round trips don't."""
    estimator = LinkEstimator()
    estimator.ping(0.2, 0.0)
    estimator.lanes({1: lane(rtt_s=0.09, min_rtt_s=0.08), 2: lane(rtt_s=0.10, min_rtt_s=0.081)}, 1.0)
    estimator.ping(0.9, 1.0)
    found = estimator.estimate(1.0)
    assert found.rtt_s == pytest.approx(0.095)
    assert found.min_rtt_s == pytest.approx(0.08)


def test_chunks_that_waited_in_the_send_buffer_do_not_make_the_way_long() -> None:
    """Before any PING is back: TCP knows it better."""
    estimator = LinkEstimator()
    estimator.acknowledged(1000, 0.0, 1.0)
    assert estimator.estimate(1.0).min_rtt_s == 1.0
    estimator.lanes({1: lane(rtt_s=0.09, min_rtt_s=0.08)}, 1.0)
    found = estimator.estimate(1.0)
    assert (found.rtt_s, found.min_rtt_s) == (0.09, 0.08)


def test_what_lies_behind_a_proxy_counts() -> None:
    """TCP sees the way to the proxy only, a PING goes all the way."""
    estimator = LinkEstimator()
    estimator.ping(0.08, 0.0)
    estimator.lanes({1: lane(rtt_s=0.0002, min_rtt_s=0.0001)}, 1.0)
    found = estimator.estimate(1.0)
    assert found.rtt_s == pytest.approx(0.0801)
    assert found.min_rtt_s == pytest.approx(0.08)


def test_a_longer_path_is_believed_in_the_end() -> None:
    """The lowest round trip is forgotten after some minutes."""
    estimator = LinkEstimator()
    estimator.ping(0.01, 0.0)
    for at_s in range(1, 400):
        estimator.ping(0.05, float(at_s))
    assert estimator.estimate(400.0).min_rtt_s == 0.05


# -- loss -------------------------------------------------------------------------------------------------------------


def test_loss_is_what_was_sent_again_lately() -> None:
    """Over all lanes, by bytes, forgotten ten seconds later."""
    estimator = LinkEstimator()
    estimator.lanes({1: lane(sent_bytes=1000), 2: lane(sent_bytes=3000, retransmitted_bytes=40)}, 1.0)
    assert estimator.estimate(1.0).loss == pytest.approx(0.01)
    estimator.lanes({1: lane(sent_bytes=5000), 2: lane(sent_bytes=5000, retransmitted_bytes=140)}, 2.0)
    assert estimator.estimate(2.0).loss == pytest.approx(0.014)
    estimator.lanes({1: lane(sent_bytes=9000), 2: lane(sent_bytes=9000, retransmitted_bytes=140)}, 13.0)
    assert estimator.estimate(13.0).loss == 0


def test_lanes_come_and_go_without_disturbing_the_loss() -> None:
    """A lane that is gone takes its counters along; one whose counters begin anew under its key was replaced."""
    estimator = LinkEstimator()
    estimator.lanes({1: lane(sent_bytes=1000), 2: lane(sent_bytes=1000, retransmitted_bytes=20)}, 1.0)
    estimator.lanes({1: lane(sent_bytes=1000)}, 2.0)
    assert estimator.estimate(2.0).loss == pytest.approx(0.01)
    estimator.lanes({1: lane(sent_bytes=500, retransmitted_bytes=5), 3: lane(sent_bytes=1500)}, 3.0)
    assert estimator.estimate(3.0).loss == pytest.approx(25 / 4000)
    estimator.lanes({}, 4.0)
    assert estimator.estimate(4.0).loss == pytest.approx(25 / 4000)


# -- lanes ------------------------------------------------------------------------------------------------------------


def link(bandwidth: float, rtt_s: float, loss: float = 0.0, congestion: float = 1.0) -> LinkEstimate:
    return LinkEstimate(bandwidth, congestion * rtt_s, rtt_s, loss, 1.0, 0)


FREE = lane(busy_s=3.0, in_flight_bytes=500_000)
HELD = lane(busy_s=3.0, send_limited_s=1.0, in_flight_bytes=2_500_000)
WINDOW = lane(busy_s=3.0, receive_limited_s=1.0, in_flight_bytes=1_000_000)


@pytest.mark.parametrize(
    ("estimate", "samples", "current", "expected"),
    [
        (link(0.0, 0.0), [], 4, 4),  # nothing known
        (link(125e6, 0.08), [FREE] * 2, 2, 5),  # 10 MB in flight at 2.5 MB a lane, and a quarter more
        (link(125e6, 0.0001), [FREE] * 2, 2, 1),  # no distance: one does, but slowly
        (link(125e6, 0.08), [FREE] * 12, 12, 11),
        (link(125e6, 0.08), [FREE] * 10, 10, 10),  # not to and fro
        (link(125e6, 0.08), [], 5, 5),
        (link(31e6, 0.08), [HELD], 1, 2),  # its own buffer, not the link, is what was measured
        (link(31e6, 0.08), [HELD, WINDOW], 2, 4),
        (link(31e6, 0.08), [HELD, FREE, FREE, FREE], 4, 3),
        (link(125e6, 0.08), [HELD] * 12, 12, 12),  # never more than allowed
        (link(125e6, 0.08, loss=0.06, congestion=3), [HELD] * 8, 8, 7),
        (link(125e6, 0.08, loss=0.05), [FREE] * 6, 6, 6),  # loss without a queue: it isn't ours
    ],
)
def test_wanted_lanes(estimate: LinkEstimate, samples: list[LaneSample], current: int, expected: int) -> None:
    """Each rule once."""
    assert wanted_lanes(estimate, samples, current, 1, 12) == expected


@given(
    st.floats(0, 1e10),
    st.floats(0, 1),
    st.floats(0, 1),
    st.lists(st.sampled_from([FREE, HELD, WINDOW]), max_size=8),
    st.integers(1, 16),
    st.integers(1, 8),
)
def test_wanted_lanes_are_within_bounds_and_settle(
    bandwidth: float, rtt_s: float, loss: float, samples: list[LaneSample], current: int, low: int
) -> None:
    """Asked again and again of the same link, it comes to rest."""
    estimate, seen = link(bandwidth, rtt_s, loss), [current]
    for _ in range(20):
        seen.append(wanted_lanes(estimate, samples, seen[-1], low, 8))
        assert low <= seen[-1] <= 8
    assert seen[-1] == seen[-2]


def test_a_number_of_lanes_that_was_too_small_is_not_tried_again_soon() -> None:
    """Lanes that doubled because buffers held them back don't go back to where they were while the link is the same,
    though it looks as if fewer would do; some minutes later they may."""
    estimator = LinkEstimator()
    estimator.ping(0.001, 0.0)
    estimator.supplied(1000, 0.0)
    estimator.acknowledged(1000, 0.0, 1.0)
    estimator.lanes(dict.fromkeys(range(4), HELD), 1.0)
    assert estimator.wanted_lanes(4, 1, 8, 1.0) == 8
    free = {i: dataclasses.replace(HELD, busy_s=100.0, sent_bytes=10) for i in range(8)}
    lanes = 8
    for at_s in range(10, 100, 3):
        estimator.lanes(free, float(at_s))
        lanes = estimator.wanted_lanes(lanes, 1, 8, float(at_s))
    assert lanes == 5
    for at_s in range(400, 500, 3):
        estimator.lanes(free, float(at_s))
        lanes = estimator.wanted_lanes(lanes, 1, 8, float(at_s))
    assert lanes == 1


def test_lanes_grow_until_buffers_no_longer_hold_them_back() -> None:
    """1 Gbit/s at 80 ms from one lane on: each round the lanes carry what their buffers allow. The number that it ends
    with fills the link."""
    rate, rtt_s, capacity, lanes, now_s, sent = 125e6, 0.08, 1_000_000, 1, 0.0, 0
    estimator = LinkEstimator()
    estimator.ping(rtt_s, 0.0)
    counts = [lanes]
    for _ in range(10):
        carried = min(rate, lanes * capacity / rtt_s)
        held = lanes * capacity / rtt_s < rate
        for _ in range(int(LANES_WINDOW_S)):
            for _ in range(20):
                now_s += 0.05
                estimator.supplied(int(carried * 0.05), now_s - 0.05)
                estimator.acknowledged(int(carried * 0.05), now_s - 0.2, now_s)
            sent += int(carried / lanes)
            each = lane(
                sent_bytes=sent, busy_s=now_s, send_limited_s=now_s * held * 0.5, rtt_s=rtt_s, min_rtt_s=rtt_s,
                in_flight_bytes=int(min(capacity, rate * rtt_s / lanes)),
            )  # fmt: skip
            estimator.lanes({(lanes, i): each for i in range(lanes)}, now_s)
        lanes = estimator.wanted_lanes(lanes, 1, 32, now_s)
        counts.append(lanes)
    assert counts == [1, 2, 4, 8] + [16] * 7
    assert capacity < LANE_BYTES  # by the default it would have given some up again
