"""The schedule of sending, against its promises: nothing early, nothing twice, nothing above the cap."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prfaas.loadgen.workloads.arrivals import Load, RateCurve, SteadyRate
from prfaas.loadgen.workloads.lengths import Fixed
from prfaas.loadgen.workloads.rngs import Rngs
from prfaas.loadgen.workloads.schedule import Schedule
from prfaas.loadgen.workloads.synthetic import SyntheticShape, Turns, synthetic_workload

from tests.loadgen.workloads.shapes import workload_of

loads = st.one_of(
    st.builds(Load, st.just(SteadyRate(2.0)), max_concurrency=st.one_of(st.none(), st.integers(1, 5))),
    st.builds(Load, st.just(SteadyRate(math.inf)), max_concurrency=st.one_of(st.none(), st.integers(1, 5))),
    st.builds(Load, st.none(), max_concurrency=st.integers(1, 30)),
)


def play(workload, service_s, give_up=frozenset()):
    """Runs a schedule in virtual time with the given service time a request: [(index, scheduled, sent, ended)]."""
    schedule, running, log, now = Schedule(workload), [], [], 0.0
    while not schedule.finished:
        now = max(now, min([schedule.next_s(), *(end for end, _ in running)]))
        assert now < math.inf
        for end, index in [entry for entry in running if entry[0] <= now]:
            running.remove((end, index))
            schedule.ended(index, now, go_on=index not in give_up)
        for due in schedule.due(now):
            running.append((now + service_s[due.index], due.index))
            log.append((due.index, due.scheduled_s, now, now + service_s[due.index]))
        assert schedule.in_flight == len(running)
    assert schedule.due(now) == []
    return log


@st.composite
def runs(draw):
    turns = Turns(draw(st.floats(1, 4)), draw(st.sampled_from([0.0, 1.0])), draw(st.floats(0, 3)), 0.5)
    n = draw(st.integers(1, 30))
    shape = SyntheticShape(Fixed(5), Fixed(5), turns=turns)
    workload = workload_of(shape, n, draw(st.integers(0, 99)), draw(loads))
    service = draw(st.lists(st.floats(0.01, 4), min_size=n, max_size=n))
    return workload, service, draw(st.frozensets(st.integers(0, n - 1), max_size=3))


@settings(deadline=None, max_examples=200)
@given(run=runs())
def test_every_request_leaves_once_and_not_before_its_time(run):
    """Each request is sent once, or belongs to a conversation that was given up; never before it is scheduled; a turn
    is scheduled its think time after the end of the turn before."""
    workload, service, give_up = run
    log = play(workload, service, give_up)
    sent = {index: (scheduled, at, end) for index, scheduled, at, end in log}
    assert len(sent) == len(log)
    for request in workload:
        gone = any(
            i in give_up and workload[i].conversation == request.conversation and i < request.index
            for i in range(len(workload))
        )
        assert (request.index in sent) != gone
        if gone:
            continue
        scheduled, at, _ = sent[request.index]
        assert at >= scheduled
        if request.turn:
            assert scheduled == pytest.approx(sent[request.index - 1][2] + request.think_s)
        elif not workload.closed_loop:
            assert scheduled == request.arrival_s


@settings(deadline=None, max_examples=200)
@given(run=runs())
def test_the_cap_holds_and_is_used(run):
    """Never more requests in flight than the cap; whoever waits does so because the cap is full; first scheduled, first
    sent. In a closed loop as many conversations as users are under way until none are left."""
    workload, service, give_up = run
    log = play(workload, service, give_up)
    cap = workload.max_concurrency or math.inf
    for index, scheduled, at, _ in log:
        flying = sum(start <= at < end for other, _, start, end in log if other != index)
        assert flying < cap
        if at > scheduled and not workload.closed_loop:
            before = sum(start < at <= end for _, _, start, end in log)
            assert before >= cap
    if not workload.closed_loop:
        scheduled = [entry[1] for entry in log]
        assert scheduled == sorted(scheduled)
        return
    starts = sorted(at for index, _, at, _ in log if workload.turn[index] == 0)
    assert starts[: int(min(cap, workload.conversations))] == [0.0] * int(min(cap, workload.conversations))


def test_a_user_takes_the_next_conversation_at_once():
    """A closed loop of one user: conversations one after the other, think times only inside them."""
    workload = workload_of(
        SyntheticShape(Fixed(1), Fixed(1), turns=Turns(2, 0, 3.0, 0.0)), 4, load=Load(None, max_concurrency=1)
    )
    log = play(workload, [1.0] * 4)
    assert [(index, scheduled) for index, scheduled, _, _ in log] == [(0, 0.0), (1, 4.0), (2, 5.0), (3, 9.0)]


def test_waiting_for_a_slot_is_not_the_schedule():
    """What waits for the cap keeps the time at which it should have left: latency counts from there."""
    workload = workload_of(SyntheticShape(Fixed(1), Fixed(1)), 3, load=Load(SteadyRate(1.0), "constant", 1.0, 1))
    assert play(workload, [5.0, 5.0, 5.0]) == [(0, 0.0, 0.0, 5.0), (1, 1.0, 5.0, 10.0), (2, 2.0, 10.0, 15.0)]


@pytest.mark.parametrize("load", [Load(None, max_concurrency=2, until_s=10.0), Load(SteadyRate(1.0), until_s=10.0)])
def test_nothing_is_scheduled_after_the_end(load):
    """After `until_s` neither new conversations nor further turns begin, and the schedule finishes."""
    shape = SyntheticShape(Fixed(1), Fixed(1), turns=Turns(4, 0, 1.0, 0.0))
    workload = synthetic_workload("t", shape, load, Rngs.from_seed(1), requests=400)
    log = play(workload, [0.7] * len(workload))
    assert 5 < len(log) < 60
    assert max(scheduled for _, scheduled, _, _ in log) <= 10.0


def test_a_late_caller_gets_all_that_is_due():
    """A caller who comes late is given everything that should have left, in the order of the schedule, each with its
    own time."""
    workload = workload_of(SyntheticShape(Fixed(1), Fixed(1)), 5, load=Load(SteadyRate(1.0), "constant"))
    due = Schedule(workload).due(3.5)
    assert [(d.index, d.scheduled_s) for d in due] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0)]


def test_a_rate_of_zero_at_first_waits():
    """A curve that begins with nothing: the schedule says when to wake."""
    curve = RateCurve(np.array([0.0, 50.0]), np.array([0.0, 1.0]))
    schedule = Schedule(workload_of(SyntheticShape(Fixed(1), Fixed(1)), 5, load=Load(curve)))
    assert schedule.due(49.0) == []
    assert 50.0 < schedule.next_s() < 100.0
