"""Plots: ticks, gaps, and what lies outside."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prfaas.loadgen.report import svg
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


names = st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=1, max_size=120)


@given(st.lists(names, min_size=2, max_size=8, unique=True), st.text("y", max_size=90))
def test_no_text_of_a_legend_covers_another(series: list[str], y_name: str) -> None:
    """Names stand beside the axis' name where there is room, else in lines of their own below; all are inside the
    drawing and whole, unless one alone is longer than a line."""
    plot = Plot("t", "x", y_name, [Series(name, [1, 2], [1, 2]) for name in series])
    root = ElementTree.fromstring(plot.svg())
    height = float(root.attrib["viewBox"].split()[3])
    marks = [e for e in root.iter() if e.tag.endswith("rect")]
    spans = [(0.0, float(svg.TOP - 8), svg.LEFT + len(y_name) * svg.CHAR_PX)] if y_name else []
    said = [e for e in root.iter() if e.tag.endswith("text")]
    shown = [e.text or "" for e in said if any(_beside(e, mark) for mark in marks)]
    assert len(shown) == len(series)
    for mark, name in zip(marks, shown, strict=True):
        x, y = float(mark.attrib["x"]), float(mark.attrib["y"]) + 9
        end = x + 14 + len(name) * svg.CHAR_PX
        assert 0 <= x < end <= svg.WIDTH
        assert 0 <= y <= height
        assert all(y != other_y or end <= other_x or x >= other_end for other_x, other_y, other_end in spans)
        spans.append((x, y, end))
    for name, given_name in zip(shown, series, strict=True):
        assert name == given_name or (name.endswith("…") and len(name) > 80 and given_name.startswith(name[:-1]))


def _beside(text: ElementTree.Element, mark: ElementTree.Element) -> bool:
    return (
        float(text.attrib["x"]) == float(mark.attrib["x"]) + 14
        and float(text.attrib["y"]) == float(mark.attrib["y"]) + 9
    )


def test_what_ends_at_the_greatest_x_is_not_drawn_on_the_frame() -> None:
    line = Plot("t", "x", "y", [Series("s", [0, 25], [0, 1])]).svg().split('points="')[1].split('"')[0]
    assert float(line.split()[-1].split(",")[0]) < svg.WIDTH - svg.RIGHT - 2
