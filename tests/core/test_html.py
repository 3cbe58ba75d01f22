from html.parser import HTMLParser

from markupsafe import Markup

from meddino.core import html, html_charts


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
    drawing = html_charts.chart({"loss": ([0, 1, 2], [3.0, 2.0, 1.0])}, "Loss", "step", "loss", marks={"stage 2": 1})
    page = _tags(html.page("T", "", [html.Section("S", drawing)]))
    assert "script" not in page.tags
    assert all(source.startswith(("#", "data:image/png;base64,")) for source in page.sources)


def test_table__numbers_and_gaps():
    made = html.table(["a", "b", "c", "d"], [[1234, 0.123456, None, "x & y"]])
    assert "1,234" in made
    assert "0.1235" in made
    assert "–" in made
    assert "x &amp; y" in made
    assert isinstance(made, Markup)


def test_table__a_dash_is_explained_where_there_is_one():
    assert "– not measured" in html.table(["a"], [[1.0], [None]], dash="not measured")
    assert "not measured" not in html.table(["a"], [[1.0], [2.0]], dash="not measured")
    made = html.table(["name", "value"], [["x", 1.0], ["y", None]])
    assert made.count('<th class="number">value</th>') == 1 and "<th>name</th>" in made


def test_colour_legend__names_and_colours():
    made = html.colour_legend({"liver <b>": (230.0, 85.0, 60.0)})
    assert "rgb(230, 85, 60)" in made and "liver &lt;b&gt;" in made
