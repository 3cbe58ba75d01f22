"""The models of a study against the first one, on the same cases, over patients."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meddino_evaluation.backbones.load import model_name
from meddino_evaluation.classification.results import Run, read_per_case
from meddino_evaluation.metrics.classification_bootstrap import paired_metric
from meddino_evaluation.metrics.delong import delong
from meddino_evaluation.metrics.statistics import PairedResult, can_be_significant, wilcoxon_signed_rank
from meddino_evaluation.study.classification_jobs import ClassificationJob
from meddino_evaluation.study.config import StudyConfig

Found = Sequence[tuple[ClassificationJob, dict[str, Any]]]
"""Finished jobs with the content of their metrics.json."""


@dataclass(frozen=True)
class Comparison:
    """One model against the reference, on one data set under one protocol.

    Attributes:
        data: Name of the data set.
        protocol: Its name.
        setting: "all", or of few-shot.
        model: Its short name.
        reference: That of the study's first model.
        metric: What is compared.
        result: Difference, interval and permutation test.
        wilcoxon: p of the signed ranks of the patients.
        delong: p of DeLong's test; NaN where it does not apply.
    """

    data: str
    protocol: str
    setting: str
    model: str
    reference: str
    metric: str
    result: PairedResult
    wilcoxon: float
    delong: float


def compare_with_first(config: StudyConfig, found: Found, out: Path) -> list[Comparison]:
    """Compare every model with the first, on the same cases, over patients: permutations, Wilcoxon, DeLong."""
    groups: dict[tuple[str, str, str], list[tuple[ClassificationJob, dict[str, Any]]]] = {}
    for job, content in found:
        for entry in content["results"]:
            groups.setdefault((content["data"]["name"], entry["protocol"], entry["setting"]), []).append((job, content))
    compared = []
    for (data, protocol, setting), (reference, *others) in groups.items():
        for other in others:
            tests = _paired(config, reference, other, protocol, setting, out)
            if tests is not None:
                metric, result, rank, p_delong = tests
                names = (model_name(other[0].model), model_name(reference[0].model))
                compared.append(Comparison(data, protocol, setting, *names, metric, result, rank, p_delong))
    return compared


def _paired(
    config: StudyConfig,
    reference: tuple[ClassificationJob, dict[str, Any]],
    other: tuple[ClassificationJob, dict[str, Any]],
    protocol: str,
    setting: str,
    out: Path,
) -> tuple[str, PairedResult, float, float] | None:
    kind, classes = reference[1]["data"]["task"], reference[1]["data"]["classes"]
    runs = []
    for job, _ in (other, reference):
        every = read_per_case(out / "jobs" / job.folder / "per_case.csv", classes, kind)
        runs.append([run for run in every if (run.protocol, run.setting) == (protocol, setting)])
    if [(run.repeat, run.draw, run.ids) for run in runs[0]] != [(run.repeat, run.draw, run.ids) for run in runs[1]]:
        return None  # not the same test cases: nothing to pair
    metric = plot_metric(config, kind)
    settings = config.evaluation.statistics
    result = paired_metric(
        kind,
        [(run.patients, run.truth, run.probabilities) for run in runs[0]],
        [(run.patients, run.truth, run.probabilities) for run in runs[1]],
        metric,
        resamples=settings.resamples,
        level=settings.level,
        seed=config.evaluation.split.seed,
    )
    rank = wilcoxon_signed_rank(*(_by_patient(kind, one) for one in runs), level=settings.level)
    return metric, result, rank, _delong(kind, runs[0], runs[1], settings.level)


def plot_metric(config: StudyConfig, kind: str) -> str:
    """Return the metric that plots and tests look at."""
    if config.metric != "auto":
        return config.metric
    return "kappa" if kind == "ordinal" else "auroc"


def _by_patient(kind: str, runs: Sequence[Run]) -> NDArray[np.float64]:
    """Return each patient's mean probability of the truth, over cases and runs."""
    values: dict[str, list[float]] = {}
    for run in runs:
        for place, patient in enumerate(run.patients):
            if kind == "multilabel":
                known = run.truth[place] != -1
                right = np.where(run.truth[place] == 1, run.probabilities[place], 1 - run.probabilities[place])
                values.setdefault(patient, []).extend(right[known].tolist())
            else:
                values.setdefault(patient, []).append(float(run.probabilities[place, run.truth[place]]))
    return np.array([np.mean(values[patient]) if values[patient] else np.nan for patient in sorted(values)])


def _delong(kind: str, runs_a: Sequence[Run], runs_b: Sequence[Run], level: float) -> float:
    """Return DeLong's p value for a binary task whose patients have one label each; else NaN: rows would not be independent.

    Also NaN with fewer patients than any test needs to reach 1 - level.
    """
    if kind != "binary":
        return math.nan
    labels: dict[str, set[int]] = {}
    scores: tuple[dict[str, list[float]], dict[str, list[float]]] = ({}, {})
    for side, runs in enumerate((runs_a, runs_b)):
        for run in runs:
            for place, patient in enumerate(run.patients):
                labels.setdefault(patient, set()).add(int(run.truth[place]))
                scores[side].setdefault(patient, []).append(float(run.probabilities[place, 1]))
    single = sorted(patient for patient, found in labels.items() if len(found) == 1)
    truth = [next(iter(labels[patient])) for patient in single]
    if len(single) < len(labels) or not can_be_significant(len(single), level) or min(truth.count(0), truth.count(1)) < 2:
        return math.nan
    means = [[float(np.mean(side[patient])) for patient in single] for side in scores]
    return delong(truth, means[0], means[1]).p_value
