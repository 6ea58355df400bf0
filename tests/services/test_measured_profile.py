"""A profile from what an engine measures while serving."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prfaas.common.kv_layout import KvLayout, LayerLayout, TensorKind, TensorLayout, TokenRange
from prfaas.common.perfmodel.profiles import dumps, parse
from prfaas.services.engine.measured_profile import SAMPLES, MeasuredProfile

KEYS = TensorLayout(TensorKind.KEY, "bfloat16", 2, (64,))
WINDOW = TensorLayout(TensorKind.VALUE, "bfloat16", 1, (8,), window_tokens=100)
STATE = TensorLayout(TensorKind.RECURRENT, "float32", 1, (10,))
LAYOUT = KvLayout((LayerLayout((KEYS, STATE)),) * 3 + (LayerLayout((WINDOW,)),))


def made() -> MeasuredProfile:
    return MeasuredProfile("a model", "a machine", LAYOUT, 8, 1 << 30)


def test_before_anything_is_measured_it_is_nominal() -> None:
    """Speeds that are called fitted, and the layout's exact bytes."""
    profile = made().profile
    assert profile.provenance["prefill_s"] == profile.provenance["decode_step_s"] == "fitted"
    assert profile.prefill_s.at(5000) > 0
    assert profile.step_s(4, 1000) > 0
    for tokens in (1, 50, 100, 101, 500, 100_000):
        assert profile.kv_bytes.at(tokens) == LAYOUT.total_bytes(TokenRange(0, tokens))


def test_medians_of_each_power_of_two() -> None:
    """One slow prefill among three says nothing; lengths of different powers are different points."""
    measured = made()
    for tokens, seconds in ((600, 1.0), (700, 9.0), (600, 1.2), (2100, 4.0)):
        measured.prefilled(tokens, seconds)
    for batch, seconds in ((1, 0.02), (1, 0.5), (1, 0.03), (6, 0.05)):
        measured.stepped(batch, 500.0, seconds)
    profile = measured.profile
    assert (profile.prefill_s.lengths, profile.prefill_s.values) == ((600.0, 2100.0), (1.2, 4.0))
    assert profile.decode_step_s is not None
    assert (profile.decode_step_s.batches, profile.decode_step_s.values) == ((1.0, 6.0), ((0.03,), (0.05,)))
    assert profile.provenance["prefill_s"] == profile.provenance["decode_step_s"] == "measured"


def test_a_first_length_alone_says_what_others_take() -> None:
    """In proportion, until there is a second one."""
    measured = made()
    measured.prefilled(1000, 2.0)
    assert measured.profile.prefill_s.at(3000) == 6.0
    assert measured.profile.prefill_s.at(500) == 1.0


def test_a_node_that_has_become_slower_is_found_out() -> None:
    """Old samples leave."""
    measured = made()
    for seconds in [1.0] * 100 + [3.0] * SAMPLES:
        measured.prefilled(1000, seconds)
    assert measured.profile.prefill_s.at(1000) == 3.0


def test_small_changes_are_no_news() -> None:
    """The same object while nothing has moved by more than a tenth, so that routers aren't sent a new file at each
    heartbeat."""
    measured = made()
    measured.prefilled(1000, 1.0)
    first = measured.profile
    measured.prefilled(1010, 1.04)
    assert measured.profile is first
    for _ in range(3):
        measured.prefilled(1000, 1.3)
    assert measured.profile is not first


@given(
    st.lists(st.tuples(st.integers(0, 1 << 24), st.floats(0, 1e4)), max_size=60),
    st.lists(st.tuples(st.integers(0, 4096), st.floats(0, 100)), max_size=60),
)
def test_any_samples_make_a_profile(prefills: list[tuple[int, float]], passes: list[tuple[int, float]]) -> None:
    """Whatever was measured, in whatever order, it never falls, and a router can read its file."""
    measured = made()
    for tokens, seconds in prefills:
        measured.prefilled(tokens, seconds)
    for batch, seconds in passes:
        measured.stepped(batch, 0.0, seconds)
    profile = measured.profile
    assert parse(dumps(profile), "file") == profile
    values = profile.prefill_s.values
    assert list(values) == sorted(values)
    assert values[0] > 0
