"""Lists of offsets as strides."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st
from prfaas.services.engine.vllm.strides import Axis, strides_of


def offsets_of(axis: Axis) -> list[int]:
    steps = [[i * stride for i in range(size)] for size, stride in axis]
    return [sum(each) for each in itertools.product(*steps)]


def test_an_axis_that_is_stored_in_order_has_one_stride() -> None:
    assert strides_of([0, 64, 128, 192]) == ((4, 64),)


def test_tiles_have_a_stride_inside_and_one_outside() -> None:
    assert strides_of([0, 1, 100, 101, 200, 201]) == ((3, 100), (2, 1))


def test_an_axis_of_one_needs_none() -> None:
    assert strides_of([0]) == ()


def test_what_has_no_strides_is_none() -> None:
    assert strides_of([0, 1, 3, 7]) is None
    assert strides_of([0, 1, 2, 10, 11]) is None
    assert strides_of([5, 6]) is None
    assert strides_of([]) is None


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 300)), min_size=1, max_size=4))
def test_the_strides_give_the_offsets_that_they_were_found_in(axis: list[tuple[int, int]]) -> None:
    offsets = offsets_of(tuple(axis))
    found = strides_of(offsets)
    if found is not None:
        assert offsets_of(found) == offsets


@given(st.integers(2, 8), st.integers(2, 8), st.integers(1, 9))
def test_every_tiling_is_found(tiles: int, size: int, stride: int) -> None:
    offsets = offsets_of(((tiles, size * stride * 3), (size, stride)))
    found = strides_of(offsets)
    assert found is not None
    assert offsets_of(found) == offsets
