"""report.html of a segmentation run: the numbers, training curves, and the best, the median and the worst case."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from meddino.core.html import (
    Cell,
    Section,
    colour_legend,
    columns,
    details,
    figure,
    join,
    key_values,
    page,
    picture_row,
    table,
    text,
)
from meddino.core.html_charts import apart, case_plot, chart, in_columns, png
from meddino.data.intensity import window_text
from meddino_evaluation.metrics.label_metrics import TITLES, case_means
from meddino_evaluation.segmentation.experiment import Experiment


def picture_path(out: Path, fold: int, case: str) -> Path:
    """Return where the overlay of a test case lies."""
    return out / "pictures" / f"fold-{fold}_{case}.png"


def report_html(
    experiment: Experiment, rows: Sequence[dict[str, Any]], metrics: dict[str, Any], out: Path, what: str | None = None
) -> str:
    """Return the report as one self-contained page; `what` says what was trained, in words."""
    config, test = experiment.config, metrics["test"]
    seeds = ", ".join(str(seed) for seed in config.seeds)
    what = what or f"encoder {config.encoder.mode}, {config.head.name} head, {config.training.steps} steps"
    lead = f"{experiment.source.name} on {experiment.dataset.name}: {what}, seeds {seeds}; {test['cases']} test cases."
    sections = [
        Section(
            "Test",
            join(
                _leakage(metrics["leakage"]),
                _failed(metrics["failed"]),
                _noted(metrics["data"]["notes"]),
                _summary(test),
                text(_note(f"{config.metrics.tolerance_mm} {metrics['unit']}"), "note"),
            ),
        ),
        Section("By label", _by_label(test["by_label"])),
        *([Section("By site", _by(test["by_site"], "site"))] if "by_site" in test else []),
        *([Section("Test sets from elsewhere", _external(metrics["external"]))] if metrics["external"] else []),
        Section("Every case", _cases(rows)),
        Section(
            "Best, median and worst case", _pictures(rows, out, config.seeds[0], metrics["data"]["label_colours"], experiment)
        ),
        Section("Training", in_columns([_curves(out)])),
        Section("Settings", details("every key of the recipe", key_values(_settings(metrics)))),
    ]
    return page(f"Segmentation: {experiment.dataset.name}", lead, sections)


def _leakage(leakage: dict[str, Any]) -> Markup:
    seen = leakage["test_cases_in_pretraining"]
    if seen:
        return text(f"The model has seen these test volumes in pretraining: {', '.join(seen)}.", "warning")
    if leakage["checked"]:
        return text(
            "None of the test volumes is, voxel for voxel, in the corpus that the model was pretrained on. Copies in another "
            "guise (resampled, cropped, another kernel) are found by meddino-curate audit CORPUS --against DATASET."
        )
    return text(
        "Whether the model has seen the test volumes in pretraining was not checked: give --corpus, or an export with its "
        "list of training volumes.",
        "note",
    )


def _failed(failed: dict[str, str]) -> Markup:
    if not failed:
        return Markup("")
    return text(f"Left out, because they could not be read: {'; '.join(failed.values())}.", "warning")


def _noted(notes: Sequence[str]) -> Markup:
    return text(f"Of the data: {'; '.join(notes)}.", "warning") if notes else Markup("")


def _external(sets: dict[str, Any]) -> Markup:
    """One row a test set, and below it one a site where sites are named; every network was tested on every case."""
    rows: dict[str, dict[str, Any]] = {}
    warnings = []
    for name, part in sets.items():
        mark = "†" if part["leakage"]["test_cases_in_pretraining"] else ""
        rows[name + mark] = part["test"]
        rows |= {f"{name}, {site or '(no site given)'}": own for site, own in part["test"].get("by_site", {}).items()}
        warnings += [_failed(part["failed"]), _noted(part["notes"])]
    seen = "† the model has seen test volumes of this set in pretraining"
    return join(*warnings, _by(rows, "set"), *([text(seen)] if any("†" in name for name in rows) else []))


def _note(tolerance: str) -> str:
    return (
        "Metrics are averaged over the labels of a case, then over cases, for each seed; the table gives mean and standard "
        "deviation over seeds, and a 95 % bootstrap interval over patients (none for fewer than six: it could not hold). "
        "A label that is empty in reference and "
        "prediction is left out; one that is empty in exactly one has Dice, IoU and NSD of 0 and no distance. "
        f"NSD tolerance: {tolerance}. Volume or area difference: prediction minus reference; error: without its sign."
    )


def _measured(parts: Sequence[dict[str, Any]]) -> list[str]:
    return [metric for metric in TITLES if any(metric in part and part[metric]["mean"] is not None for part in parts)]


def _missing(test: dict[str, Any], measured: Sequence[str]) -> Markup:
    names = [title for metric, title in TITLES.items() if metric in test and metric not in measured]
    if not names:
        return Markup("")
    return text(f"Not here: {', '.join(names)}. metrics.surface=false leaves surfaces out, or no case has a value.")


def _summary(test: dict[str, Any]) -> Markup:
    measured = _measured([test])
    rows = [[TITLES[name], test[name]["mean"], test[name]["std"], _interval(test[name]["interval_95"])] for name in measured]
    dash = "one seed has no deviation; fewer than six patients, or all alike, have no interval that could hold what it says"
    return join(table(("metric", "mean", "std over seeds", "95 % over patients"), rows, dash), _missing(test, measured))


def _interval(ends: Sequence[float | None]) -> str | None:
    low, high = ends
    return None if low is None or high is None else f"{low:.3f} to {high:.3f}"


def _by(parts: dict[str, Any], what: str, pooled: Mapping[str, str] | None = None) -> Markup:
    measured, more = _measured(list(parts.values())), pooled or {}
    rows: list[list[Cell]] = [
        [
            *(name or "(none given)", part["cases"], *(part[metric]["mean"] for metric in measured)),
            *(part["pooled"][metric]["mean"] for metric in more),
        ]
        for name, part in parts.items()
    ]
    header = (what, "cases", *(TITLES[metric] for metric in measured), *more.values())
    return table(header, rows, "no case has a value")


def _by_label(parts: dict[str, Any]) -> Markup:
    note = "Pooled: over the voxels of all cases together, so that large cases count more. Only beside the means over cases."
    return join(_by(parts, "label", {"dice": "pooled Dice", "iou": "pooled IoU"}), text(note))


def _cases(rows: Sequence[dict[str, Any]]) -> Markup:
    """Draw the Dice of every case: over its labels, and of each label where there are several."""
    labels = list(dict.fromkeys(row["label"] for row in rows))
    every = {"mean over labels": _means(rows)} if len(labels) > 1 else {labels[0]: _means(rows)} if labels else {}
    drawn = [("Dice of every test case, mean over seeds", every)]
    if len(labels) > 1:
        drawn.append(
            (
                "Dice of every test case and label, mean over seeds",
                {name: _means([row for row in rows if row["label"] == name]) for name in labels},
            )
        )
    return in_columns([figure(case_plot(kinds, title, "Dice"), alt=title) for title, kinds in drawn if any(kinds.values())])


def _means(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return each case's Dice: over labels, then over seeds."""
    found: dict[str, list[float]] = {}
    for seed in {row["seed"] for row in rows}:
        for case, value in case_means([row for row in rows if row["seed"] == seed], "dice").items():
            found.setdefault(case, []).append(value)
    return {case: sum(values) / len(values) for case, values in found.items()}


def _pictures(
    rows: Sequence[dict[str, Any]], out: Path, seed: int, colours: Mapping[str, Sequence[float]], experiment: Experiment
) -> Markup:
    dice = case_means([row for row in rows if row["seed"] == seed], "dice")
    fold = {row["case"]: row["fold"] for row in rows}
    order = sorted(dice, key=lambda case: (dice[case], case))
    if not order:
        return text("No test case has a defined Dice.", "note")
    shown = []
    for title, case in chosen_cases(order):
        reference, prediction = (png(panel) for panel in apart(picture_path(out, fold[case], case).read_bytes()))
        pictures = [(reference, "reference"), (prediction, f"prediction, Dice {dice[case]:.3f}")]
        shown.append(picture_row(pictures, f"{title}: {case}"))
    return join(text(shown_in(experiment.dataset.modality)), colour_legend(colours), columns(*shown))


def chosen_cases(order: Sequence[str]) -> list[tuple[str, str]]:
    """Return the best, the median and the worst of cases that go from the worst to the best; none comes twice."""
    places = {"best": len(order) - 1, "median": len(order) // 2, "worst": 0}
    by_case: dict[str, list[str]] = {}
    for title, place in places.items():
        by_case.setdefault(order[place], []).append(title)
    if len(order) == 1:
        return [("the only case", order[0])]
    return [(" and ".join(titles), case) for case, titles in by_case.items()]


def shown_in(modality: str) -> str:
    """Return how the grey values of pictures are shown, in words."""
    one = "one slice a case, that with most of the reference"
    if modality == "ct":
        return f"CT in the {window_text()}; {one}."
    return f"Grey values from the slice's 1st to its 99th percentile; {one}."


def _curves(out: Path) -> Markup:
    series = {}
    for path in sorted((out / "logs").glob("*.jsonl")):
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        points = [(record["step"], record["loss"]) for record in records if "loss" in record]
        series[path.stem] = ([step for step, _ in points], [loss for _, loss in points])
    drawn = chart(series, "training loss of every fold and seed", "step", "Dice + cross-entropy loss")
    return drawn or text("No step of the training was logged (training.log_every_steps).")


def _settings(metrics: dict[str, Any]) -> dict[str, Any]:
    flat = {
        f"{section}.{key}": value
        for section, keys in metrics["config"].items()
        if isinstance(keys, dict)
        for key, value in keys.items()
    }
    return {
        "model": metrics["model"]["name"],
        "model hash": metrics["model"]["hash"],
        "data hash": metrics["data"]["hash"],
        "version": metrics["version"],
        "splits": "; ".join(dict.fromkeys(metrics["splits"].values())),
        **{key: value if isinstance(value, int | float | str) or value is None else str(value) for key, value in flat.items()},
    }
