"""Classification metrics of thousands of resamples at once: a resample is a row of weights, so nothing is sorted twice."""

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from meddino_evaluation.metrics.classification import (
    METRICS,
    UNKNOWN,
    Probabilities,
    TaskKind,
    Truth,
    classification_metric,
    from_confusion,
    quadratic_kappa,
)
from meddino_evaluation.metrics.statistics import Interval, PairedResult, Resampling, exchanges

Weights = NDArray[np.int64]
Drawn = NDArray[np.float64]
_CHUNK = 250
_ECE_BINS = 15

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
    return {name: drawing.interval(*_over_runs(name, kind, runs, weights)) for name in names or METRICS[kind]}


def resampled_metric(name: str, kind: TaskKind, truth: Truth, probabilities: Probabilities, weights: Weights) -> Drawn:
    """Return a metric for each row of weights [R, n]: how often each case occurs in each resample. NaN where undefined."""
    parts = [weights[start : start + _CHUNK] for start in range(0, len(weights), _CHUNK)]
    return np.concatenate([_metric(name, kind, truth, probabilities, part.astype(np.float64)) for part in parts])


def _metric(name: str, kind: TaskKind, truth: Truth, probabilities: Probabilities, weights: Drawn) -> Drawn:
    classes = probabilities.shape[1]
    if kind == "multilabel":
        columns = []
        for label in range(classes):
            known = truth[:, label] != UNKNOWN
            columns.append(_one_label(name, truth[known, label] == 1, probabilities[known, label], weights[:, known]))
        return _nanmean(np.stack(columns))
    if name in ("auroc", "auprc"):
        curve = _auroc if name == "auroc" else _average_precision
        wanted = [1] if kind == "binary" else list(range(classes))
        return _nanmean(np.stack([curve(truth == one, probabilities[:, one], weights) for one in wanted]))
    total = weights.sum(1)
    if name == "brier":
        error = ((probabilities - np.eye(classes)[truth]) ** 2).sum(1) / (2 if classes == 2 else 1)
        return _divided(weights @ error, total)
    if name == "log_loss":
        chosen = probabilities[np.arange(len(truth)), truth]
        return _divided(weights @ -np.log(np.clip(chosen, np.finfo(np.float64).eps, 1.0)), total)
    predicted = probabilities.argmax(1)
    if name == "ece":
        return _calibration((predicted == truth).astype(np.float64), probabilities.max(1), weights)
    cells = np.zeros((len(truth), classes * classes))
    cells[np.arange(len(truth)), truth * classes + predicted] = 1.0
    tables = (weights @ cells).reshape(-1, classes, classes)
    with np.errstate(divide="ignore", invalid="ignore"):
        return quadratic_kappa(tables) if name == "kappa" else from_confusion(name, tables)


def _one_label(name: str, positive: NDArray[np.bool_], scores: Drawn, weights: Drawn) -> Drawn:
    target, total = positive.astype(np.float64), weights.sum(1)
    if name == "auroc":
        return _auroc(positive, scores, weights)
    if name == "auprc":
        return _average_precision(positive, scores, weights)
    if name == "ece":
        return _calibration(target, scores, weights)
    if name == "f1":
        predicted = (scores >= 0.5).astype(np.float64)
        found = weights @ (predicted + target)
        return np.where(
            total > 0, np.divide(2 * (weights @ (predicted * target)), found, out=np.zeros_like(found), where=found > 0), np.nan
        )
    chosen = np.clip(np.where(positive, scores, 1 - scores), np.finfo(np.float64).eps, 1.0)
    each = {
        "brier": (scores - target) ** 2,
        "log_loss": -np.log(chosen),
        "accuracy": ((scores >= 0.5) == positive).astype(np.float64),
    }[name]
    return _divided(weights @ each, total)


def _auroc(positive: NDArray[np.bool_], scores: Drawn, weights: Drawn) -> Drawn:
    order = np.argsort(scores, kind="stable")
    weight, hit = weights[:, order], positive[order]
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) != 0])
    positives = np.add.reduceat(weight * hit, starts, axis=1)  # [R, distinct scores]
    negatives = np.add.reduceat(weight * ~hit, starts, axis=1)
    below = np.cumsum(negatives, axis=1) - negatives
    wins = (positives * (below + negatives / 2)).sum(1)
    return _divided(wins, positives.sum(1) * negatives.sum(1))


def _average_precision(positive: NDArray[np.bool_], scores: Drawn, weights: Drawn) -> Drawn:
    order = np.argsort(-scores, kind="stable")
    weight, hit = weights[:, order], positive[order]
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) != 0])
    positives = np.add.reduceat(weight * hit, starts, axis=1)
    every = np.cumsum(np.add.reduceat(weight, starts, axis=1), axis=1)
    precision = np.divide(np.cumsum(positives, axis=1), every, out=np.zeros_like(every), where=every > 0)
    total = positives.sum(1)
    value = _divided((precision * positives).sum(1), total)
    return np.where(total < weights.sum(1), value, np.nan)


def _calibration(correct: Drawn, confidence: Drawn, weights: Drawn) -> Drawn:
    number = np.clip(np.ceil(confidence * _ECE_BINS).astype(int) - 1, 0, _ECE_BINS - 1)
    gaps = np.zeros((len(confidence), _ECE_BINS))
    gaps[np.arange(len(confidence)), number] = correct - confidence
    return _divided(np.abs(weights @ gaps).sum(1), weights.sum(1))


def _divided(top: Drawn, bottom: Drawn) -> Drawn:
    return np.divide(top, bottom, out=np.full_like(bottom, np.nan), where=bottom > 0)


def _nanmean(values: Drawn) -> Drawn:
    """Mean over the first axis without NaN; NaN where all are."""
    known = ~np.isnan(values)
    return _divided(np.where(known, values, 0.0).sum(0), known.sum(0).astype(np.float64))


def _patients(runs: Runs) -> tuple[int, list[Hashable]]:
    patients = [patient for groups, _, _ in runs for patient in groups]
    return len(patients), patients


def _over_runs(name: str, kind: TaskKind, runs: Runs, weights: Weights) -> tuple[float, Drawn]:
    """Return the mean over runs of a metric, and of each resample; `weights` holds the rows of all runs side by side."""
    estimates, drawn, start = [], [], 0
    for groups, truth, probabilities in runs:
        own = weights[:, start : start + len(groups)]
        estimates.append(classification_metric(name, kind, truth, probabilities))
        drawn.append(resampled_metric(name, kind, truth, probabilities, own))
        start += len(groups)
    return float(_nanmean(np.array(estimates)[:, None])[0]), _nanmean(np.stack(drawn))


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


def _exchanged(name: str, kind: TaskKind, both: tuple[Runs, Runs], exchanged: NDArray[np.bool_]) -> Drawn:
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
    return _nanmean(np.stack(differences))
