"""Reports as one self-contained HTML file: no scripts from elsewhere, every text escaped, pictures inside."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Cell = str | float | int | None | Markup
# Text up to this long stays on one line of a table, such as a value with its interval; a wide table scrolls instead.
UNBROKEN_CHARACTERS = 32

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{% if refresh_s %}<meta http-equiv="refresh" content="{{ refresh_s }}">{% endif %}
<title>{{ title }}</title>
<style>
:root { --ink: #1d2430; --soft: #5c6675; --line: #d9dee6; --back: #f6f7f9; --card: #fff; --accent: #2458a6; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }
header, main, footer { max-width: 1120px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 28px; }
h1 { font-size: 26px; margin: 0 0 4px; }
h2 { font-size: 19px; margin: 0 0 10px; }
.lead, figcaption, footer { color: var(--soft); }
nav a { margin-right: 14px; color: var(--accent); text-decoration: none; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 18px 20px; margin: 18px 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td.number { text-align: right; }
td.number, td.short { white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
figure { margin: 12px 16px 12px 0; display: inline-block; max-width: 100%; vertical-align: top; }
img { max-width: 100%; height: auto; border-radius: 4px; }
.note { border-left: 4px solid var(--accent); padding: 6px 12px; background: #eef3fb; }
.warning { border-left: 4px solid #b4540a; padding: 6px 12px; background: #fdf3e7; }
</style>
</head>
<body>
<header><h1>{{ title }}</h1><p class="lead">{{ lead }}</p>
<nav>{% for section in sections %}<a href="#s{{ loop.index }}">{{ section.title }}</a>{% endfor %}</nav></header>
<main>
{% for section in sections %}<section id="s{{ loop.index }}"><h2>{{ section.title }}</h2>
{{ section.body }}
</section>
{% endfor %}</main>
<footer><p>{{ footer }}</p></footer>
</body>
</html>
"""


@dataclass(frozen=True)
class Section:
    """A titled part of a page; `body` is made by the functions of this module."""

    title: str
    body: Markup


def page(title: str, lead: str, sections: Sequence[Section], footer: str = "", refresh_s: int = 0) -> str:
    """Return a whole HTML page.

    Args:
        title: Heading and window title.
        lead: One sentence below it.
        sections: Shown in order, linked from the top.
        footer: Last line, e.g. the command that made the page.
        refresh_s: Seconds after which a browser reloads the page; 0 for never.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    return environment.from_string(_PAGE).render(title=title, lead=lead, sections=sections, footer=footer, refresh_s=refresh_s)


def join(*parts: Markup) -> Markup:
    """Return pieces one after the other."""
    return Markup("\n").join(parts)


def text(words: str, style: str = "") -> Markup:
    """Return a paragraph; `style` is "", "note" or "warning"."""
    return Markup('<p class="{}">{}</p>').format(style, words)


def table(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> Markup:
    """Return a table. Numbers stand to the right, floats with four significant digits, None as a dash."""
    head = Markup("").join(Markup("<th>{}</th>").format(name) for name in header)
    body = Markup("").join(Markup("<tr>{}</tr>").format(Markup("").join(_cell(cell) for cell in row)) for row in rows)
    return Markup('<div class="scroll"><table><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>').format(head, body)


def key_values(values: Mapping[str, Cell]) -> Markup:
    """Return a table of two columns."""
    return table(("", ""), list(values.items()))


def figure(picture: "bytes | Figure", caption: str = "", width_px: int | None = None) -> Markup:
    """Return a picture with a caption.

    Args:
        picture: PNG bytes, or a matplotlib figure, which is drawn here.
        caption: Shown below; also the text for those who cannot see the picture.
        width_px: Picture and caption are this wide, at most the page's width; None keeps the picture's own size.
    """
    data = picture if isinstance(picture, bytes) else figure_png(picture)
    source = "data:image/png;base64," + base64.b64encode(data).decode()
    size = Markup(' width="{}"').format(width_px) if width_px else Markup("")
    style = Markup(' style="width: {}px"').format(width_px) if width_px else Markup("")
    return Markup('<figure{}><img src="{}" alt="{}"{}><figcaption>{}</figcaption></figure>').format(
        style, source, caption, size, caption
    )


def figure_png(drawing: "Figure", dpi: int = 110) -> bytes:
    """Draw a matplotlib figure as PNG without a date in it, so that equal figures give equal bytes."""
    stream = io.BytesIO()
    drawing.savefig(stream, format="png", dpi=dpi, bbox_inches="tight", metadata={"Software": None})
    return stream.getvalue()


def line_chart(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    title: str,
    x_label: str,
    y_label: str,
    log_y: bool = False,
    marks: Mapping[str, float] | None = None,
    levels: Mapping[str, float] | None = None,
) -> "Figure":
    """Return a small line chart.

    Args:
        series: Name to (x values, y values).
        title: Above the chart.
        x_label: With its unit.
        y_label: With its unit.
        log_y: Logarithmic y axis.
        marks: Name to x position of a vertical line, e.g. where a stage begins.
        levels: Name to y position of a horizontal line, e.g. what chance would give.
    """
    # The object interface: pyplot keeps every figure alive in a global registry.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(6.2, 3.2))
    FigureCanvasAgg(drawing)
    axes: Any = drawing.add_subplot()
    for name, (x, y) in series.items():
        axes.plot(x, y, label=name, linewidth=1.4)
    lines = _name_marks(axes, marks or {})
    for name, height in (levels or {}).items():
        axes.axhline(height, color="0.6", linewidth=0.8, linestyle="--")
        place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "xytext": (-3, 2), "textcoords": "offset points"}
        axes.annotate(name, (1.0, height), **place, fontsize=7, color="0.4", ha="right")
    if log_y:
        axes.set_yscale("log")
    else:
        _name_plain_numbers(axes)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.set_title(title, fontsize=10, pad=6 + 8 * lines)
    axes.grid(alpha=0.25)
    if len(series) > 1:
        axes.legend(fontsize=7, frameon=False)
    return drawing


def _name_plain_numbers(axes: Any) -> None:
    """Write values at the y axis as they are, and give what hardly changes an axis on which that is seen."""
    axes.ticklabel_format(axis="y", useOffset=False)
    low, high = axes.get_ylim()
    size = max(abs(low), abs(high))
    if high - low < 1e-3 * size:
        axes.set_ylim(low - 5e-3 * size, high + 5e-3 * size)


def _name_marks(axes: Any, marks: Mapping[str, float]) -> int:
    """Draw the vertical lines with their names above the axes, close ones on lines of their own; returns the lines of text."""
    for position in marks.values():
        axes.axvline(position, color="0.6", linewidth=0.8, linestyle="--")
    left, right = axes.get_xlim()  # now that the lines have widened it
    line, lines, previous = 0, 0, -float("inf")
    for name, position in sorted(marks.items(), key=lambda item: item[1]):
        line = line + 1 if (position - previous) < 0.3 * (right - left) else 0
        lines, previous = max(lines, line + 1), position
        axes.annotate(
            name,
            (position, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 1 + 8 * line),
            textcoords="offset points",
            fontsize=7,
            color="0.4",
            va="bottom",
        )
    return lines


def _cell(value: Cell) -> Markup:
    if value is None:
        return Markup('<td class="number">–</td>')
    if isinstance(value, bool) or not isinstance(value, int | float):
        short = not isinstance(value, Markup) and len(str(value)) <= UNBROKEN_CHARACTERS
        return Markup("<td{}>{}</td>").format(Markup(' class="short"') if short else "", value)
    return Markup('<td class="number">{}</td>').format(f"{value:,}" if isinstance(value, int) else f"{value:.4g}")
