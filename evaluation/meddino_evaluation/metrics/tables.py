"""Rows of cases.csv: written, and summarised over labels, cases, seeds and patients."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meddino.core.files import atomic_write
from meddino_evaluation.metrics.label_metrics import AVERAGED, case_means, mean_over_cases, pooled_overlap
from meddino_evaluation.metrics.statistics import bootstrap_mean, mean_and_std

IN_PIXELS = {
    "hd95_mm": ("hd95_px", 1.0),
    "assd_mm": ("assd_px", 1.0),
    "volume_ml_pred": ("area_px_pred", 1000.0),
    "volume_ml_ref": ("area_px_ref", 1000.0),
    "volume_difference_ml": ("area_difference_px", 1000.0),
    "volume_error_ml": ("area_error_px", 1000.0),
}
"""What a number of a picture is called, whose pixels are cubes of side 1 to the metrics, and by what it is multiplied."""


def in_pixels(content: Any, factor: float = 1.0) -> Any:
    """Return rows or summaries of pictures under the names and in the units of pixels."""
    if isinstance(content, dict):
        named = {key: IN_PIXELS.get(key, (key, factor)) for key in content}
        return {name: in_pixels(content[key], scale) for key, (name, scale) in named.items()}
    if isinstance(content, list):
        return [in_pixels(one, factor) for one in content]
    return content * factor if isinstance(content, float) else content


def write_cases(path: Path, rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    """Write rows as CSV; an undefined number is an empty cell."""
    with atomic_write(path, "w") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(columns), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: _cell(row[key]) for key in columns})


def summarise(rows: Sequence[dict[str, Any]], resamples: int) -> dict[str, Any]:
    """Summarise rows of several seeds.

    Args:
        rows: Columns of cases.csv.
        resamples: For the bootstrap over patients.

    Returns:
        For each metric the mean over seeds of (labels of a case, then cases), its standard deviation over seeds, an
        interval over patients of the seeds' average, the same by label and by site; null where nothing is defined.
        "pooled" stands beside each label: Dice and IoU over the voxels of all cases together.
    """
    rows = [{**row, "volume_error_ml": abs(row["volume_difference_ml"])} for row in rows]
    seeds = sorted({row["seed"] for row in rows})
    summary: dict[str, Any] = {"cases": len({row["case"] for row in rows}), "seeds": seeds}
    for metric in AVERAGED:
        by_seed = [mean_over_cases([row for row in rows if row["seed"] == seed], metric)[0] for seed in seeds]
        summary[metric] = {**_spread(by_seed), "by_seed": [finite_or_none(value) for value in by_seed]}
        summary[metric]["interval_95"] = patient_interval(rows, metric, resamples)
    for key in ("label", "site"):
        names = list(dict.fromkeys(row[key] for row in rows))
        if key == "site" and names == [""]:
            continue
        summary[f"by_{key}"] = {name: _of_part([row for row in rows if row[key] == name], seeds) for name in names}
    for name, part in summary["by_label"].items():
        pooled = [pooled_overlap([row for row in rows if row["label"] == name and row["seed"] == seed]) for seed in seeds]
        part["pooled"] = {metric: _spread([one[metric] for one in pooled]) for metric in ("dice", "iou")}
    return summary


def patient_interval(rows: Sequence[dict[str, Any]], metric: str, resamples: int) -> list[float | None]:
    """Return the 95 % bootstrap interval, over patients, of the mean over cases; seeds are averaged within a case first."""
    patient = {row["case"]: row["patient"] for row in rows}
    by_case: dict[str, list[float]] = {}
    for seed in sorted({row["seed"] for row in rows}):
        for case, value in case_means([row for row in rows if row["seed"] == seed], metric).items():
            by_case.setdefault(case, []).append(value)
    if not by_case:
        return [None, None]
    values = [sum(found) / len(found) for found in by_case.values()]
    interval = bootstrap_mean(values, groups=[patient[case] for case in by_case], span=AVERAGED[metric], resamples=resamples)
    return [finite_or_none(interval.low), finite_or_none(interval.high)]


def _of_part(rows: Sequence[dict[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
    part: dict[str, Any] = {"cases": len({row["case"] for row in rows if math.isfinite(row["dice"])})}
    for metric in AVERAGED:
        part[metric] = _spread([mean_over_cases([row for row in rows if row["seed"] == seed], metric)[0] for seed in seeds])
    return part


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    defined = [value for value in values if math.isfinite(value)]
    if not defined:
        return {"mean": None, "std": None}
    mean, std = mean_and_std(defined)
    return {"mean": finite_or_none(mean), "std": finite_or_none(std)}


def finite_or_none(value: float) -> float | None:
    """Return a number as JSON holds it, which has no NaN and no infinity."""
    return float(value) if math.isfinite(value) else None


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else ""
    return value
