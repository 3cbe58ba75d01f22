"""The report of one evaluation: tables, reliability diagrams, notes."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from meddino.core import html
from meddino.core.files import write_text
from meddino_evaluation.classification.results import Run, read_per_case
from meddino_evaluation.metrics.text_table import Table, metric_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BINS = 10


def metrics_table(content: dict[str, Any]) -> Table:
    """Return one row a protocol and setting of a metrics.json."""
    names = list(content["results"][0]["metrics"])
    rows = [
        (entry["protocol"], entry["setting"], str(entry["runs"]), *(metric_text(entry["metrics"][name]) for name in names))
        for entry in content["results"]
    ]
    return Table(("protocol", "training", "runs", *names), tuple(rows))


def write_report(content: dict[str, Any], out: Path) -> Table:
    """Write results.csv, .md, .tex and report.html beside metrics.json; returns the table."""
    table = metrics_table(content)
    table.write(out, "results")
    data, model = content["data"], content["model"]
    runs = read_per_case(out / "per_case.csv", data["classes"], data["task"])
    classes = [(entry["protocol"], entry["setting"], *entry["auroc_per_class"].values()) for entry in content["results"]]
    header = ("protocol", "training", *content["results"][0]["auroc_per_class"])
    notes = [*content["notes"], *dict.fromkeys(note for entry in content["results"] for note in entry["notes"])]
    sections = [
        html.Section(
            "Results",
            html.join(html.text("Mean ± deviation over runs [interval over patients]."), html.table(table.header, table.rows)),
        ),
        html.Section("AUROC of each class", html.table(header, classes)),
        html.Section(
            "Calibration", html.figure(reliability_diagram(runs), "how often the prediction is right, by its confidence")
        ),
        html.Section("Notes", html.join(*(html.text(note, "note") for note in notes))),
        html.Section(
            "What was measured",
            html.key_values(
                {
                    "model": model["name"],
                    "model hash": model["hash"],
                    "data": f"{data['name']}: {data['cases']} cases, {data['patients']} patients",
                    "data hash": data["hash"],
                    "licence of the data": data["licence"],
                    "splits": "; ".join(content["splits"]),
                    "version": content["meddino_version"],
                }
            ),
        ),
    ]
    write_text(out / "report.html", html.page(f"{model['name']} on {data['name']}", "Classification", sections))
    return table


def reliability_diagram(runs: Sequence[Run]) -> "Figure":
    """Draw accuracy over confidence for each protocol (all runs of its first setting together)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(4.2, 3.6))
    FigureCanvasAgg(drawing)
    axes: Any = drawing.add_subplot()
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=0.8)
    for protocol in dict.fromkeys(run.protocol for run in runs):
        own = [run for run in runs if run.protocol == protocol]
        own = [run for run in own if run.setting == own[-1].setting]
        if own[0].truth.ndim == 2:
            known = [run.truth != -1 for run in own]
            confidence = np.concatenate([run.probabilities[mask] for run, mask in zip(own, known, strict=True)])
            right = np.concatenate([run.truth[mask] == 1 for run, mask in zip(own, known, strict=True)])
        else:
            confidence = np.concatenate([run.probabilities.max(1) for run in own])
            right = np.concatenate([run.probabilities.argmax(1) == run.truth for run in own])
        number = np.clip((confidence * _BINS).astype(int), 0, _BINS - 1)
        filled = [one for one in range(_BINS) if (number == one).any()]
        x = [float(confidence[number == one].mean()) for one in filled]
        axes.plot(
            x, [float(right[number == one].mean()) for one in filled], marker="o", markersize=3, linewidth=1, label=protocol
        )
    axes.set(xlabel="confidence", ylabel="share right", xlim=(0, 1), ylim=(0, 1))
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, frameon=False)
    return drawing
