"""The connector's half in vLLM's scheduler."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from prfaas.services.engine.vllm.control import PARAMS_KEY
from prfaas.services.engine.vllm.scheduler_side import SchedulerSide


def request(kind: str | None = "load", tokens: int = 101, start: int = 0, end: int = 100, name: str = "r") -> Any:
    params = None
    if kind is not None:
        params = {PARAMS_KEY: {"transfer_id": f"t-{name}", "kind": kind, "start": start, "end": end}}
    return SimpleNamespace(request_id=name, prompt_token_ids=list(range(tokens)), kv_transfer_params=params)


def skipped(side: SchedulerSide) -> list[tuple[str, str]]:
    return side.step({}, [], []).skipped


def test_a_load_is_all_of_the_prompt_but_its_last_token() -> None:
    side = SchedulerSide()
    assert side.external_tokens(request(), 0) == 100
    side.allocated(request(), ([1, 2],), 100)
    (load,) = side.step({"r": 1}, [("r", ([1, 2],), 100)], []).loads
    assert (load.transfer_id, load.start, load.end, load.blocks) == ("t-r", 0, 100, ([1, 2],))
    assert not side.step({"r": 1}, [], [("r", None, 101, False)]).loads


def test_what_vllm_has_itself_is_not_loaded() -> None:
    side = SchedulerSide()
    assert side.external_tokens(request(), 64) == 36
    side.allocated(request(), ([1, 2],), 36)
    (load,) = side.step({"r": 1}, [("r", ([1, 2],), 100)], []).loads
    assert (load.start, load.end) == (64, 100)


@pytest.mark.parametrize(
    ("asked", "computed", "why"),
    [
        (request(tokens=90), 0, "other_prompt"),
        (request(start=64), 32, "prefix_gone"),
        (request(), 100, "held"),
    ],
)
def test_a_load_that_does_not_fit_is_left_to_vllm_with_a_reason(asked: Any, computed: int, why: str) -> None:
    side = SchedulerSide()
    assert side.external_tokens(asked, computed) == 0
    side.allocated(asked, ([1],), 0)
    assert skipped(side) == [("t-r", why)]


def test_a_prefix_that_the_decode_side_held_at_the_ticket_is_not_awaited() -> None:
    side = SchedulerSide()
    assert side.external_tokens(request(start=64), 64) == 36
    assert side.external_tokens(request(start=64), 96) == 4


def test_a_preempted_request_is_computed_by_vllm() -> None:
    side = SchedulerSide()
    side.external_tokens(request(), 0)
    side.allocated(request(), ([1],), 100)
    side.step({}, [], [])
    assert side.external_tokens(request(), 0) == 0
    side.allocated(request(), ([1],), 0)
    assert not skipped(side)


def test_requests_of_others_are_none_of_ours() -> None:
    side = SchedulerSide()
    assert side.external_tokens(request(None), 0) == 0
    side.allocated(request(None), ([1],), 0)
    assert not skipped(side)
    other = request()
    other.kv_transfer_params = {"do_remote_prefill": True}
    assert side.external_tokens(other, 0) == 0


def test_a_save_goes_on_over_its_chunks_and_ends_with_the_last() -> None:
    side = SchedulerSide()
    side.allocated(request("save", tokens=100), ([1],), 0)
    (first,) = side.step({"r": 64}, [("r", ([1],), 0)], []).saves
    assert (first.blocks, first.computed_tokens) == (([1],), 64)
    (second,) = side.step({"r": 36}, [], [("r", ([7],), 64, False)]).saves
    assert (second.blocks, second.computed_tokens) == (([1, 7],), 100)
    assert not side.step({"r": 1}, [], [("r", None, 100, False)]).saves


def test_a_preempted_save_has_new_blocks() -> None:
    side = SchedulerSide()
    side.allocated(request("save", tokens=100), ([1],), 0)
    side.step({"r": 64}, [("r", ([1],), 0)], [])
    (again,) = side.step({"r": 64}, [], [("r", ([5],), 0, True)]).saves
    assert (again.blocks, again.computed_tokens) == (([5],), 64)


def test_what_has_ended_is_forgotten() -> None:
    side = SchedulerSide()
    side.allocated(request("save"), ([1],), 0)
    side.finished("r")
    assert not side.step({"r": 64}, [("r", ([1],), 0)], []).saves
