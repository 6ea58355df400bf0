"""The demo's figures and drawing, from made-up instants."""

from __future__ import annotations

import dataclasses

import pytest
from prfaas.services.commands.demo.client import Answer
from prfaas.services.commands.demo.prompt import QUESTION, TEXT, build_prompt
from prfaas.services.commands.demo.report import Run, as_json, draw_layers, overlap_ratio, transfer_alone_s
from prfaas.services.commands.demo.timeline import read_run

RUN = Run(
    text="yes",
    token_ids=[1, 2],
    prompt_tokens=100,
    ttft_s=1.0,
    time_to_second_token_s=1.1,
    queued_s=0.1,
    started_s=0.2,
    ended_s=0.8,
    computed_s=[0.5, 0.7],
    sent_s=[0.6, 0.75],
    arrived_s=[0.7, 0.9],
    used_s=[0.8, 0.95],
    clock_error_s=0.02,
    kv_raw_bytes=1_000_000,
    kv_wire_bytes=500_000,
)
TIMELINE = {
    "local_prefill": False,
    "prefill_node": "p",
    "prompt_tokens": 100,
    "output_token_ids": [1, 2],
    "ttft_s": 0.996,
    "queued_s": 0.1,
    "prefill_started_s": 0.2,
    "prefill_ended_s": 0.8,
    "clock_error_s": 0.01,
    "layers": [{"layer": 0, "computed_s": 0.5, "sent_s": None, "arrived_s": 0.7, "used_s": 0.8}],
    "kv_raw_bytes": 10,
    "kv_wire_bytes": 12,
}
ANSWER = Answer("id", "yes", 5.0, 1.0, 1.1, 100, 2)


def test_exposed_is_what_prefill_did_not_hide() -> None:
    """Last arrival minus the end of prefill; and a layer counts as early when it was used before that arrival."""
    assert RUN.exposed_s == pytest.approx(0.1)
    assert RUN.layers_used_before_last_arrival == 1


def test_the_parts_sum_to_ttft() -> None:
    parts = RUN.ttft_parts()
    assert sum(parts.values()) == pytest.approx(RUN.ttft_s)
    assert parts["exposed_s"] == pytest.approx(0.1)
    assert list(parts) == ["router_s", "queue_s", "prefill_s", "exposed_s", "first_step_s"]


def test_a_transfer_alone_takes_its_bytes_and_the_delay() -> None:
    """500,000 bytes at 8 Mbit/s take 0.5 s, and 20 ms of delay."""
    assert transfer_alone_s(500_000, 8.0, 20.0) == pytest.approx(0.52)


def test_overlap_is_one_when_all_was_hidden_and_zero_when_nothing_was() -> None:
    assert overlap_ratio(0.0, 0.5) == 1.0
    assert overlap_ratio(0.5, 0.5) == 0.0


def test_json_of_a_run_has_its_layers_and_baselines() -> None:
    slower = dataclasses.replace(RUN, ttft_s=1.5, time_to_second_token_s=1.6)
    told = as_json(RUN, {"send_after_prefill": slower}, 8.0, 20.0)
    assert told["layers"][1] == {"layer": 1, "computed_s": 0.7, "sent_s": 0.75, "arrived_s": 0.9, "used_s": 0.95}
    assert told["baselines"] == {"send_after_prefill": {"ttft_s": 1.5, "time_to_second_token_s": 1.6}}
    assert told["overlap_ratio"] == pytest.approx(1 - 0.1 / 0.52)


def test_the_drawing_has_a_line_a_layer_from_the_first_computed_to_the_first_token() -> None:
    """Letters stand where the events are, a rule joins computed and arrived."""
    bars = draw_layers(RUN, width=11)
    assert [bar.cells for bar in bars] == ["c─s─a─U····", "····cs──aU·"] or len(bars[0].cells) == 11
    assert bars[0].cells.startswith("c")
    assert bars[0].cells.index("s") < bars[0].cells.index("a") < bars[0].cells.index("U")


def test_a_layer_that_was_not_sent_is_drawn_too() -> None:
    run = dataclasses.replace(RUN, sent_s=[None, None], arrived_s=[None, None])
    assert all("U" in bar.cells and "─" not in bar.cells for bar in draw_layers(run, width=20))
    assert run.exposed_s == 0.0


def test_the_routers_instants_are_moved_to_the_clients_send() -> None:
    """Half of what the client's TTFT is longer is the way to the router; it is added to the error too."""
    run = read_run(ANSWER, TIMELINE)
    assert run is not None
    assert run.queued_s == pytest.approx(0.102)
    assert run.arrived_s == [pytest.approx(0.702)]
    assert run.sent_s == [None]
    assert run.clock_error_s == pytest.approx(0.012)


@pytest.mark.parametrize("change", [{"local_prefill": True}, {"prefill_node": None}])
def test_a_local_prefill_is_no_run_over_the_wan(change: dict[str, object]) -> None:
    assert read_run(ANSWER, TIMELINE | change) is None


def test_the_prompt_has_the_wanted_length_at_most() -> None:
    """Cut or repeated by sentences; the question stays at the end."""

    def words(text: str) -> int:
        return len(text.split())

    for wanted in (50, 500, 3000):
        prompt = build_prompt(QUESTION, words, wanted)
        assert wanted - 60 < words(prompt) <= wanted
        assert prompt.endswith(QUESTION)
    assert TEXT in build_prompt(QUESTION, words, None)
