from html.parser import HTMLParser

from markupsafe import Markup

from meddino.core import html


class _Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags = []
        self.sources = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]


def _tags(page: str) -> _Tags:
    parser = _Tags()
    parser.feed(page)
    return parser


def test_page__escapes_every_text():
    hostile = "<script>alert(1)</script>"
    made = html.page(hostile, hostile, [html.Section(hostile, html.table([hostile], [[hostile]]))], footer=hostile)
    assert "<script>" not in made
    assert made.count("&lt;script&gt;") == 8  # title twice, lead, navigation, heading, table head, cell, footer


def test_page__is_self_contained():
    drawing = html.line_chart({"loss": ([0, 1, 2], [3.0, 2.0, 1.0])}, "Loss", "step", "loss", marks={"stage 2": 1})
    page = _tags(html.page("T", "", [html.Section("S", html.figure(drawing, "loss"))]))
    assert "script" not in page.tags
    assert all(source.startswith(("#", "data:image/png;base64,")) for source in page.sources)


def test_line_chart__names_of_marks_do_not_overlap_where_curves_begin_late():
    marks = {"stage1": 0, "stage2": 220, "stage3": 235}
    axes = html.line_chart({"gram": ([220, 235, 245], [0.2, 0.1, 0.1])}, "t", "x", "y", marks=marks).axes[0]
    heights = {text.get_text(): text.xyann[1] for text in axes.texts}
    assert heights["stage1"] == heights["stage2"] < heights["stage3"]


def test_line_chart__says_values_as_they_are():
    drawing = html.line_chart({"a": ([0, 1, 2], [6.23832, 6.238321, 6.238319])}, "t", "x", "y", levels={"ln K": 6.2383246})
    drawing.canvas.draw()
    axes = drawing.axes[0]
    assert axes.yaxis.get_offset_text().get_text() == ""
    assert {label.get_text()[:3] for label in axes.get_yticklabels()} <= {"6.2"}
    assert [text.get_text() for text in axes.texts] == ["ln K"]


def test_table__numbers_and_gaps():
    made = html.table(["a", "b", "c", "d"], [[1234, 0.123456, None, "x & y"]])
    assert "1,234" in made
    assert "0.1235" in made
    assert "–" in made
    assert "x &amp; y" in made
    assert isinstance(made, Markup)


def test_figure_png__same_drawing_same_bytes():
    def draw():
        return html.figure_png(html.line_chart({"a": ([0, 1], [0.0, 1.0])}, "t", "x", "y"))

    assert draw() == draw()
    assert draw().startswith(b"\x89PNG")
