"""Reports as one self-contained HTML file: no scripts from elsewhere, every text escaped, pictures inside.

Charts are drawn by `meddino.core.html_charts`.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
header, main, footer { max-width: 1560px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 28px; }
h1 { font-size: 26px; margin: 0 0 4px; }
h2 { font-size: 19px; margin: 0 0 10px; }
.lead, figcaption, footer { color: var(--soft); }
nav a { margin-right: 14px; color: var(--accent); text-decoration: none; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 18px 20px; margin: 18px 0; }
p { max-width: 110ch; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td.number, th.number { text-align: right; }
td.number, td.short { white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
figure { margin: 12px 16px 12px 0; display: inline-block; max-width: 100%; vertical-align: top; }
.columns, .row { display: grid; gap: 10px 26px; align-items: start; grid-template-columns: minmax(0, 1fr); margin: 10px 0; }
.columns > *, .row > * { min-width: 0; }
.columns figure, .row figure { margin: 0; }
.columns figure img, .row figure img { width: 100%; }
@media (min-width: 1100px) { .columns { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
.row { gap: 10px; }
.row h3 { grid-column: 1 / -1; }
h3 { font-size: 15px; margin: 8px 0 0; }
.legend span { display: inline-block; margin-right: 16px; }
.legend i { display: inline-block; width: 13px; height: 13px; border-radius: 3px; margin-right: 6px; vertical-align: -1px; }
.dash { color: var(--soft); font-size: 13px; margin: 2px 0 12px; }
summary { cursor: pointer; color: var(--accent); }
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


def table(header: Sequence[str], rows: Sequence[Sequence[Cell]], dash: str = "") -> Markup:
    """Return a table. Numbers stand to the right, floats with four significant digits, None as a dash.

    Args:
        header: One name a column.
        rows: Cells.
        dash: What a dash means, said below the table if there is one.
    """
    numeric = [_is_numeric([row[place] for row in rows]) for place in range(len(header))]
    head = Markup("").join(
        Markup("<th{}>{}</th>").format(Markup(' class="number"') if right else "", name)
        for name, right in zip(header, numeric, strict=True)
    )
    body = Markup("").join(Markup("<tr>{}</tr>").format(Markup("").join(_cell(cell) for cell in row)) for row in rows)
    made = Markup('<div class="scroll"><table><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>').format(head, body)
    has_dash = dash and any(cell is None for row in rows for cell in row)
    return made + Markup('<p class="dash">– {}</p>').format(dash) if has_dash else made


def key_values(values: Mapping[str, Cell]) -> Markup:
    """Return a table of two columns."""
    return table(("", ""), list(values.items()))


def details(summary: str, body: Markup) -> Markup:
    """Return what is folded away until its summary is clicked on."""
    return Markup("<details><summary>{}</summary>{}</details>").format(summary, body)


def columns(*parts: Markup) -> Markup:
    """Return parts in two columns on wide screens, else below one another; empty parts take no place."""
    cells = [Markup("<div>{}</div>").format(part) for part in parts if part]  # a part of several elements stays one cell
    return Markup('<div class="columns">{}</div>').format(join(*cells))


def picture_row(pictures: Sequence[tuple[bytes, str]], title: str = "", width_px: int = 340) -> Markup:
    """Return pictures beside one another, whatever the width of the screen.

    Args:
        pictures: PNG bytes and caption of each.
        title: Above them.
        width_px: Of each picture at most.
    """
    size = f"grid-template-columns: repeat({len(pictures)}, minmax(0, 1fr)); max-width: {len(pictures) * (width_px + 10)}px"
    heading = Markup("<h3>{}</h3>").format(title) if title else Markup("")
    body = join(*(figure(picture, caption) for picture, caption in pictures))
    return Markup('<div class="row" style="{}">{}{}</div>').format(size, heading, body)


def colour_legend(colours: Mapping[str, Sequence[float]]) -> Markup:
    """Return names with their colours [0, 255], red, green, blue."""
    parts = [
        Markup('<span><i style="background: rgb({})"></i>{}</span>').format(", ".join(f"{value:.0f}" for value in rgb), name)
        for name, rgb in colours.items()
    ]
    return Markup('<p class="legend">{}</p>').format(Markup("").join(parts))


def figure(picture: "bytes | Figure", caption: str = "", width_px: int | None = None, alt: str = "") -> Markup:
    """Return a picture with a caption.

    Args:
        picture: PNG bytes, or a matplotlib figure, which is drawn here.
        caption: Shown below.
        width_px: Picture and caption are this wide, at most the page's width; None keeps the picture's own size.
        alt: Text for those who cannot see the picture; the caption where there is none.
    """
    data = picture if isinstance(picture, bytes) else figure_png(picture)
    source = "data:image/png;base64," + base64.b64encode(data).decode()
    size = Markup(' width="{}"').format(width_px) if width_px else Markup("")
    style = Markup(' style="width: {}px"').format(width_px) if width_px else Markup("")
    below = Markup("<figcaption>{}</figcaption>").format(caption) if caption else Markup("")
    return Markup('<figure{}><img src="{}" alt="{}"{}>{}</figure>').format(style, source, alt or caption, size, below)


def figure_png(drawing: "Figure") -> bytes:
    """Draw a matplotlib figure as PNG without a date in it, so that equal figures give equal bytes."""
    stream = io.BytesIO()
    drawing.savefig(stream, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    return stream.getvalue()


def _cell(value: Cell) -> Markup:
    if value is None:
        return Markup('<td class="number">–</td>')
    if isinstance(value, bool) or not isinstance(value, int | float):
        short = len(value.striptags() if isinstance(value, Markup) else str(value)) <= UNBROKEN_CHARACTERS
        return Markup("<td{}>{}</td>").format(Markup(' class="short"') if short else "", value)
    return Markup('<td class="number">{}</td>').format(f"{value:,}" if isinstance(value, int) else f"{value:.4g}")


def _is_numeric(cells: Sequence[Cell]) -> bool:
    """Tell whether a column holds numbers, and dashes where one is missing."""
    known = [cell for cell in cells if cell is not None]
    return bool(known) and all(isinstance(cell, int | float) and not isinstance(cell, bool) for cell in known)
