"""The report of one detection: tables, FROC curves, pictures with what was there and what was found."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from meddino.core import html
from meddino.core.files import atomic_write, write_text
from meddino.core.html_charts import new_figure
from meddino_evaluation.detection.dataset import DetectionSet, read_image
from meddino_evaluation.detection.metrics import ImageResult, froc_curve, match
from meddino_evaluation.detection.run import PER_CASE, read_per_case
from meddino_evaluation.metrics.figures import save_figures
from meddino_evaluation.metrics.text_table import INTERVAL, Table, metric_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHOWN = 6
_SURE = 0.3
"""Detections below are not drawn."""


def write_report(content: dict[str, Any], out: Path, dataset: DetectionSet, figures: str | None = None) -> Table:
    """Write results and by_class as .csv, .md and .tex, pictures, and report.html, beside metrics.json.

    Args:
        content: Of metrics.json.
        out: Folder of the results.
        dataset: Where the pictures come from.
        figures: Also write every figure under figures/, in this format.

    Returns:
        The table of results.
    """
    table, by_class = results_table(content), class_table(content)
    table.write(out, "results")
    by_class.write(out, "by_class")
    runs = read_per_case(out / PER_CASE, dataset.classes)
    drawn = {"froc": _froc_figure(runs, content), "images": _pictures(runs[0], dataset)}
    pictures = {name: html.figure_png(drawing) for name, drawing in drawn.items()}
    for name, picture in pictures.items():
        with atomic_write(out / "pictures" / f"{name}.png") as stream:
            stream.write(picture)
    if figures is not None:
        save_figures(drawn, out / "figures", figures)
    write_text(out / "report.html", _page(content, table, by_class, pictures))
    return table


def results_table(content: dict[str, Any]) -> Table:
    """Return the row of a metrics.json."""
    config, metrics = content["config"], content["metrics"]
    first = [content["model"]["name"], config["detector"]["name"], config["encoder"]["mode"], str(config["split"]["repeats"])]
    data = content["data"]["name"] + (" (overfit)" if content["overfit"] else "")
    header = ("data", "model", "detector", "encoder", "runs", *metrics)
    return Table(header, ((data, *first, *(metric_text(values) for values in metrics.values())),))


def class_table(content: dict[str, Any]) -> Table:
    """Return a row for each class: test boxes over all runs, and the mean over runs of each metric."""
    names = list(content["metrics"])
    rows = [
        (label, str(values["boxes"]), *("–" if values[name] is None else f"{values[name]:.3f}" for name in names))
        for label, values in content["by_class"].items()
    ]
    return Table(("class", "boxes", *names), tuple(rows))


def _froc_figure(runs: Sequence[Sequence[ImageResult]], content: dict[str, Any]) -> "Figure":
    classes, settings = content["data"]["classes"], content["config"]["metrics"]
    drawing, axes = new_figure(4.6, 3.6)
    for number, run in enumerate(runs):
        for label, own in zip(classes, match(run, len(classes), [settings["froc_iou"]]), strict=True):
            if own.boxes.any():
                axes.step(*froc_curve(own, 0), where="post", linewidth=1, label=f"{label}, run {number}")
    rates = settings["froc_rates"]
    axes.set_xscale("log", base=2)
    axes.set(xlabel="false positives an image", ylabel="sensitivity", xlim=(min(rates) / 2, max(rates) * 2), ylim=(0, 1.02))
    if len(runs) * len(classes) <= 12:
        axes.legend(fontsize=7)
    return drawing


def _pictures(run: Sequence[ImageResult], dataset: DetectionSet) -> "Figure":
    """Draw some test images: boxes that are there in green, detections in red with their score."""
    from matplotlib.patches import Rectangle

    cases = {case.name: case for case in dataset.cases}
    shown = sorted(run, key=lambda one: (not len(one.boxes), one.name))[:_SHOWN]
    drawing, whole = new_figure(6.6, 2.4 * -(-len(shown) // 3))
    whole.axis("off")
    for place, one in enumerate(shown):
        stack = read_image(cases[one.name].source, dataset.modality)
        image = stack.tensor(0, 1)[0].numpy()
        if stack.kind == "hu":
            low, high = np.percentile(image, [1, 99.5])
            image = np.clip((image - low) / max(high - low, 1e-6), 0, 1)
        axes: Any = drawing.add_subplot(-(-len(shown) // 3), 3, place + 1)
        axes.imshow(image[0] if len(image) == 1 else image.transpose(1, 2, 0), cmap="gray", vmin=0, vmax=1)
        sure = one.scores >= _SURE
        for boxes, colour in ((one.boxes, "#40c060"), (one.found[sure], "#e05038")):
            for x1, y1, x2, y2 in boxes:
                axes.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, color=colour, linewidth=1))
        for (x1, y1, _, _), score in zip(one.found[sure], one.scores[sure], strict=True):
            axes.text(x1, y1, f"{score:.2f}", color="#e05038", fontsize=5)
        axes.set_title(one.name if len(one.name) <= 30 else "..." + one.name[-27:], fontsize=6)
        axes.axis("off")
    return drawing


def _page(content: dict[str, Any], table: Table, by_class: Table, pictures: dict[str, bytes]) -> str:
    data, config = content["data"], content["config"]
    froc = f"Sensitivity over false positives an image; found is an overlap of {config['metrics']['froc_iou']:g}."
    images = (
        f"Test images: boxes in green, detections from {_SURE} on in red. These are images of patients: share this page as you "
        "would share them."
    )
    lead = html.text(f"Mean ± deviation over runs {INTERVAL}. AP as COCO has it.")
    measured = {
        "model hash": content["model"]["hash"],
        "data": f"{data['cases']} images of {data['patients']} patients, boxes: {data['boxes']}",
        "data hash": data["hash"],
        "licence of the data": data["licence"],
        "split": "; ".join(dict.fromkeys(content["splits"])),
        "version": content["meddino_version"],
    }
    sections = [
        html.Section("Results", html.join(lead, html.table(table.header, table.rows))),
        html.Section("Classes", html.join(html.table(by_class.header, by_class.rows), html.figure(pictures["froc"], froc))),
        html.Section("Images", html.figure(pictures["images"], images)),
        html.Section("Notes", html.join(*(html.text(note, "note") for note in content["notes"]))),
        html.Section("What was measured", html.key_values(measured)),
    ]
    return html.page(f"{content['model']['name']} on {data['name']}", "Detection", sections)
