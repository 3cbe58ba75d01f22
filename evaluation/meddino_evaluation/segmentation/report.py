"""report.html of a segmentation run: the numbers, training curves, and the best, the median and the worst case."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from meddino.core.html import Section, figure, join, key_values, line_chart, page, table, text
from meddino_evaluation.metrics.label_metrics import case_means
from meddino_evaluation.segmentation.experiment import Experiment

METRIC_TITLES = {"dice": "Dice", "iou": "IoU", "nsd": "NSD", "hd95_mm": "HD95 [mm]", "assd_mm": "ASSD [mm]"}


def picture_path(out: Path, fold: int, case: str) -> Path:
    """Return where the overlay of a test case lies."""
    return out / "pictures" / f"fold-{fold}_{case}.png"


def report_html(experiment: Experiment, rows: Sequence[dict[str, Any]], metrics: dict[str, Any], out: Path) -> str:
    """Return the report as one self-contained page."""
    config, test = experiment.config, metrics["test"]
    seeds = ", ".join(str(seed) for seed in config.seeds)
    lead = (
        f"{experiment.source.name} on {experiment.dataset.name}: encoder {config.encoder.mode}, {config.head.name} head, "
        f"{config.training.steps} steps, seeds {seeds}; {test['cases']} test cases."
    )
    sections = [
        Section("Test", join(_leakage(metrics["leakage"]), _summary(test), text(_note(config.metrics.tolerance_mm), "note"))),
        Section("By label", _by(test["by_label"], "label")),
        *([Section("By site", _by(test["by_site"], "site"))] if "by_site" in test else []),
        Section("Best, median and worst case", _pictures(rows, out, config.seeds[0])),
        Section("Training", figure(_curves(out), "Loss of every fold and seed")),
        Section("Settings", key_values(_settings(metrics))),
    ]
    return page(f"Segmentation: {experiment.dataset.name}", lead, sections)


def _leakage(leakage: dict[str, Any]) -> Markup:
    seen = leakage["test_cases_in_pretraining"]
    if seen:
        return text(f"The model has seen these test volumes in pretraining: {', '.join(seen)}.", "warning")
    if leakage["checked"]:
        return text("None of the test volumes is in the corpus that the model was pretrained on.")
    return text("Whether the model has seen the test volumes in pretraining was not checked: give --corpus.", "note")


def _note(tolerance_mm: float) -> str:
    return (
        "Metrics are averaged over the labels of a case, then over cases, for each seed; the table gives mean and standard "
        "deviation over seeds, and a 95 % bootstrap interval over patients. A label that is empty in reference and "
        "prediction is left out; one that is empty in exactly one has Dice, IoU and NSD of 0 and no distance. "
        f"NSD tolerance: {tolerance_mm} mm."
    )


def _summary(test: dict[str, Any]) -> Markup:
    rows = [
        [title, test[name]["mean"], test[name]["std"], _interval(test[name]["interval_95"])]
        for name, title in METRIC_TITLES.items()
    ]
    return table(("metric", "mean", "std over seeds", "95 % over patients"), rows)


def _interval(ends: Sequence[float | None]) -> str | None:
    low, high = ends
    return None if low is None or high is None else f"{low:.3f} to {high:.3f}"


def _by(parts: dict[str, Any], what: str) -> Markup:
    rows = [
        [name or "(none given)", part["cases"], *(part[metric]["mean"] for metric in METRIC_TITLES)]
        for name, part in parts.items()
    ]
    return table((what, "cases", *METRIC_TITLES.values()), rows)


def _pictures(rows: Sequence[dict[str, Any]], out: Path, seed: int) -> Markup:
    dice = case_means([row for row in rows if row["seed"] == seed], "dice")
    fold = {row["case"]: row["fold"] for row in rows}
    order = sorted(dice, key=lambda case: (dice[case], case))
    if not order:
        return text("No test case has a defined Dice.", "note")
    chosen = {"worst": order[0], "median": order[len(order) // 2], "best": order[-1]}
    shown = []
    for kind in ("best", "median", "worst"):
        case = chosen[kind]
        path = picture_path(out, fold[case], case)
        shown.append(figure(path.read_bytes(), f"{kind}: {case}, Dice {dice[case]:.3f} (reference left, prediction right)"))
    return join(*shown)


def _curves(out: Path) -> Any:
    series = {}
    for path in sorted((out / "logs").glob("*.jsonl")):
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        points = [(record["step"], record["loss"]) for record in records if "loss" in record]
        series[path.stem] = ([step for step, _ in points], [loss for _, loss in points])
    return line_chart(series, "", "step", "Dice + cross-entropy loss")


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
        **{key: value if isinstance(value, int | float | str) or value is None else str(value) for key, value in flat.items()},
    }
