"""A link that flows share."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prfaas.loadgen.simulator.link import SharedLink


def drain(link, ready, until_s=1e6):
    """Run on: flow → when it was through. ready: flow → when its prefill ends."""
    done = {}
    ends = sorted((at_s, flow) for flow, at_s in ready.items())
    while ends or link.next_through_s() < math.inf:
        through_s = link.next_through_s()
        if ends and ends[0][0] <= through_s:
            at_s, flow = ends.pop(0)
            if link.produced(flow, at_s) and flow not in done:
                done[flow] = at_s
            continue
        for flow in link.through(through_s):
            done[flow] = max(through_s, ready[flow])
        assert through_s < until_s
    return done


def test_a_fast_link_is_no_matter():
    """A flow whose prefill is slower than the link is through when its prefill is."""
    link = SharedLink(100.0)
    link.start(0, 500.0, 10.0, 0.0)
    assert link.next_through_s() == math.inf
    assert drain(link, {0: 10.0}) == {0: 10.0}
    assert link.sent_bytes == pytest.approx(500.0)


def test_a_slow_link_decides():
    """Otherwise after size over rate, however soon prefill ends."""
    link = SharedLink(100.0)
    link.start(0, 500.0, 1.0, 0.0)
    assert drain(link, {0: 1.0})[0] == pytest.approx(5.0, abs=0.02)


def test_flows_share_fairly():
    """Two equal flows get half each; a slow one takes only what its prefill makes, and the rest is the other's."""
    link = SharedLink(100.0)
    link.start(0, 500.0, 1.0, 0.0)
    link.start(1, 500.0, 1.0, 0.0)
    assert drain(link, {0: 1.0, 1: 1.0}) == {0: pytest.approx(10.0, abs=0.05), 1: pytest.approx(10.0, abs=0.05)}
    link = SharedLink(100.0)
    link.start(0, 200.0, 10.0, 0.0)  # 20 a second
    link.start(1, 800.0, 1.0, 0.0)  # gets 80 a second
    assert drain(link, {0: 10.0, 1: 1.0}) == {0: 10.0, 1: pytest.approx(10.0, abs=0.05)}


def test_the_rate_changes_and_stops():
    """What is left passes at the new rate; with none, nothing does."""
    link = SharedLink(100.0)
    link.start(0, 1000.0, 1.0, 0.0)
    link.set_rate(0.0, 5.0)
    assert link.next_through_s() == math.inf
    assert link.remaining_bytes(50.0) == pytest.approx(500.0)
    link.set_rate(50.0, 100.0)
    assert link.next_through_s() == pytest.approx(110.0)


def test_cancelled():
    """What is left of it is nobody's; the others get its share."""
    link = SharedLink(100.0)
    link.start(0, 1000.0, 1.0, 0.0)
    link.start(1, 1000.0, 1.0, 0.0)
    link.cancel(0, 10.0)
    assert link.remaining_bytes(10.0) == pytest.approx(500.0)
    assert link.next_through_s() == pytest.approx(15.0)
    link.cancel(7, 11.0)


FLOWS = st.lists(st.tuples(st.floats(0, 20), st.floats(1, 5000), st.floats(0.1, 20)), min_size=1, max_size=20)


@settings(deadline=None)
@given(FLOWS, st.floats(1, 2000))
def test_bytes_are_conserved(flows, rate):
    """All bytes of all flows pass, no flow before its prefill ends or faster than the link, and the link is never
    faster than its rate."""
    link, ready, done = SharedLink(rate), {}, {}
    events = sorted([(at_s, 0, flow) for flow, (at_s, _, _) in enumerate(flows)])
    ends = {flow: at_s + prefill_s for flow, (at_s, _, prefill_s) in enumerate(flows)}
    events += sorted((at_s, 1, flow) for flow, at_s in ends.items())
    for at_s, kind, flow in sorted(events):
        while link.next_through_s() <= at_s:
            now_s = link.next_through_s()
            done |= dict.fromkeys(link.through(now_s), now_s)
        if kind == 0:
            link.start(flow, flows[flow][1], flows[flow][2], at_s)
        else:
            ready[flow] = at_s
            if link.produced(flow, at_s):
                done.setdefault(flow, at_s)
    while link.next_through_s() < math.inf:
        now_s = link.next_through_s()
        done |= dict.fromkeys(link.through(now_s), now_s)
    sizes = sum(size for _, size, _ in flows)
    assert set(done) == set(ready)
    assert link.sent_bytes == pytest.approx(sizes, abs=1e-3 * sizes + 2.0 * len(flows))
    assert link.remaining_bytes(1e6) == pytest.approx(0.0, abs=1e-3 * sizes + 2.0 * len(flows))
    begins_s, ends_s = min(at_s for at_s, _, _ in flows), max(max(done[f], ready[f]) for f in done)
    assert link.sent_bytes <= rate * (ends_s - begins_s) * (1 + 1e-6) + 2.0 * len(flows)
    for flow, (at_s, size, _) in enumerate(flows):
        assert max(done[flow], ready[flow]) >= at_s + size / rate - 2.0 / rate - 1e-6
