"""Classification metrics of thousands of resamples at once: a resample is a row of weights, so nothing is sorted twice."""

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from meddino_evaluation.classification_metrics import (
    METRICS,
    UNKNOWN,
    Probabilities,
    TaskKind,
    Truth,
    classification_metric,
    from_confusion,
    quadratic_kappa,
)
from meddino_evaluation.statistics import Interval, PairedResult, paired_result, percentile_ends, resample_weights

Weights = NDArray[np.int64]
Drawn = NDArray[np.float64]
_CHUNK = 250
_ECE_BINS = 15


def metric_intervals(
    kind: TaskKind,
    runs: Sequence[tuple[Sequence[Hashable], Truth, Probabilities]],
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
        runs: For each run the patient, the truth and the probabilities of each test case.
        names: Metrics; all of the task if None.
        resamples: How many.
        level: Confidence level.
        seed: Equal seeds draw equal resamples.
    """
    wanted = list(names or METRICS[kind])
    patients = [patient for groups, _, _ in runs for patient in groups]
    weights = resample_weights(patients, resamples, seed)
    ends = np.cumsum([len(groups) for groups, _, _ in runs])
    drawn: dict[str, list[Drawn]] = {name: [] for name in wanted}
    for (groups, truth, probabilities), end in zip(runs, ends, strict=True):
        own = weights[:, end - len(groups) : end]
        for name in wanted:
            drawn[name].append(resampled_metric(name, kind, truth, probabilities, own))
    result = {}
    for name in wanted:
        estimate = _mean([classification_metric(name, kind, truth, probabilities) for _, truth, probabilities in runs])
        values = _nanmean(np.stack(drawn[name]))
        low, high, defined = percentile_ends(values, level, len(set(patients)))
        result[name] = Interval(estimate, low, high, level, defined)
    return result


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


def _mean(values: Sequence[float]) -> float:
    return float(_nanmean(np.array(values)[:, None])[0])


def paired_metric(
    kind: TaskKind,
    runs_a: Sequence[tuple[Sequence[Hashable], Truth, Probabilities]],
    runs_b: Sequence[tuple[Sequence[Hashable], Truth, Probabilities]],
    name: str,
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> PairedResult:
    """Compare a metric of two models on the same cases by the paired bootstrap over patients; see `metric_intervals`.

    Args:
        kind: Kind of task.
        runs_a: Of the first model.
        runs_b: Of the second: the same runs with the same cases in the same order.
        name: Metric.
        resamples: How many.
        level: Confidence level.
        seed: Equal seeds draw equal resamples.
    """
    patients = [patient for groups, _, _ in runs_a for patient in groups]
    weights = resample_weights(patients, resamples, seed)
    ends = np.cumsum([len(groups) for groups, _, _ in runs_a])
    drawn, estimates = [], []
    for runs in (runs_a, runs_b):
        own = [weights[:, end - len(groups) : end] for (groups, _, _), end in zip(runs, ends, strict=True)]
        parts = [resampled_metric(name, kind, truth, p, part) for (_, truth, p), part in zip(runs, own, strict=True)]
        drawn.append(_nanmean(np.stack(parts)))
        estimates.append(_mean([classification_metric(name, kind, truth, p) for _, truth, p in runs]))
    return paired_result(estimates[0] - estimates[1], drawn[0] - drawn[1], level, len(set(patients)))
