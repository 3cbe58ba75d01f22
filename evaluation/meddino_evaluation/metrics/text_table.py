"""Tables as people read them: CSV, Markdown and LaTeX; a mean with its deviation and interval as text."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from meddino.core import html
from meddino.core.files import write_text

INTERVAL = "[95 % interval over patients; none for fewer than six, as it could not hold]"
"""What stands beside a mean in tables, for people."""


@dataclass(frozen=True)
class Table:
    """Rows of text under a header, in the shapes people ask for."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def write(self, folder: Path, name: str) -> None:
        """Write name.csv, .md and .tex."""
        for suffix, text in (("csv", self.csv()), ("md", self.markdown()), ("tex", self.latex())):
            write_text(folder / f"{name}.{suffix}", text)

    def only(self, columns: Sequence[str]) -> "Table":
        """Return the columns that are named, in the table's order."""
        kept = [place for place, name in enumerate(self.header) if name in columns]
        return Table(tuple(self.header[one] for one in kept), tuple(tuple(row[one] for one in kept) for row in self.rows))

    def best_in_bold(self, groups: Sequence[str], larger: Sequence[str], smaller: Sequence[str] = ()) -> "Table":
        """Mark the best number of some columns among the rows that agree in `groups`.

        Args:
            groups: Columns; rows that differ in one of them do not compete.
            larger: Columns in which the largest number is the best.
            smaller: Columns in which the smallest is.
        """
        rows = [list(row) for row in self.rows]
        key = [tuple(row[self.header.index(name)] for name in groups) for row in self.rows]
        for name, sign in [(name, 1) for name in larger] + [(name, -1) for name in smaller]:
            if name not in self.header:
                continue
            column = self.header.index(name)
            for group in set(key):
                values = {
                    place: sign * float(row[column].split()[0])
                    for place, row in enumerate(self.rows)
                    if key[place] == group and re.match(r"-?\d", row[column])  # a dash stands for no number
                }
                if len(values) > 1:
                    for place in [one for one, value in values.items() if value == max(values.values())]:
                        rows[place][column] = f"**{rows[place][column]}**"
        return Table(self.header, tuple(tuple(row) for row in rows))

    def csv(self) -> str:
        """Return comma-separated values, which have no bold."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(self.header)
        writer.writerows([cell.removeprefix("**").removesuffix("**") for cell in row] for row in self.rows)
        return stream.getvalue()

    def markdown(self) -> str:
        """Return a Markdown table."""

        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

        return "\n".join([line(self.header), line(["---"] * len(self.header)), *(line(row) for row in self.rows)]) + "\n"

    def html(self, dash: str) -> Markup:
        """Return the table for a report, whose dashes mean what `dash` says."""

        def cell(text: str) -> html.Cell:
            if text in ("-", "–", "- to -"):
                return None
            is_bold = text.startswith("**") and text.endswith("**")
            return Markup("<b>{}</b>").format(text[2:-2]) if is_bold else text

        return html.table(self.header, [[cell(text) for text in row] for row in self.rows], dash)

    def latex(self) -> str:
        """Return a LaTeX tabular (booktabs)."""

        def line(cells: Sequence[str]) -> str:
            return " & ".join(_latex_text(cell) for cell in cells) + r" \\"

        body = [line(row) for row in self.rows]
        columns = "l" * len(self.header)
        return "\n".join(
            [
                rf"\begin{{tabular}}{{{columns}}}",
                r"\toprule",
                line(self.header),
                r"\midrule",
                *body,
                r"\bottomrule",
                r"\end{tabular}",
                "",
            ]
        )


def number_text(value: float | None, form: str = ".3f") -> str:
    """Return a number as it stands in a table; a dash where there is none."""
    return "-" if value is None else format(value, form)


def metric_text(values: Mapping[str, Any] | None) -> str:
    """Return `0.812 ± 0.030 [0.741, 0.880]`: mean, deviation over runs, interval over patients; a dash where undefined."""
    if not values or values["mean"] is None:
        return "–"
    text = f"{values['mean']:.3f}"
    if values["std"] is not None:
        text += f" ± {values['std']:.3f}"
    if values["low"] is not None:
        text += f" [{values['low']:.3f}, {values['high']:.3f}]"
    return text


def _latex_text(text: str) -> str:
    for character, escaped in (
        ("\\", r"\textbackslash{}"),
        ("&", r"\&"),
        ("%", r"\%"),
        ("_", r"\_"),
        ("#", r"\#"),
        ("$", r"\$"),
    ):
        text = text.replace(character, escaped)
    text = re.sub(r"\*\*(.+?)\*\*", r"\\textbf{\1}", text)
    return text.replace("±", r"$\pm$").replace("–", "--")
