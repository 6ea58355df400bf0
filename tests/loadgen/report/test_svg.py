"""Plots: ticks, gaps, and what lies outside."""

from __future__ import annotations

import math

import pytest
from prfaas.loadgen.report.svg import Plot, Series, log_ticks, short, ticks


def test_ticks_are_round_and_cover_the_axis() -> None:
    assert ticks(3.4) == [0, 0.5, 1, 1.5, 2, 2.5, 3]
    assert ticks(100) == [0, 20, 40, 60, 80, 100]
    assert log_ticks(128, 131072)[:3] == [200, 500, 1000]
    assert short(20000) == "20K"


def test_a_mark_is_drawn_where_it_lies_and_left_out_where_it_does_not() -> None:
    series = [Series("s", [0, 10], [1, 2])]
    inside = Plot("t", "x", "y", series, mark=(5, "half")).svg()
    assert ">half</text>" in inside
    assert inside.count("stroke-dasharray") == 1
    assert "half" not in Plot("t", "x", "y", series, mark=(50, "half")).svg()


@pytest.mark.parametrize("high", [1e-6, 0.7, 1, 7, 12345, 1e9])
def test_there_are_four_to_eleven_ticks(high: float) -> None:
    assert 4 <= len(ticks(high)) <= 11


def test_a_value_that_is_not_finite_or_too_high_leaves_a_gap() -> None:
    plot = Plot("t", "x", "y", [Series("l", [1, 2, 3, 4, 5, 6], [1, 2, math.inf, 1, 2, 99])], y_top=3)
    assert plot.svg().count("<polyline") == 2


def test_text_is_escaped() -> None:
    lines = [Series("<script>", [1, 2], [1, 2]), Series("other", [1, 2], [2, 1])]
    svg = Plot("a < b", "x", "y", lines).svg()
    assert "<script>" not in svg
    assert "&lt;script&gt;" in svg
    assert "a &lt; b" in svg


@pytest.mark.parametrize("line", [Series("l", [], []), Series("l", [5], [1]), Series("l", [1, 2], [0, 0])])
@pytest.mark.parametrize("log_x", [False, True])
def test_plots_of_next_to_nothing_are_drawn(line: Series, log_x: bool) -> None:
    assert Plot("t", "x", "y", [line], log_x=log_x).svg().endswith("</svg>")
