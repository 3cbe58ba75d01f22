"""Intervals and paired comparisons of classification metrics, by the bootstrap over patients."""

from collections.abc import Hashable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from meddino_evaluation.metrics.classification import (
    METRICS,
    SPANS,
    Numbers,
    Probabilities,
    TaskKind,
    Truth,
    Weights,
    classification_metric,
    mean_of_defined,
    resampled_metric,
)
from meddino_evaluation.metrics.statistics import Interval, PairedResult, Resampling, exchanges

Runs = Sequence[tuple[Sequence[Hashable], Truth, Probabilities]]
"""For each run the patient, the truth and the probabilities of each test case."""


def metric_intervals(
    kind: TaskKind,
    runs: Runs,
    *,
    names: Sequence[str] | None = None,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Return every metric with its interval, over one run or several on (partly) the same patients.

    With several runs (repeats of a split, draws of few-shot patients) the estimate is the mean of the runs' metrics. One
    resample draws patients and takes all their cases in all runs: a patient who is tested five times still counts as one.

    Args:
        kind: Kind of task.
        runs: See `Runs`.
        names: Metrics; all of the task if None.
        resamples: How many.
        level: Confidence level.
        seed: Equal seeds draw equal resamples.
    """
    drawing = Resampling(*_patients(runs), level=level, resamples=resamples, seed=seed)
    weights = drawing.weights()
    found = {name: drawing.interval(*_over_runs(name, kind, runs, weights), SPANS[name]) for name in names or METRICS[kind]}
    if "ece" in found:
        found["ece"] = replace(found["ece"], low=float(np.maximum(found["ece"].low, 0.0)))  # NaN stays
    return found


def _patients(runs: Runs) -> tuple[int, list[Hashable]]:
    patients = [patient for groups, _, _ in runs for patient in groups]
    return len(patients), patients


def _over_runs(name: str, kind: TaskKind, runs: Runs, weights: Weights) -> tuple[float, Numbers]:
    """Return the mean over runs of a metric, and of each resample; `weights` holds the rows of all runs side by side."""
    estimates, drawn, start = [], [], 0
    for groups, truth, probabilities in runs:
        own = weights[:, start : start + len(groups)]
        estimates.append(classification_metric(name, kind, truth, probabilities))
        drawn.append(resampled_metric(name, kind, truth, probabilities, own))
        start += len(groups)
    return float(mean_of_defined(np.array(estimates)[:, None])[0]), mean_of_defined(np.stack(drawn))


def paired_metric(
    kind: TaskKind,
    runs_a: Runs,
    runs_b: Runs,
    name: str,
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> PairedResult:
    """Compare a metric of two models on the same cases: bootstrap interval and permutation test, both over patients.

    The test exchanges the two models' probabilities in whole patients. For metrics of order (AUROC, AUPRC) ranks are exchanged
    instead: they see no scale, and two scales mixed would.

    Args:
        kind: Kind of task.
        runs_a: Of the first model.
        runs_b: Of the second: the same runs with the same cases in the same order.
        name: Metric.
        resamples: How many; also the number of permutations where not all are tried.
        level: Confidence level.
        seed: Equal seeds draw equal resamples and permutations.

    Source: Bandos et al. 2005 (exchange of ranks for AUROC).
    """
    drawing = Resampling(*_patients(runs_a), level=level, resamples=resamples, seed=seed)
    weights = drawing.weights()
    (first, drawn_first), (second, drawn_second) = (_over_runs(name, kind, runs, weights) for runs in (runs_a, runs_b))
    owners = drawing.owners()
    exchanged, all_tried = exchanges(int(owners.max()) + 1, resamples, seed)
    permuted = _exchanged(name, kind, (runs_a, runs_b), exchanged[:, owners])
    return drawing.paired(first - second, drawn_first - drawn_second, permuted, all_tried)


def _exchanged(name: str, kind: TaskKind, both: tuple[Runs, Runs], exchanged: NDArray[np.bool_]) -> Numbers:
    """Return the difference of two models [ways] after they changed places in the rows [ways, rows] that are true."""
    differences, start = [], 0
    for (groups, truth, first), (_, _, second) in zip(*both, strict=True):
        moved = exchanged[:, start : start + len(groups)]
        columns = [rankdata(one, axis=0) if name in ("auroc", "auprc") else one for one in (first, second)]
        # Both models' rows one under the other: a model is a choice of one of each two, which is a row of weights.
        sides = [np.concatenate([~taken, taken], axis=1).astype(np.int64) for taken in (moved, ~moved)]
        rows = np.concatenate([truth, truth]), np.concatenate(columns)
        values = [resampled_metric(name, kind, *rows, weights) for weights in sides]
        differences.append(values[0] - values[1])
        start += len(groups)
    return mean_of_defined(np.stack(differences))
