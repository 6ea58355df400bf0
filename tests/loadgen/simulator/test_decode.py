"""A decode node without an event a token."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prfaas.common.perfmodel.curves import Curve, Surface
from prfaas.common.perfmodel.profiles import NodeProfile
from prfaas.loadgen.simulator.decode import DecodeNode

from tests.loadgen.simulator.nodes import profile


def test_one_request():
    """Its output tokens, one a step."""
    node = DecodeNode(profile(step_s=0.02))
    assert node.offer(7, 10, 100, 1.0)
    assert node.next_done_s() == pytest.approx(1.2)
    assert node.done(1.2) == ([7], [])
    assert node.next_done_s() == math.inf


def test_a_full_batch_makes_wait():
    """The next one joins when a place is free, first come, first served."""
    node = DecodeNode(profile(step_s=0.1, max_batch=2))
    assert node.offer(0, 10, 1, 0.0)
    assert node.offer(1, 20, 1, 0.0)
    assert not node.offer(2, 5, 1, 0.3)
    assert not node.offer(3, 5, 1, 0.4)
    assert node.done(node.next_done_s()) == ([0], [2])
    assert node.next_done_s() == pytest.approx(1.5)
    assert node.done(node.next_done_s()) == ([2], [3])


def test_the_step_follows_the_batch():
    """Half as fast with two: of 10 steps of the first, 5 pass alone."""
    steps = Surface((1.0, 2.0), (0.0,), ((0.1,), (0.2,)))
    flat = Curve((0.0, 1.0), (1.0, 1.0))
    node = DecodeNode(NodeProfile("n", "m", "h", 1, flat, flat, steps, max_batch=2))
    node.offer(0, 10, 1, 0.0)
    node.offer(1, 10, 1, 0.5)
    assert node.next_done_s() == pytest.approx(1.5)
    assert node.done(1.5) == ([0], [])
    assert node.next_done_s() == pytest.approx(2.0)


def test_lost():
    """Everyone on it, with the steps that were still needed."""
    node = DecodeNode(profile(step_s=0.1, max_batch=1))
    node.offer(0, 10, 1, 0.0)
    node.offer(1, 10, 1, 0.0)
    assert node.lose(0.4) == [(0, pytest.approx(6.0)), (1, -1.0)]
    assert node.next_done_s() == math.inf


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 2), st.integers(1, 40)), min_size=1, max_size=15), st.integers(1, 4))
def test_as_if_every_token_were_an_event(requests, max_batch):
    """Ends are those of a loop over single steps."""
    requests = sorted(requests)
    node = DecodeNode(profile(step_s=0.05, max_batch=max_batch))
    ends, arrivals = {}, list(enumerate(requests))
    while arrivals or node.running:
        if arrivals and arrivals[0][1][0] <= node.next_done_s():
            i, (at_s, output) = arrivals.pop(0)
            node.offer(i, output, 1, at_s)
            continue
        now_s = node.next_done_s()
        ends |= dict.fromkeys(node.done(now_s)[0], now_s)
    # Each place of the batch serves one after the other.
    places = [0.0] * max_batch
    for i, (at_s, output) in enumerate(requests):
        place = min(range(max_batch), key=places.__getitem__)
        places[place] = max(places[place], at_s) + output * 0.05
        assert ends[i] == pytest.approx(places[place], abs=1e-4)
