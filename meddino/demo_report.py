"""The demo's last table and its report: read from what the commands left on disk."""

import json
import shlex
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
from meddino.checkpoints.export.model_folder import read_config
from meddino.core import html
from meddino.core.files import write_text
from meddino.core.html_charts import apart, chart, in_columns, png
from meddino.core.logging import console
from meddino.data.corpus import Corpus
from meddino.data.intensity import window_text
from meddino.data.model_input import is_foreground, to_picture
from meddino.models.patch_maps import patch_pca_images, share_of_patch

PCA_SLICES = 4
FIRST_SLICES = (1, 3)  # of them, on the first screen: in the phantom a chest and an abdomen
PCA_SIDE_PX = 256
FEATURES = {"exported": "exported model", "random": "same model, random weights", "pixels": "no model, pixels alone"}
"""Name in the results -> what is read from."""


@dataclass(frozen=True)
class Summary:
    """What the demo showed, in numbers.

    Attributes:
        parameters: Of the exported backbone.
        volumes: Number of volumes by status.
        slices_kept: Slices in the corpus.
        slices_refused: Slices of accepted volumes that were left out.
        losses: (stage, steps, first loss, last loss): means over the first and the last tenth of the steps.
        dice: Result's name to (mean, standard deviation over seeds) of the mean Dice over held-out cases.
        seeds: Seeds behind each Dice.
        probe: Features' name to macro-F1 of labels read from patch tokens, mean and standard deviation over draws; empty where
            there are too few patients for a probe.
        seconds: By the step's name.
    """

    parameters: int
    volumes: Mapping[str, int]
    slices_kept: int
    slices_refused: int
    losses: Sequence[tuple[str, int, float, float]]
    dice: Mapping[str, tuple[float, float]]
    seeds: int
    probe: Mapping[str, tuple[float, float]]
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
    return Summary(
        parameters=read_config(out / "model").weights.parameters,
        volumes=statuses,
        slices_kept=kept,
        slices_refused=_slices_refused(corpus),
        losses=losses,
        dice=dice,
        seeds=len(results["exported"]["test"]["dice"]["by_seed"]),
        probe=_read_probe(out / "results/probe/metrics.json"),
        seconds=seconds,
    )


def _read_probe(path: Path) -> dict[str, tuple[float, float]]:
    models = json.loads(path.read_text())["models"] if path.is_file() else {}
    scores = {name: readouts["chosen"]["macro_f1"] for name, readouts in models.items()}
    return {name: (score["mean"], score["std"] or 0.0) for name, score in scores.items() if score["mean"] is not None}


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
    for name, (mean, spread) in summary.probe.items():
        rows.append((f"macro-F1, {FEATURES[name]}", f"{mean:.3f} ± {spread:.3f} (probe of patch tokens, 16 labelled slices)"))
    for name, (mean, spread) in summary.dice.items():
        rows.append((f"Dice, {FEATURES[name]}", f"{mean:.3f} ± {spread:.3f} ({summary.seeds} seeds, frozen encoder)"))
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
    tokens = _pca_rows(out)
    first = [row for place, row in enumerate(tokens) if place in FIRST_SLICES]
    others = [row for place, row in enumerate(tokens) if place not in FIRST_SLICES]
    words = (
        "Patch tokens of slices: their first three principal components as red, green and blue, over the body alone and fitted "
        f"over all slices together; slices of {PCA_SIDE_PX} px in the {window_text()}."
    )
    told = html.join(_story(summary), html.table(("where to go on", "command"), _next_commands(out)))
    sections = [
        html.Section("What was learnt", html.columns(told, html.join(*first, html.text(words)))),
        html.Section("Predictions on held-out cases", _overlays(out / "results")),
        html.Section("Patch tokens of other slices", html.columns(*others)),
        html.Section("Training", _loss_charts(out / "run")),
        html.Section("Slices kept", _slice_pictures(Corpus(out / "corpus"))),
        html.Section("All numbers", html.table(("", ""), _rows(summary))),
        html.Section("Commands", html.table(("",), [(command,) for command in commands])),
    ]
    lead = "Curation, three-stage pretraining, export and segmentation of one small run."
    write_text(out / "report.html", html.page("MedDINO demo", lead, sections, footer="Made by meddino-demo."))


def _story(summary: Summary) -> Markup:
    """Say what was learnt from what, and how much better it is than the same network with random weights."""
    minutes = sum(summary.seconds.values()) / 60
    learnt = (
        f"A network of {summary.parameters / 1e6:.1f} million parameters learnt from {summary.slices_kept:,} slices of "
        f"{summary.volumes.get('accepted', 0)} volumes, without labels; the whole way took {minutes:.0f} minutes. It was then "
        "frozen and read on patients that it had not seen:"
    )
    rows = []
    for name, title in FEATURES.items():
        scores = [
            None if score is None else f"{score[0]:.3f} ± {score[1]:.3f}"
            for score in (summary.probe.get(name), summary.dice.get(name))
        ]
        if scores != [None, None]:
            rows.append((title, *scores))
    header = ("read from", "macro-F1 of patches", "Dice of a linear head")
    meaning = (
        "Macro-F1: labels of patches, learnt from 16 labelled slices, mean ± SD over draws of them. Dice: mean ± SD over "
        f"{summary.seeds} seeds of the head. A demo has too few patients to say how sure either is: docs/worth.md has more."
    )
    return html.join(html.text(learnt), html.table(header, rows, dash="not measured"), html.text(meaning))


def _next_commands(out: Path) -> list[tuple[str, str]]:
    corpus, model = shlex.quote(str(out / "corpus")), shlex.quote(str(out / "model"))
    return [
        ("your own scans", "meddino-demo --data MY_SCANS --out my_demo"),
        ("an evening of training", f"meddino-pretrain cpu_small --corpus {corpus} --out evening"),
        ("your own labels", f"meddino-eval segment --config minutes --model {model} --data MY_DATASET --out results"),
        ("your own code", f'meddino.load("{out / "model"}").encode_volume("ct.nii.gz")'),
    ]


def _chosen_slices(corpus: Corpus, count: int) -> list[int]:
    """Return rows spread over the corpus, away from the ends of what is kept."""
    return [int((place + 0.5) * len(corpus) / count) for place in range(count)]


def _slice_pictures(corpus: Corpus) -> Markup:
    pictures = [(png(_windowed(corpus.read(row))), "") for row in _chosen_slices(corpus, 12)]
    rows = [html.picture_row(pictures[start : start + 6], width_px=240) for start in range(0, len(pictures), 6)]
    return html.join(html.text(f"Slices of the corpus in the {window_text()}."), *rows)


def _loss_charts(run: Path) -> Markup:
    stages = read_losses(run)
    names = [name for records in stages.values() for record in records[:1] for name in _loss_terms(record)]
    charts = []
    for name in dict.fromkeys(names):
        series, marks, offset = {}, {}, 0
        for stage, records in stages.items():
            points = [(offset + record["step"], record[name]) for record in records if record.get(name) is not None]
            if points:
                series[stage] = ([step for step, _ in points], [value for _, value in points])
            marks[f"start of {stage}"] = float(offset)
            offset += len(records)
        charts.append(chart(series, name, "step", name, marks=marks))
    return in_columns(charts)


def _loss_terms(record: Mapping[str, Any]) -> list[str]:
    """Return the loss and its terms, which a record names first, whatever the method."""
    names = list(record)[1:]
    return names[: next((place for place, name in enumerate(names) if "/" in name), len(names))]


def _pca_rows(out: Path) -> list[Markup]:
    """Return a row of pictures for each chosen slice: the slice, its patch tokens with random weights and of the export."""
    corpus = Corpus(out / "corpus")
    models = {"random weights": load(f"random:{out / 'model'}"), "exported model": load(out / "model")}
    images = [_square(corpus.read(row)) for row in _chosen_slices(corpus, PCA_SLICES)]
    columns = [[(png(to_picture(image, "ct").numpy()), "slice")] for image in images]
    for title, model in models.items():
        maps = [_patch_map(model, image) for image in images]
        body = [share_of_patch(is_foreground(image, "ct"), model.patch_size) >= 0.5 for image in images]
        for column, picture in zip(columns, patch_pca_images(maps, model.patch_size, body), strict=True):
            column.append((png(picture), title))
    return [html.picture_row(column) for column in columns]


@torch.inference_mode()
def _patch_map(model: Model, stored: torch.Tensor) -> torch.Tensor:
    return model.forward_features(model.preprocess(stored)[None]).patch_map[0]


def _square(stored: NDArray[np.int16]) -> torch.Tensor:
    """Resize a slice to the side that the pictures are made at."""
    image = torch.from_numpy(stored.astype(np.float32))[None, None]
    size = (PCA_SIDE_PX, PCA_SIDE_PX)
    return torch.nn.functional.interpolate(image, size=size, mode="bilinear", antialias=True)[0, 0]


def _windowed(stored: NDArray[np.int16]) -> NDArray[np.uint8]:
    picture: NDArray[np.uint8] = to_picture(torch.from_numpy(stored), "ct").numpy()
    return picture


def _overlays(results: Path) -> Markup:
    """A row a case: the reference, then what each model predicts."""
    titles = {"exported": "exported model", "random": "random weights"}
    colours = json.loads((results / "exported" / "metrics.json").read_text())["data"]["label_colours"]
    words = f"Labels over CT in the {window_text()}: one slice a case, that with most of the reference."
    rows = [html.text(words), html.colour_legend(colours)]
    for file in sorted((results / "exported" / "pictures").glob("*.png")):
        found = {title: results / name / "pictures" / file.name for name, title in titles.items()}
        panels = [(title, apart(path.read_bytes())) for title, path in found.items() if path.is_file()]
        pictures = [(png(panels[0][1][0]), "reference"), *((png(pair[1]), title) for title, pair in panels)]
        rows.append(html.picture_row(pictures, file.stem.partition("_")[2]))  # without the fold
    return html.join(*rows)
