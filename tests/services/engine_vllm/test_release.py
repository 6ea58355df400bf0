"""When a decode request is given to vLLM."""

from __future__ import annotations

from prfaas.services.vllm.release import may_release

LAYER = 1000
EACH_S = 0.03


def arrivals(have: int, of: int = 30) -> list[float | None]:
    """One layer each EACH_S, the last of `have` at 0."""
    return [EACH_S * (i - have + 1) if i < have else None for i in range(of)]


def release(have: int, *, lead_s: float = 0.03, stall_s: float = 0.06, **fields: object) -> bool:
    values = {"needed_first": frozenset(), "now_s": 0.0} | fields
    return may_release([LAYER] * 30, arrivals(have), lead_s=lead_s, stall_s=stall_s, **values)  # type: ignore[arg-type]


def test_with_everything_there_at_once() -> None:
    assert release(30)


def test_when_the_rest_is_a_stall_away() -> None:
    """Three layers take 90 ms: the step's own 30 and a stall of 60."""
    assert [have for have in range(30) if release(have)] == [27, 28, 29]


def test_a_longer_stall_allows_it_earlier() -> None:
    assert release(15, stall_s=0.5)
    assert not release(12, stall_s=0.5)


def test_time_that_has_passed_since_the_last_layer_counts() -> None:
    assert not release(26)
    assert release(26, now_s=EACH_S)


def test_a_recurrent_state_is_needed_before_anything() -> None:
    assert not release(29, needed_first=frozenset({29}), stall_s=9)
    assert release(29, needed_first=frozenset({28}), stall_s=9)


def test_nothing_is_known_of_the_rate_at_first() -> None:
    assert not release(0, stall_s=9)
    assert not release(1, stall_s=9)
    assert release(2, stall_s=9)


def test_large_layers_count_for_what_they_are() -> None:
    """As in a hybrid model: one layer of the rest has ten times the bytes of the others."""
    sizes = [LAYER] * 29 + [10 * LAYER]
    assert not may_release(sizes, arrivals(29), frozenset(), 0.0, lead_s=0.03, stall_s=0.06)
    assert may_release(sizes, arrivals(29), frozenset(), 0.0, lead_s=0.03, stall_s=0.3)
