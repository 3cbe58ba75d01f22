"""What an evaluation leaves behind: per-case predictions, metrics.json, and tables for reading and for papers."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meddino.core.files import atomic_write, write_json
from meddino_evaluation.classification.config import StatisticsConfig
from meddino_evaluation.metrics.classification import (
    METRICS,
    TaskKind,
    classification_metrics,
    per_class_auroc,
    undefined_notes,
)
from meddino_evaluation.metrics.classification_bootstrap import metric_intervals
from meddino_evaluation.metrics.statistics import mean_and_std

ALL_DATA = "all"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Run:
    """One protocol trained once and tested once.

    Attributes:
        protocol: Its name.
        setting: "all", "shots=4", "fraction=0.1".
        repeat: Number of the split.
        draw: Number of the few-shot draw.
        ids: Test cases.
        patients: Whose they are.
        truth: [n] or [n, labels].
        probabilities: [n, classes].
        chosen: What validation chose.
        candidates: How many were compared.
        train_cases: FittedModel from.
        seconds: Taken.
    """

    protocol: str
    setting: str
    repeat: int
    draw: int
    ids: tuple[str, ...]
    patients: tuple[str, ...]
    truth: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    chosen: Mapping[str, Any]
    candidates: int
    train_cases: int
    seconds: float


def summarise(
    kind: TaskKind, classes: Sequence[str], runs: Sequence[Run], config: StatisticsConfig, seed: int
) -> list[dict[str, Any]]:
    """Return one entry a protocol and setting: every metric with mean and deviation over runs, and an interval over patients.

    Numbers that are undefined are None, with a note.
    """
    entries = []
    for protocol, setting in dict.fromkeys((run.protocol, run.setting) for run in runs):
        own = [run for run in runs if (run.protocol, run.setting) == (protocol, setting)]
        intervals = metric_intervals(
            kind,
            [(run.patients, run.truth, run.probabilities) for run in own],
            resamples=config.resamples,
            level=config.level,
            seed=seed,
        )
        each = [classification_metrics(kind, run.truth, run.probabilities) for run in own]
        metrics = {}
        for name in METRICS[kind]:
            mean, deviation = mean_and_std([values[name] for values in each])
            low, high = intervals[name].low, intervals[name].high
            metrics[name] = {
                "mean": mean,
                "std": deviation,
                "low": low,
                "high": high,
                "runs": [values[name] for values in each],
            }
        by_class = np.array([per_class_auroc(kind, run.truth, run.probabilities) for run in own])
        names = classes[1:] if kind == "binary" else classes
        notes = sorted({note for run in own for note in undefined_notes(kind, run.truth, classes)})
        entries.append(
            finite(
                {
                    "protocol": protocol,
                    "setting": setting,
                    "runs": len(own),
                    "test_patients": len({patient for run in own for patient in run.patients}),
                    "train_cases": mean_and_std([run.train_cases for run in own])[0],
                    "metrics": metrics,
                    "auroc_per_class": {name: mean_and_std(by_class[:, index])[0] for index, name in enumerate(names)},
                    "chosen": [dict(run.chosen) for run in own],
                    "candidates": max(run.candidates for run in own),
                    "seconds": sum(run.seconds for run in own),
                    "notes": notes,
                }
            )
        )
    return entries


def finite(value: Any) -> Any:
    """Replace numbers that JSON does not have (NaN, infinity) by None, everywhere inside."""
    if isinstance(value, Mapping):
        return {str(key): finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


def write_per_case(path: Path, classes: Sequence[str], kind: TaskKind, runs: Sequence[Run]) -> None:
    """Write one row a prediction; every number of metrics.json can be recomputed from it."""
    with atomic_write(path, "w") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        truth_columns = [f"truth_{name}" for name in classes] if kind == "multilabel" else ["truth"]
        header = [
            "protocol",
            "setting",
            "repeat",
            "draw",
            "case",
            "patient",
            *truth_columns,
            *(f"p_{name}" for name in classes),
        ]
        writer.writerow(header)
        for run in runs:
            for place, (case, patient) in enumerate(zip(run.ids, run.patients, strict=True)):
                truth = run.truth[place].tolist() if kind == "multilabel" else [classes[int(run.truth[place])]]
                probabilities = [repr(float(value)) for value in run.probabilities[place]]
                writer.writerow([run.protocol, run.setting, run.repeat, run.draw, case, patient, *truth, *probabilities])


def read_per_case(path: Path, classes: Sequence[str], kind: TaskKind) -> list[Run]:
    """Read what `write_per_case` wrote, without what was chosen and how long it took."""
    grouped: dict[tuple[str, str, int, int], list[dict[str, str]]] = {}
    with path.open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            key = (row["protocol"], row["setting"], int(row["repeat"]), int(row["draw"]))
            grouped.setdefault(key, []).append(row)
    runs = []
    for (protocol, setting, repeat, draw), rows in grouped.items():
        if kind == "multilabel":
            truth = np.array([[int(row[f"truth_{name}"]) for name in classes] for row in rows])
        else:
            truth = np.array([list(classes).index(row["truth"]) for row in rows])
        probabilities = np.array([[float(row[f"p_{name}"]) for name in classes] for row in rows])
        ids, patients = tuple(row["case"] for row in rows), tuple(row["patient"] for row in rows)
        runs.append(Run(protocol, setting, repeat, draw, ids, patients, truth, probabilities, {}, 0, 0, 0.0))
    return runs


def write_metrics(path: Path, values: Mapping[str, Any]) -> None:
    """Write metrics.json."""
    write_json(path, finite(values))
