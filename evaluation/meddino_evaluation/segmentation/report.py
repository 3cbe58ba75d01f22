"""report.html of a segmentation run: the numbers, training curves, and the best, the median and the worst case."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from meddino.core.html import Section, figure, join, key_values, line_chart, page, table, text
from meddino_evaluation.metrics.label_metrics import case_means
from meddino_evaluation.segmentation.experiment import Experiment

METRIC_TITLES = {
    "dice": "Dice",
    "iou": "IoU",
    "nsd": "NSD",
    "hd95_mm": "HD95 [mm]",
    "assd_mm": "ASSD [mm]",
    "volume_difference_ml": "volume difference [ml]",
    "volume_error_ml": "volume error [ml]",
}


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
        Section(
            "Test",
            join(
                _leakage(metrics["leakage"]),
                _failed(metrics["failed"]),
                _summary(test),
                text(_note(config.metrics.tolerance_mm), "note"),
            ),
        ),
        Section("By label", join(_by(test["by_label"], "label"), _pooled(test["by_label"]))),
        *([Section("By site", _by(test["by_site"], "site"))] if "by_site" in test else []),
        *([Section("Test sets from elsewhere", _external(metrics["external"]))] if metrics["external"] else []),
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


def _external(sets: dict[str, Any]) -> Markup:
    """One row a test set, and below it one a site where sites are named; every network was tested on every case."""
    rows: list[list[Any]] = []
    warnings = []
    for name, part in sets.items():
        mark = "†" if part["leakage"]["test_cases_in_pretraining"] else ""
        sites = part["test"].get("by_site", {})
        rows.append([name + mark, part["test"]["cases"], *(part["test"][metric]["mean"] for metric in METRIC_TITLES)])
        for site, own in sites.items():
            label = f"{name}, {site or '(no site given)'}"
            rows.append([label, own["cases"], *(own[metric]["mean"] for metric in METRIC_TITLES)])
        warnings.append(_failed(part["failed"]))
    return join(*warnings, table(("set", "cases", *METRIC_TITLES.values()), rows))


def _note(tolerance_mm: float) -> str:
    return (
        "Metrics are averaged over the labels of a case, then over cases, for each seed; the table gives mean and standard "
        "deviation over seeds, and a 95 % bootstrap interval over patients (none for fewer than six: it could not hold). "
        "A label that is empty in reference and "
        "prediction is left out; one that is empty in exactly one has Dice, IoU and NSD of 0 and no distance. "
        f"NSD tolerance: {tolerance_mm} mm. Volume difference: prediction minus reference; volume error: without its sign."
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


def _pooled(parts: dict[str, Any]) -> Markup:
    rows = [[name, part["pooled"]["dice"]["mean"], part["pooled"]["iou"]["mean"]] for name, part in parts.items()]
    note = "Pooled: over the voxels of all cases together, so that large cases count more. Only beside the means over cases."
    return join(table(("label", "pooled Dice", "pooled IoU"), rows), text(note, "note"))


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
        "splits": "; ".join(dict.fromkeys(metrics["splits"].values())),
        **{key: value if isinstance(value, int | float | str) or value is None else str(value) for key, value in flat.items()},
    }
