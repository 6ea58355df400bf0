"""Curves and surfaces from points."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prfaas.common.perfmodel.curves import Curve, Surface

_RISES = st.lists(st.tuples(st.floats(1, 1e5), st.one_of(st.just(0.0), st.floats(1e-6, 1e4))), min_size=1, max_size=12)


@st.composite
def curves(draw: st.DrawFn) -> Curve:
    """Points that rise by drawn steps, some of them flat."""
    steps = draw(_RISES)
    lengths, values = np.cumsum([dx for dx, _ in steps]), np.cumsum([dy for _, dy in steps])
    kind = draw(st.sampled_from(["monotone_cubic", "linear"]))
    return Curve(tuple(lengths.tolist()), tuple(values.tolist()), kind)  # type: ignore[arg-type]


@given(curves(), st.lists(st.floats(0, 5e6), min_size=2, max_size=50))
def test_a_curve_never_falls_and_never_goes_below_zero(curve: Curve, lengths: list[float]) -> None:
    """Between, before and behind its points, up to rounding."""
    x = np.sort(np.array(lengths))
    y = curve(x)
    scale = max(1.0, float(y[-1]))
    assert (np.diff(y) >= -1e-9 * scale).all()
    assert (y >= -1e-9 * scale).all()


@given(curves(), st.lists(st.floats(0, 5e6), min_size=1, max_size=20))
def test_the_scalar_path_equals_the_array_path(curve: Curve, lengths: list[float]) -> None:
    assert np.allclose([curve.at(x) for x in lengths], curve(np.array(lengths)), rtol=1e-12)
    assert curve(lengths[0]) == curve.at(lengths[0])


@given(curves())
def test_a_curve_goes_through_its_points(curve: Curve) -> None:
    assert np.allclose(curve(np.array(curve.lengths)), curve.values, rtol=1e-9, atol=1e-9)


def test_a_cubic_follows_a_quadratic_where_straight_lines_lie_above_it() -> None:
    """The reason for cubics: prefill time is convex, and its points are a factor of four apart."""
    lengths = (1024, 8192, 32000, 130000)
    quadratic = [0.38 + 4.25e-5 * x + 8.8e-11 * x**2 for x in lengths]
    x = 65000.0
    true = 0.38 + 4.25e-5 * x + 8.8e-11 * x**2
    cubic, straight = Curve(lengths, tuple(quadratic)), Curve(lengths, tuple(quadratic), "linear")
    assert abs(cubic(x) / true - 1) < 0.02 < straight(x) / true - 1


def test_beyond_its_points_a_curve_goes_on_straight() -> None:
    """Above with the last slope; below with the first, or towards (0, 0) where the first would go below zero."""
    line = Curve((10, 20, 30), (5, 6, 7))
    assert [line(x) for x in (0, 5, 40)] == pytest.approx([4, 4.5, 8])
    steep = Curve((10, 20), (1, 100))
    assert [steep(x) for x in (0, 5)] == pytest.approx([0, 0.5])
    assert Curve((10,), (3,))(1e6) == 3


@pytest.mark.parametrize(
    ("lengths", "values", "told"),
    [
        ((1, 2, 3), (1, 3, 2), "values must not fall: 2 at length 3 after 3 at length 2"),
        ((1, 1), (1, 2), "lengths must rise: 1 comes after 1"),
        ((-1, 1), (1, 2), "lengths must be at least 0, not -1"),
        ((1, 2), (-1, 2), "at length 1 it is -1"),
        ((1, 2), (1, float("nan")), "at length 2 it is nan"),
        ((1, float("inf")), (1, 2), "lengths must be finite"),
        ((1, 2), (1,), "2 lengths have 1 values"),
        ((), (), "1 to 4096"),
    ],
)
def test_points_that_are_no_curve_are_refused(lengths: tuple[float, ...], values: tuple[float, ...], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Curve(lengths, values)


@st.composite
def surfaces(draw: st.DrawFn) -> Surface:
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    rise = st.floats(0, 10)
    grid = np.array(draw(st.lists(st.lists(rise, min_size=columns, max_size=columns), min_size=rows, max_size=rows)))
    values = grid.cumsum(0).cumsum(1)
    batches = np.cumsum(draw(st.lists(st.integers(1, 64), min_size=rows, max_size=rows)))
    contexts = np.cumsum(draw(st.lists(st.integers(1, 100_000), min_size=columns, max_size=columns)))
    return Surface(tuple(batches), tuple(contexts), tuple(tuple(row) for row in values.tolist()))


@given(surfaces(), st.floats(1, 500), st.floats(0, 500), st.floats(0, 1e6), st.floats(0, 1e6))
def test_a_surface_falls_in_neither_direction(
    surface: Surface, batch: float, more: float, context: float, longer: float
) -> None:
    """Also beyond its grid."""
    at = surface.at(batch, context)
    margin = 1e-9 * max(1.0, surface.at(batch + more, context + longer))
    assert surface.at(batch + more, context) >= at - margin
    assert surface.at(batch, context + longer) >= at - margin


def test_a_surface_is_bilinear_and_takes_arrays() -> None:
    surface = Surface((1, 3), (0, 100), ((1, 2), (3, 6)))
    assert surface.at(2, 50) == pytest.approx(3.0)
    assert surface.at(0.5, 0) == 1
    assert surface.at(3, 200) == pytest.approx(6 + 3)
    assert surface(np.array([1, 3]), 100).tolist() == [2, 6]


@pytest.mark.parametrize(
    ("grid", "told"),
    [
        (((1, 2), (0.5, 3)), "must not fall: 0.5 at batch 2, context 0 after 1 at batch 1, context 0"),
        (((2, 1), (2, 3)), "must not fall: 1 at batch 1, context 9 after 2"),
        (((1, 2),), "2 rows"),
    ],
)
def test_a_grid_that_falls_is_refused(grid: tuple[tuple[float, ...], ...], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Surface((1, 2), (0, 9), grid)
