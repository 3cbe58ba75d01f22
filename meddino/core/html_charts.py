"""Charts and pictures of reports: no chart is empty, one point is drawn as a point, what never changes is a line of text."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from meddino.core.html import columns, figure, join, text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]
NAMED_CASES = 40  # with more cases in a plot their names could not be read
MOST_INSIDE = 3  # with more series than these a legend inside the axes hides some
GAP_PX = 4  # white, between panels
_SAME = 1e-9  # relative: closer values are one value


def chart(
    series: Series,
    title: str,
    x_label: str,
    y_label: str,
    log_y: bool = False,
    marks: Mapping[str, float] | None = None,
    levels: Mapping[str, float] | None = None,
) -> Markup:
    """Return a line chart with its caption, a line of text if nothing in it changes, or nothing if it would be empty.

    Args:
        series: Name to (x values, y values); what is not finite is left out.
        title: Above the chart, or before the text.
        x_label: With its unit.
        y_label: With its unit.
        log_y: Logarithmic y axis.
        marks: Name to x position of a dashed vertical line, e.g. where a stage begins.
        levels: Name to y position of a dashed horizontal line, e.g. what chance would give.
    """
    known = _finite(series, log_y)
    if not known:
        return Markup("")
    constant = {name: y[0] for name, (_, y) in known.items() if _is_constant(y) and len(y) > 1}
    if len(constant) == len(known):
        values = ", ".join(f"{name} {value:.4g}" if len(known) > 1 else f"{value:.4g}" for name, value in constant.items())
        counts = {len(y) for _, y in known.values()}
        times = f"all {max(counts)} times" if len(counts) == 1 else "every time"
        compared = "".join(f"; {name} is {value:.4g}" for name, value in (levels or {}).items())
        return text(f"{title}: {values}, the same {times} it was measured{compared}.")
    dashed = [f"{name} ({value:.4g})" for name, value in (levels or {}).items()]
    dashed += [f"{name} (at {at:g})" for name, at in (marks or {}).items()]
    caption = f"Dashed: {', '.join(dashed)}." if dashed else ""  # the title is in the picture
    return figure(line_chart(known, title, x_label, y_label, log_y, marks, levels), caption, alt=title)


def in_columns(charts: Sequence[Markup]) -> Markup:
    """Return charts two beside one another on wide screens, and below them the lines of text that stand for some."""
    drawn, said = [part for part in charts if "<img" in part], [part for part in charts if part and "<img" not in part]
    return join(*([columns(*drawn)] if drawn else []), *said)


def line_chart(
    series: Series,
    title: str,
    x_label: str,
    y_label: str,
    log_y: bool = False,
    marks: Mapping[str, float] | None = None,
    levels: Mapping[str, float] | None = None,
) -> "Figure":
    """Draw a line chart; see `chart`. A series of one point is drawn as a point, few points are marked."""
    drawing, axes = new_figure(6.2, 3.2)
    for name, (x, y) in series.items():
        axes.plot(x, y, label=name, linewidth=1.4, marker="o" if len(x) <= 12 else None, markersize=6 if len(x) == 1 else 3.5)
    lines = _name_marks(axes, marks or {})
    if levels:
        axes.margins(y=0.12)  # room above the topmost for its name
    for name, height in (levels or {}).items():
        axes.axhline(height, color="0.6", linewidth=0.8, linestyle="--")
        place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "xytext": (-3, 2), "textcoords": "offset points"}
        axes.annotate(name, (1.0, height), **place, fontsize=7, color="0.4", ha="right")
    if log_y:
        axes.set_yscale("log")
    else:
        _name_plain_numbers(axes)
    if all(float(value).is_integer() for x, _ in series.values() for value in x):
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.set_title(title, fontsize=10, pad=6 + 8 * lines)
    axes.grid(alpha=0.25)
    if len(series) > MOST_INSIDE:
        axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    elif len(series) > 1:
        axes.legend(fontsize=7, frameon=False)
    return drawing


def case_plot(values: Mapping[str, Mapping[str, float]], title: str, x_label: str) -> "Figure":
    """Draw every case as a row of dots, one a series, the best on top.

    Args:
        values: Series (a model, a label) to case to value.
        title: Above.
        x_label: With its unit.
    """
    sums: dict[str, list[float]] = {}
    for own in values.values():
        for case, value in own.items():
            sums.setdefault(case, []).append(value)
    order = sorted(sums, key=lambda case: (-sum(sums[case]) / len(sums[case]), case))
    named = len(order) <= NAMED_CASES
    drawing, axes = new_figure(6.2, 1.0 + (0.24 * len(order) if named else 5.0))
    for place, case in enumerate(order):
        if len(sums[case]) > 1 and named:
            axes.plot([min(sums[case]), max(sums[case])], [place, place], color="0.85", linewidth=1.0, zorder=1)
    for name, own in values.items():
        rows = [place for place, case in enumerate(order) if case in own]
        axes.scatter([own[order[place]] for place in rows], rows, s=22 if named else 8, label=name, zorder=2, alpha=0.85)
    if named:
        axes.set_yticks(range(len(order)), order, fontsize=7)
    else:
        axes.set_ylabel(f"{len(order)} cases, the best on top")
        axes.set_yticks([])
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.locator_params(axis="x", nbins=6)
    axes.set_xlabel(x_label)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25, axis="x")
    if len(values) > 1:
        axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return drawing


def new_figure(width_in: float, height_in: float) -> tuple["Figure", Any]:
    """Return a figure and its axes through the object interface: pyplot keeps every figure alive in a global registry."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(width_in, height_in))
    FigureCanvasAgg(drawing)
    return drawing, drawing.add_subplot()


def png(picture: NDArray[np.uint8]) -> bytes:
    """Return a picture [h, w] or [h, w, 3] as PNG."""
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG")
    return stream.getvalue()


def beside(panels: Sequence[NDArray[np.uint8]]) -> bytes:
    """Return pictures [h, w, 3] of one size as one PNG, with a gap between them."""
    gap = np.full((panels[0].shape[0], GAP_PX, 3), 255, dtype=np.uint8)
    parts: list[NDArray[Any]] = [part for panel in panels for part in (gap, panel)]
    return png(np.concatenate(parts[1:], axis=1))


def apart(picture: bytes, count: int = 2) -> list[NDArray[np.uint8]]:
    """Return the panels of a PNG from `beside`."""
    whole = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))
    width = (whole.shape[1] - (count - 1) * GAP_PX) // count
    return [whole[:, place * (width + GAP_PX) :][:, :width] for place in range(count)]


def _finite(series: Series, log_y: bool) -> dict[str, tuple[list[float], list[float]]]:
    found = {}
    for name, (x, y) in series.items():
        points = [
            (float(one), float(other))
            for one, other in zip(x, y, strict=True)
            if math.isfinite(other) and (other > 0 or not log_y)
        ]
        if points:
            found[name] = ([one for one, _ in points], [other for _, other in points])
    return found


def _is_constant(values: Sequence[float]) -> bool:
    return max(values) - min(values) <= _SAME * max(abs(value) for value in values)


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
