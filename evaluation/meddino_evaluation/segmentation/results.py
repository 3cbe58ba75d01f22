"""Results on disk: cases.csv, metrics.json, report.html with overlays."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import meddino
from meddino.core.files import atomic_write, write_json, write_text
from meddino_evaluation.metrics.label_metrics import METRICS, LabelRow, case_means, mean_over_cases
from meddino_evaluation.segmentation.experiment import Experiment
from meddino_evaluation.segmentation.report import report_html
from meddino_evaluation.statistics import bootstrap_mean, mean_and_std

AVERAGED = ("dice", "iou", "nsd", "hd95_mm", "assd_mm")


@dataclass(frozen=True)
class TestRow:
    """One line of cases.csv.

    Attributes:
        fold: Fold whose test part holds the case.
        seed: Seed of the network.
        patient: Who it is, for resampling patients.
        site: Hospital or scanner, or "".
        row: The metrics.
    """

    fold: int
    seed: int
    patient: str
    site: str
    row: LabelRow

    def values(self) -> dict[str, Any]:
        """Return all columns."""
        return {**self.row.values(), "fold": self.fold, "seed": self.seed, "patient": self.patient, "site": self.site}


COLUMNS = ("case", "label", *METRICS, "fold", "seed", "patient", "site")


def write_results(experiment: Experiment, rows: Sequence[TestRow], out: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """Write cases.csv, metrics.json and report.html.

    Args:
        experiment: What was run.
        rows: One a case, label and seed.
        out: Folder of the results.
        seconds: Time of each phase.

    Returns:
        The content of metrics.json.
    """
    plain = [row.values() for row in rows]
    write_cases(out / "cases.csv", plain, COLUMNS)
    metrics = {
        "format": "meddino-segmentation",
        "version": meddino.__version__,
        "model": {"name": experiment.source.name, "hash": experiment.source.model_hash, "lineage": experiment.source.lineage},
        "data": {
            "name": experiment.dataset.name,
            "hash": experiment.dataset.data_hash([*experiment.dataset.cases, *experiment.dataset.test_cases]),
            "cases": len(experiment.dataset.cases),
            "labels": list(experiment.dataset.labels.names),
        },
        "config": experiment.config.model_dump(mode="json"),
        "seconds": {phase: round(time, 2) for phase, time in seconds.items()},
        "rule_for_empty_labels": "both empty: left out; one empty: Dice, IoU and NSD are 0, distances are left out",
        "test": summarise(plain, experiment.config.metrics.bootstrap),
    }
    write_json(out / "metrics.json", metrics)
    write_text(out / "report.html", report_html(experiment, plain, metrics, out))
    return metrics


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
    """
    seeds = sorted({row["seed"] for row in rows})
    summary: dict[str, Any] = {"cases": len({row["case"] for row in rows}), "seeds": seeds}
    for metric in AVERAGED:
        by_seed = [mean_over_cases([row for row in rows if row["seed"] == seed], metric)[0] for seed in seeds]
        summary[metric] = {**_spread(by_seed), "by_seed": [_number(value) for value in by_seed]}
        summary[metric]["interval_95"] = patient_interval(rows, metric, resamples)
    for key in ("label", "site"):
        names = list(dict.fromkeys(row[key] for row in rows))
        if key == "site" and names == [""]:
            continue
        summary[f"by_{key}"] = {name: _of_part([row for row in rows if row[key] == name], seeds) for name in names}
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
    interval = bootstrap_mean(values, groups=[patient[case] for case in by_case], resamples=resamples)
    return [_number(interval.low), _number(interval.high)]


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
    return {"mean": _number(mean), "std": _number(std)}


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else ""
    return value
