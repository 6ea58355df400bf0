"""What a run comes to."""

import math
from dataclasses import replace

import numpy as np
import pytest
from prfaas.common.scheduling.policies import ADMIT_ALL, HomogeneousPd
from prfaas.loadgen.records import OK, REFUSED
from prfaas.loadgen.report.objective import Objective
from prfaas.loadgen.simulator.measures import OBJECTIVE, good, goodput, interval, latencies, offered, tpot_s
from prfaas.loadgen.simulator.outcome_records import records
from prfaas.loadgen.simulator.simulation import Simulation

from tests.loadgen.simulator.nodes import load, two_regions


def outcome(**more):
    """Every second a request of 1 s of prefill, the third one of 12 s."""
    requests = load([0.0, 1.0, 2.0, 14.0], [1000, 1000, 12_000, 1000], 11)
    simulation = Simulation(two_regions(**more), requests, HomogeneousPd(ADMIT_ALL))
    return simulation, simulation.run()


def test_goodput():
    """TTFT within the floor or twice the bare prefill, TPOT within its bound, over the window's arrivals."""
    _, made = outcome()
    assert good(made, OBJECTIVE).tolist() == [True] * 4
    assert good(made, replace(OBJECTIVE, ttft_prefills=1.0)).tolist() == [True, True, False, True]
    assert good(made, replace(OBJECTIVE, ttft_s=1.01, ttft_prefills=1.0)).sum() == 0
    assert good(made, Objective(tpot_s=0.019)).sum() == 0
    assert goodput(made, OBJECTIVE, 1.0, 3.0) == pytest.approx(1.0)
    assert offered(made, 0.0, 20.0) == pytest.approx(0.2)
    assert tpot_s(made) == pytest.approx([0.02] * 4)


def test_interval():
    """Student's t: of 1, 2, 3 the mean ± 4.303 / √3; one value has none."""
    made = interval([1.0, 2.0, 3.0])
    assert (made.mean, made.high - made.mean) == (2.0, pytest.approx(4.303 / math.sqrt(3)))
    assert interval([5.0]).high == math.inf
    assert interval([1.0] * 100).high == 1.0


def test_parts_of_ttft_add_up():
    """Queue, prefill, exposed transfer and first step are the time to the first token."""
    _, made = outcome()
    parts = latencies(made, 0.0)
    total = sum(parts[f"{name}_mean_s"] for name in ("queue", "prefill", "exposed", "first_step"))
    assert total == pytest.approx(parts["ttft_mean_s"])
    assert parts["share_good"] == 1.0


def test_records():
    """The same as a live run's: parts of TTFT, names of nodes, one row a request, refusals with what they have."""
    simulation, made = outcome()
    snapshot = simulation.snapshot
    rows = list(records(made, snapshot.names, snapshot.region_names))
    first = rows[0]
    assert first.status == OK
    assert (first.prefill_node, first.decode_node) == ("home-prefill-0", "home-decode-0")
    assert (first.region, first.decode_region) == ("home", "home")
    assert first.reason == "home"
    assert first.first_token_s == pytest.approx(1.02)
    assert first.queue_s + first.prefill_s + first.exposed_s + first.first_step_s == pytest.approx(1.02)
    assert first.offloaded is False
    late = Simulation(two_regions(), load([0.0] * 15, 1000), HomogeneousPd()).run()
    assert np.count_nonzero(records(late).status.equal(REFUSED)) == 6
    refused = next(row for row in records(late) if row.status == REFUSED)
    assert (refused.first_token_s, refused.output_tokens, refused.offloaded) == (None, 0, None)
    assert refused.reason == "deadline"
