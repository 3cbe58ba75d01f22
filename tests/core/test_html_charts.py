"""Charts of reports: what they draw, what they say instead, and how a page of them is laid out."""

import math
import re

import numpy as np
import pytest

from meddino.core import html, html_charts
from meddino.core.html_charts import apart, beside, png
from tests.browser import check_page


def test_line_chart__names_of_marks_do_not_overlap_where_curves_begin_late():
    marks = {"stage1": 0, "stage2": 220, "stage3": 235}
    axes = html_charts.line_chart({"gram": ([220, 235, 245], [0.2, 0.1, 0.1])}, "t", "x", "y", marks=marks).axes[0]
    heights = {text.get_text(): text.xyann[1] for text in axes.texts}
    assert heights["stage1"] == heights["stage2"] < heights["stage3"]


def test_line_chart__says_values_as_they_are():
    drawing = html_charts.line_chart(
        {"a": ([0, 1, 2], [6.23832, 6.238321, 6.238319])}, "t", "x", "y", levels={"ln K": 6.2383246}
    )
    drawing.canvas.draw()
    axes = drawing.axes[0]
    assert axes.yaxis.get_offset_text().get_text() == ""
    assert {label.get_text()[:3] for label in axes.get_yticklabels()} <= {"6.2"}
    assert [text.get_text() for text in axes.texts] == ["ln K"]


def test_line_chart__one_point_is_a_point_and_a_step_is_a_whole_number():
    drawing = html_charts.line_chart({"a": ([3], [1.5]), "b": (range(50), [k / 7 for k in range(50)])}, "t", "step", "y")
    one, many = drawing.axes[0].lines
    assert one.get_marker() == "o" and one.get_markersize() >= 5 and many.get_marker() == "None"
    drawing.canvas.draw()
    assert all(float(tick).is_integer() for tick in drawing.axes[0].get_xticks())


def test_chart__nothing_measured_is_nothing_and_what_never_changes_is_a_line_of_text():
    assert html_charts.chart({}, "t", "x", "y") == ""
    assert html_charts.chart({"a": ([1, 2], [math.nan, math.inf])}, "t", "x", "y") == ""
    assert html_charts.chart({"a": ([1, 2], [0.0, -1.0])}, "t", "x", "y", log_y=True) == ""
    made = html_charts.chart({"wd": ([1, 2, 3], [0.04] * 3)}, "weight decay", "step", "wd")
    assert "<img" not in made and "weight decay: 0.04, the same all 3 times it was measured" in made
    made = html_charts.chart({"h": ([1, 2], [6.2, 6.2])}, "entropy", "step", "nats", levels={"ln K": 6.238})
    assert "<img" not in made and "ln K is 6.238" in made
    made = html_charts.chart({"a": ([1, 2], [1, 1]), "b": ([1, 2], [1, 2])}, "t", "step", "y", marks={"stage2": 2})
    assert made.count("<img") == 1 and "Dashed: stage2 (at 2)" in made
    assert "<img" in html_charts.chart({"a": ([7], [1.0])}, "t", "step", "y")  # one point is drawn


def test_case_plot__the_best_on_top_and_names_only_where_they_can_be_read():
    values = {"A": {"c1": 0.2, "c2": 0.9, "c3": 0.5}, "B": {"c1": 0.3, "c2": 0.7}}
    axes = html_charts.case_plot(values, "t", "Dice").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["c2", "c3", "c1"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    many = html_charts.case_plot({"A": {f"c{k}": k / 100 for k in range(90)}}, "t", "Dice").axes[0]
    assert not many.get_yticklabels() and "90 cases" in many.get_ylabel()


def test_figure_png__same_drawing_same_bytes():
    def draw():
        return html.figure_png(html_charts.line_chart({"a": ([0, 1], [0.0, 1.0])}, "t", "x", "y"))

    assert draw() == draw()
    assert draw().startswith(b"\x89PNG")


def test_apart__undoes_beside():
    panels = [np.random.default_rng(k).integers(0, 255, (9, 7, 3), dtype=np.uint8) for k in range(3)]
    for one, other in zip(panels, apart(beside(panels), 3), strict=True):
        assert np.array_equal(one, other)


def _page(*parts) -> str:
    return html.page("Title", "lead", [html.Section("Part", html.join(*parts))])


@pytest.mark.browser
def test_page__two_columns_pictures_in_a_row_and_nothing_over_the_edge():
    grey = np.random.default_rng(0).integers(0, 200, (120, 160), dtype=np.uint8)
    charts = [html_charts.chart({"a": ([0, 1], [0.0, k])}, f"chart {k}", "x", "y") for k in (1, 2, 3)]
    wide = html.table([f"column {k}" for k in range(30)], [[f"value {k} of some length" for k in range(30)]])
    found = check_page(
        _page(
            html.text("word" * 200),
            wide,
            html_charts.in_columns([*charts, html_charts.chart({"c": ([0, 1], [2, 2])}, "constant", "x", "y")]),
            html.picture_row([(png(grey), "reference"), (png(grey), "A"), (png(grey), "B")], "case 1"),
            html.colour_legend({"liver": (230, 85, 60)}),
            html.details("more", html.key_values({"key": "x" * 300})),
            html.figure(html_charts.case_plot({"A": {"c": 0.5}}, "t", "Dice"), "cases"),
        )
    )
    assert len(found["pictures"]) == 7 and found["rows"] == [1] and found["columns"] == [2]


@pytest.mark.browser
@pytest.mark.parametrize(
    ("part", "message"),
    [
        (lambda: html.figure(html_charts.new_figure(4, 3)[0], "empty"), "an empty plot"),
        (
            lambda: html.columns(html.text("a"), html.table(["a"] * 30, [["value of some length"] * 30])),
            "half a page is too narrow",
        ),
        (lambda: re.sub("max-width: 110ch; overflow-wrap: anywhere", "", html.text("w" * 400)), "over the edge"),
    ],
)
def test_check_page__finds_what_it_is_for(part, message):
    page = _page(html.text("")).replace('<p class=""></p>', str(part()))
    if message == "over the edge":
        page = page.replace("overflow-wrap: anywhere", "white-space: nowrap")
    with pytest.raises(AssertionError, match=message):
        check_page(page)
