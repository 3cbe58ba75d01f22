"""The demo's last table and its report: read from what the commands left on disk."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from markupsafe import Markup
from numpy.typing import NDArray
from rich.table import Table

from meddino import load
from meddino.checkpoints.export.model import Model
from meddino.core import html
from meddino.core.files import write_text
from meddino.core.logging import console
from meddino.data.corpus import Corpus
from meddino.data.model_input import to_picture
from meddino.models.patch_pca import patch_pca_images

PCA_SLICES = 4
PCA_SIDE_PX = 256


@dataclass(frozen=True)
class Summary:
    """What the demo showed, in numbers.

    Attributes:
        volumes: Number of volumes by status.
        slices_kept: Slices in the corpus.
        slices_refused: Slices of accepted volumes that were left out.
        losses: (stage, steps, first loss, last loss): means over the first and the last tenth of the steps.
        dice: Result's name to (mean, standard deviation over seeds) of the mean Dice over held-out cases.
        seeds: Seeds behind each Dice.
        seconds: By the step's name.
    """

    volumes: Mapping[str, int]
    slices_kept: int
    slices_refused: int
    losses: Sequence[tuple[str, int, float, float]]
    dice: Mapping[str, tuple[float, float]]
    seeds: int
    seconds: Mapping[str, float]


def read_summary(out: Path, seconds: Mapping[str, float]) -> Summary:
    """Collect the numbers from the demo's folder."""
    corpus = Corpus(out / "corpus")
    statuses = Counter(corpus.volumes.column("status").to_pylist())
    kept = len(corpus)
    losses = []
    for stage, records in read_losses(out / "run").items():
        values = [record["loss"] for record in records if record["loss"] is not None]
        tenth = max(1, len(values) // 10)
        losses.append((stage, len(records), float(np.mean(values[:tenth])), float(np.mean(values[-tenth:]))))
    results = {name: json.loads((out / "results" / name / "metrics.json").read_text()) for name in ("exported", "random")}
    dice = {
        name: (float(result["test"]["dice"]["mean"]), float(result["test"]["dice"]["std"])) for name, result in results.items()
    }
    seeds = len(results["exported"]["test"]["dice"]["by_seed"])
    return Summary(statuses, kept, _slices_refused(corpus), losses, dice, seeds, seconds)


def _slices_refused(corpus: Corpus) -> int:
    rows = corpus.volumes.select(["status", "shape", "num_slices_kept"]).to_pylist()
    return sum(row["shape"][0] - row["num_slices_kept"] for row in rows if row["status"] == "accepted")


def read_losses(run: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the records of metrics.jsonl by stage, in the order in which the stages ran."""
    order = json.loads((run / "run.json").read_text())["stages"]
    records = {}
    for stage in order:
        lines = (run / stage / "metrics.jsonl").read_text().splitlines()
        records[stage] = [json.loads(line) for line in lines]
    return records


def print_table(summary: Summary) -> None:
    """Show the numbers on the terminal."""
    grid = Table(title="What the demo did", show_header=False, title_justify="left")
    for name, value in _rows(summary):
        grid.add_row(name, value)
    console.print(grid)


def _rows(summary: Summary) -> list[tuple[str, str]]:
    volumes = ", ".join(f"{count} {status}" for status, count in sorted(summary.volumes.items()))
    rows = [
        ("volumes", volumes),
        ("slices", f"{summary.slices_kept:,} kept, {summary.slices_refused:,} refused"),
        *((f"loss, {stage}", f"{first:.3f} -> {last:.3f} in {steps} steps") for stage, steps, first, last in summary.losses),
    ]
    titles = {"exported": "Dice, exported model", "random": "Dice, same model, random weights"}
    for name, (mean, spread) in summary.dice.items():
        rows.append((titles[name], f"{mean:.3f} ± {spread:.3f} ({summary.seeds} seeds, frozen encoder)"))
    rows += [(f"time, {name}", f"{value:.0f} s") for name, value in summary.seconds.items()]
    rows.append(("time, in all", f"{sum(summary.seconds.values()):.0f} s"))
    return rows


def write_report(out: Path, summary: Summary, commands: Sequence[str]) -> None:
    """Write `report.html` into the demo's folder.

    Args:
        out: The demo's folder.
        summary: From `read_summary`.
        commands: What was run, as typed.
    """
    sections = [
        html.Section("Result", html.table(("", ""), _rows(summary))),
        html.Section("Slices kept", _slice_pictures(Corpus(out / "corpus"))),
        html.Section("Training", _loss_charts(out / "run")),
        html.Section("Patch tokens before and after", _pca_pictures(out)),
        html.Section("Predictions on held-out cases", _overlays(out / "results")),
        html.Section("Commands", html.table(("",), [(command,) for command in commands])),
    ]
    lead = "Curation, three-stage pretraining, export and segmentation of one small run."
    write_text(out / "report.html", html.page("MedDINO demo", lead, sections, footer="Made by meddino-demo."))


def _chosen_slices(corpus: Corpus, count: int) -> list[int]:
    """Return rows spread over the corpus, away from the ends of what is kept."""
    return [int((place + 0.5) * len(corpus) / count) for place in range(count)]


def _slice_pictures(corpus: Corpus) -> Markup:
    pictures = [_windowed(corpus.read(row)) for row in _chosen_slices(corpus, 10)]
    drawing = _picture_row(pictures, [""] * len(pictures), columns=5)
    return html.figure(drawing, "Slices of the corpus, soft-tissue window (level 40, width 400 HU).")


def _loss_charts(run: Path) -> Markup:
    stages = read_losses(run)
    charts = []
    for name in ("loss", "dino_local", "ibot", "koleo", "gram"):
        series, marks, offset = {}, {}, 0
        for stage, records in stages.items():
            points = [(offset + record["step"], record[name]) for record in records if record.get(name) is not None]
            if points:
                series[stage] = ([step for step, _ in points], [value for _, value in points])
            marks[stage] = float(offset)
            offset += len(records)
        if series:
            charts.append(html.figure(html.line_chart(series, name, "step", name, marks=marks), f"{name} by stage"))
    return html.join(*charts)


def _pca_pictures(out: Path) -> Markup:
    corpus = Corpus(out / "corpus")
    before, after = load(f"random:{out / 'model'}"), load(out / "model")
    rows = _chosen_slices(corpus, PCA_SLICES)
    images = [_square(corpus.read(row)) for row in rows]
    pictures = [to_picture(image, "ct").numpy() for image in images]
    for model in (before, after):
        pictures += patch_pca_images([_patch_map(model, image) for image in images], upscale=model.patch_size)
    titles = ["slice"] * len(rows) + ["random weights"] * len(rows) + ["exported"] * len(rows)
    caption = (
        "First three principal components of the patch tokens after the last block as red, green and blue, fitted over "
        "the slices of a row together: the slice, the same architecture with random weights, the exported teacher."
    )
    return html.figure(_picture_row(pictures, titles, columns=len(rows)), caption)


@torch.inference_mode()
def _patch_map(model: Model, stored: torch.Tensor) -> torch.Tensor:
    return model.get_intermediate_layers(model.preprocess(stored)[None], [model.depth - 1])[0][0]


def _square(stored: NDArray[np.int16]) -> torch.Tensor:
    """Resize a slice to the side that the pictures are made at."""
    image = torch.from_numpy(stored.astype(np.float32))[None, None]
    size = (PCA_SIDE_PX, PCA_SIDE_PX)
    return torch.nn.functional.interpolate(image, size=size, mode="bilinear", antialias=True)[0, 0]


def _windowed(stored: NDArray[np.int16]) -> NDArray[np.uint8]:
    picture: NDArray[np.uint8] = to_picture(torch.from_numpy(stored), "ct").numpy()
    return picture


def _picture_row(pictures: Sequence[NDArray[np.uint8]], titles: Sequence[str], columns: int) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-len(pictures) // columns)
    drawing = Figure(figsize=(2.0 * columns, 2.1 * rows), layout="constrained")
    FigureCanvasAgg(drawing)
    for place, (picture, title) in enumerate(zip(pictures, titles, strict=True), start=1):
        axes: Any = drawing.add_subplot(rows, columns, place)
        axes.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_title(title, fontsize=8)
        axes.axis("off")
    return drawing


def _overlays(results: Path) -> Markup:
    titles = {"exported": "exported model", "random": "random weights"}
    files = [(title, file) for name, title in titles.items() for file in sorted((results / name / "pictures").glob("*.png"))]
    return html.join(*(html.figure(file.read_bytes(), f"{title}: {file.stem}", width_px=1000) for title, file in files))
