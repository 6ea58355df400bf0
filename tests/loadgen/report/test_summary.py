"""Figures of a report against values computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prfaas.common.errors import ConfigError
from prfaas.loadgen.records import Records, RecordsBuilder, RequestRecord
from prfaas.loadgen.report.objective import Objective, parse_objective
from prfaas.loadgen.report.offload import summarise_offload
from prfaas.loadgen.report.summary import max_in_flight, spread, summarise


def records_of(*rows: RequestRecord) -> Records:
    builder = RecordsBuilder()
    for row in rows:
        builder.add(row)
    return builder.records()


def answered(
    index: int, scheduled_s: float, first_s: float, last_s: float, tokens: int, **more: object
) -> RequestRecord:
    fields = {
        "prompt_tokens": 100,
        "sent_s": scheduled_s,
        "second_token_s": first_s + 0.5 if tokens > 1 else None,
        "end_s": last_s + 0.25,
    } | more
    return RequestRecord(
        index,
        scheduled_s,
        "ok",
        first_token_s=first_s,
        last_token_s=last_s,
        output_tokens=tokens,
        **fields,  # type: ignore[arg-type]
    )


def three() -> Records:
    """Two answers and a failure: TTFT 1 and 3 s; TPOT 0.5 s and none; from 0 to 8 s."""
    return records_of(
        answered(0, 0.0, 1.0, 3.0, 5, itl_s=[0.5, 0.5, 0.25, 0.75]),
        answered(1, 2.0, 5.0, 5.0, 1),
        RequestRecord(2, 4.0, "failed", sent_s=4.0, end_s=8.0, error="http_500", prompt_tokens=100),
    )


def test_latencies_throughput_and_goodput_are_what_they_are_defined_as() -> None:
    """TTFT from the scheduled send, TPOT without the first token, rates over first scheduled to last end, and failures
    in the number of requests but in no latency and no rate."""
    summary = summarise(three(), Objective(ttft_s=2.0))
    assert (summary.requests, summary.ok, summary.failed, summary.errors) == (3, 2, 1, {"http_500": 1})
    assert summary.duration_s == 8.0
    assert summary.requests_per_s == 2 / 8
    assert summary.output_tokens_per_s == 6 / 8
    assert summary.total_tokens_per_s == 206 / 8
    assert (summary.ttft_s.mean, summary.ttft_s.p50, summary.ttft_s.max) == (2.0, 2.0, 3.0)
    assert summary.ttft_s.p90 == pytest.approx(1 + 0.9 * 2)
    assert (summary.second_token_s.count, summary.second_token_s.mean) == (1, 1.5)
    assert (summary.tpot_s.count, summary.tpot_s.mean) == (1, 0.5)
    assert (summary.itl_s.count, summary.itl_s.mean, summary.itl_s.max) == (4, 0.5, 0.75)
    assert summary.e2e_s.mean == 3.0
    assert summary.goodput_per_s == 1 / 8
    assert summary.share_good == pytest.approx(1 / 3)


def test_a_request_that_left_late_has_its_wait_in_its_latency() -> None:
    """Scheduled at 0, sent at 10, first token at 11: TTFT is 11 s."""
    late = records_of(answered(0, 0.0, 11.0, 12.0, 2, sent_s=10.0))
    assert summarise(late, Objective()).ttft_s.mean == 11.0


@pytest.mark.parametrize(
    ("objective", "good"),
    [
        (Objective(ttft_s=3.0), [True, True, False]),
        (Objective(ttft_s=2.99), [True, False, False]),
        (Objective(tpot_s=0.5), [True, True, False]),
        (Objective(tpot_s=0.49), [False, True, False]),
        (Objective(e2e_s=3.0), [True, True, False]),
        (Objective(ttft_s=1.0, e2e_s=2.9), [False, False, False]),
        (Objective(), [True, True, False]),
    ],
)
def test_goodput_needs_every_limit_met_and_an_answer(objective: Objective, good: list[bool]) -> None:
    """A limit is met when it is just reached; one token has no TPOT; a failure is never good."""
    assert objective.met(three()).tolist() == good


def test_a_limit_of_ttft_may_grow_with_the_bare_prefill() -> None:
    """The paper's case: TTFT within 10 s or twice the prefill time, whichever is more."""
    long = records_of(answered(0, 0.0, 13.0, 14.0, 2, prefill_s=7.0), answered(1, 0.0, 13.0, 14.0, 2, prefill_s=6.0))
    assert Objective(ttft_s=10.0, ttft_prefills=2.0).met(long).tolist() == [True, False]


def test_objectives_are_read_as_vllm_and_aiperf_write_them() -> None:
    assert parse_objective(["ttft:500", "tpot:20.5"]) == Objective(ttft_s=0.5, tpot_s=0.0205)
    assert parse_objective(["time_to_first_token:500 request_latency:9000"]) == Objective(ttft_s=0.5, e2e_s=9.0)
    assert not parse_objective([])
    with pytest.raises(ConfigError) as told:
        parse_objective(["ttft:0", "speed:3", "tpot:1", "inter_token_latency:2", "e2el"])
    assert len(told.value.problems) == 4


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 10)), min_size=1, max_size=20))
def test_most_in_flight_is_what_counting_at_every_instant_finds(spans: list[tuple[int, int]]) -> None:
    begun = np.array([float(start) for start, _ in spans])
    ended = np.array([float(start + length) for start, length in spans])
    records = Records.of(begun, end_s=ended)
    # Between whole instants nothing changes; one that ends where another begins isn't beside it.
    counted = max(int(((begun <= t) & (ended > t)).sum()) for t in range(31))
    assert max_in_flight(records) == counted


def test_what_has_no_values_has_no_figures() -> None:
    assert spread(np.array([math.nan, math.inf])).mean is None
    failed = records_of(RequestRecord(0, 1.0, "failed", error="timeout"))
    summary = summarise(failed, Objective(ttft_s=1.0))
    assert (summary.duration_s, summary.requests_per_s, summary.goodput_per_s) == (0.0, 0.0, 0.0)
    assert summary.ttft_s.p99 is None


PARTS = {"router_s": 0.1, "queue_s": 0.2, "prefill_s": 1.5, "exposed_s": 0.5, "first_step_s": 0.2}


def test_the_offload_table_adds_up() -> None:
    """By hand: shares over what is known, parts that sum to the TTFT of the same requests, bytes, overlap as the share
    of the transfer that prefill hid, Gbit/s of a transfer, fallbacks each by its reason."""
    moved = {"offloaded": True, "transfer_s": 2.0, "kv_raw_bytes": 2_000_000_000, "kv_wire_bytes": 1_000_000_000}
    home = {"offloaded": False, "kv_raw_bytes": 0, "kv_wire_bytes": 0}
    records = records_of(
        answered(0, 0.0, 3.0, 4.0, 2, **moved, **PARTS, prompt_tokens=900, cached_tokens=90),
        answered(1, 0.0, 1.0, 2.0, 2, **home, prompt_tokens=100, fallbacks=["prefill_lost", "decode_busy"]),
        answered(2, 0.0, 1.0, 10.0, 2, fallbacks=["prefill_lost"]),
        RequestRecord(3, 0.0, "failed", offloaded=True, kv_wire_bytes=5),
    )
    made = summarise_offload(records, 10.0)
    assert (made.known, made.offloaded) == (2, 1)
    assert made.share_of_requests == 0.5
    assert made.share_of_prompt_tokens == 0.9
    parts = made.parts_offloaded
    assert parts.count == 1
    assert parts.ttft_s == 3.0
    assert parts.rest_s == pytest.approx(0.5)
    assert made.parts_local.count == 0
    assert (made.kv_raw_bytes, made.kv_wire_bytes, made.wire_ratio) == (2_000_000_000, 1_000_000_000, 0.5)
    assert made.egress_gbps == pytest.approx(0.8)
    assert (made.transfers, made.transfer_gbps_mean) == (1, pytest.approx(4.0))
    assert made.overlap == pytest.approx(0.75)
    assert made.cached_share_of_prompt_tokens == 0.1
    assert made.fallbacks == {"prefill_lost": 2, "decode_busy": 1}


def test_a_foreign_server_has_no_offload_figures() -> None:
    made = summarise_offload(three(), 8.0)
    assert made.known == 0
    assert made.share_of_requests is made.kv_wire_bytes is made.overlap is made.egress_gbps is None


def test_nothing_was_sent():
    """No requests: counts of 0, and no share."""
    made = summarise(records_of(), Objective(ttft_s=1.0))
    assert (made.requests, made.duration_s, made.goodput_per_s, made.share_good) == (0, 0.0, 0.0, None)
