"""Classification metrics of thousands of resamples at once; the tests hold them to scikit-learn within 1e-6.

`truth` is [n] class numbers (binary, multi-class, ordinal) or [n, labels] of 0, 1 and -1 for "not known" (multi-label);
`probabilities` is [n, classes] that sum to 1, or [n, labels] of independent probabilities. A resample is a row of weights
(how often each case occurs in it), so nothing is sorted twice; the plain metric is the resample in which each case occurs once.
A metric that is undefined (a class without positives) is NaN, and `undefined_notes` says why.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from meddino_evaluation.metrics.statistics import NOT_NEGATIVE, SHARE, UNBOUNDED, Span

TaskKind = Literal["binary", "multiclass", "multilabel", "ordinal"]
Truth = NDArray[np.int64]
Probabilities = NDArray[np.float64]
Weights = NDArray[np.int64]
Numbers = NDArray[np.float64]

_ONE_LABEL = ("accuracy", "balanced_accuracy", "precision", "recall", "f1", "brier", "ece", "log_loss")
METRICS: dict[TaskKind, tuple[str, ...]] = {
    "binary": ("auroc", "auprc", *_ONE_LABEL),
    "multiclass": ("auroc", "auprc", *_ONE_LABEL),
    "ordinal": ("kappa", "auroc", "auprc", *_ONE_LABEL),
    "multilabel": ("auroc", "auprc", "accuracy", "f1", "brier", "ece", "log_loss"),
}
"""What is reported for each kind of task; precision, recall and F1 are weighted by class size."""

SPANS: dict[str, Span] = {
    **dict.fromkeys(("auroc", "auprc", "accuracy", "balanced_accuracy", "precision", "recall", "f1"), SHARE),
    **dict.fromkeys(("brier", "log_loss"), NOT_NEGATIVE),
    "kappa": (-1.0, 1.0),
    "ece": UNBOUNDED,
}
"""What the values of each can be. A calibration error is a sum of distances: near 0 its log odds say nothing (0.03 would have
an interval from 0 to 0.95), so its interval is plain, and cut at 0."""

LOWER_IS_BETTER = frozenset({"brier", "ece", "log_loss"})
UNKNOWN = -1
ECE_BINS = 15
"""Equal-width bins of confidence in the expected calibration error; 15 as in Guo et al. 2017."""
_CHUNK = 250


def resampled_metric(name: str, kind: TaskKind, truth: Truth, probabilities: Probabilities, weights: Weights) -> Numbers:
    """Return a metric in each resample; NaN where it is undefined.

    Args:
        name: See `METRICS`.
        kind: Kind of task.
        truth: See above.
        probabilities: See above.
        weights: [resamples, n], how often each case occurs in each resample.

    Raises:
        KeyError: The kind of task does not have that metric.
    """
    if name not in METRICS[kind]:
        raise KeyError(name)
    parts = [weights[start : start + _CHUNK].astype(np.float64) for start in range(0, len(weights), _CHUNK)]
    return np.concatenate([_metric(name, kind, truth, probabilities, part) for part in parts])


def classification_metric(name: str, kind: TaskKind, truth: Truth, probabilities: Probabilities) -> float:
    """Return one metric by name; see `resampled_metric`."""
    return float(resampled_metric(name, kind, truth, probabilities, _once(truth))[0])


def classification_metrics(kind: TaskKind, truth: Truth, probabilities: Probabilities) -> dict[str, float]:
    """Return every metric of a kind of task; see `METRICS`."""
    return {name: classification_metric(name, kind, truth, probabilities) for name in METRICS[kind]}


def per_class_auroc(kind: TaskKind, truth: Truth, probabilities: Probabilities) -> list[float]:
    """Return one AUROC a class (one against the rest) or label; a single one for a binary task (of class 1)."""
    weights = _once(truth).astype(np.float64)
    return [float(_auroc(*one)[0]) for one in _rankings(kind, truth, probabilities, weights)]


def undefined_notes(kind: TaskKind, truth: Truth, classes: Sequence[str]) -> list[str]:
    """Say which classes leave a ranking metric undefined, by name."""
    notes = []
    for index, name in enumerate(classes):
        if kind == "binary" and index == 0:
            continue
        column = truth[:, index] if kind == "multilabel" else (truth == index).astype(np.int64)
        for value, word in ((1, "positive"), (0, "negative")):
            if not (column == value).any():
                notes.append(f"class '{name}' has no {word} case here: its AUROC and AUPRC are NaN and left out of the mean")
                break
    return notes


def selection_score(kind: TaskKind, truth: Truth, probabilities: Probabilities, metric: str) -> float:
    """Return a number by which candidates are ranked on validation data, higher is better.

    Where the wanted metric is undefined for these labels, minus the log loss stands in; whether it is undefined depends on
    the labels alone, so all candidates are ranked by the same number.
    """
    value = classification_metric(metric, kind, truth, probabilities)
    if math.isnan(value):
        metric, value = "log_loss", classification_metric("log_loss", kind, truth, probabilities)
    if math.isnan(value):
        return -math.inf
    return -value if metric in LOWER_IS_BETTER else value


def quadratic_kappa(table: Numbers) -> Numbers:
    """Return Cohen's kappa, quadratic weights, of confusion tables [..., C, C]; NaN where both sides hold one single class."""
    classes = table.shape[-1]
    distance = np.subtract.outer(np.arange(classes), np.arange(classes)).astype(np.float64) ** 2
    rows, columns, total = table.sum(-1), table.sum(-2), table.sum((-1, -2))
    expected = (distance * rows[..., :, None] * columns[..., None, :]).sum((-1, -2)) / total
    observed = (distance * table).sum((-1, -2))
    return np.asarray(np.where(expected > 0, 1.0 - observed / expected, np.nan))


def from_confusion(name: str, table: Numbers) -> Numbers:
    """Return accuracy, balanced accuracy, precision, recall or F1 (weighted by class size) of confusion tables.

    Args:
        name: Of the metric.
        table: [..., true class, predicted class], counts.
    """
    right, support, predicted = np.einsum("...ii->...i", table), table.sum(-1), table.sum(-2)
    total = table.sum((-1, -2))
    if name == "accuracy":
        return np.asarray(right.sum(-1) / total)
    recall = _divided(right, support, 0.0)
    if name == "balanced_accuracy":
        return np.asarray(recall.sum(-1) / (support > 0).sum(-1))
    each = {
        "recall": recall,
        "precision": _divided(right, predicted, 0.0),
        "f1": _divided(2 * right, support + predicted, 0.0),
    }[name]
    return np.asarray((support * each).sum(-1) / total)


def mean_of_defined(values: Numbers) -> Numbers:
    """Return the mean over the first axis without NaN; NaN where all are."""
    known = ~np.isnan(values)
    return _divided(np.where(known, values, 0.0).sum(0), known.sum(0).astype(np.float64))


def _metric(name: str, kind: TaskKind, truth: Truth, probabilities: Probabilities, weights: Numbers) -> Numbers:
    if name in ("auroc", "auprc"):
        curve = _auroc if name == "auroc" else _average_precision
        return mean_of_defined(np.stack([curve(*one) for one in _rankings(kind, truth, probabilities, weights)]))
    if kind == "multilabel":
        labels = _rankings(kind, truth, probabilities, weights)
        return mean_of_defined(np.stack([_one_label(name, *one) for one in labels]))
    classes, total = probabilities.shape[1], weights.sum(1)
    if name == "brier":  # summed over classes, halved for two, as scikit-learn has it
        error = ((probabilities - np.eye(classes)[truth]) ** 2).sum(1) / (2 if classes == 2 else 1)
        return _divided(weights @ error, total)
    if name == "log_loss":
        return _divided(weights @ _surprise(probabilities[np.arange(len(truth)), truth]), total)
    predicted = probabilities.argmax(1)
    if name == "ece":
        return _calibration_error((predicted == truth).astype(np.float64), probabilities.max(1), weights)
    cells = np.zeros((len(truth), classes * classes))
    cells[np.arange(len(truth)), truth * classes + predicted] = 1.0
    tables = (weights @ cells).reshape(-1, classes, classes)
    with np.errstate(divide="ignore", invalid="ignore"):
        return quadratic_kappa(tables) if name == "kappa" else from_confusion(name, tables)


def _rankings(
    kind: TaskKind, truth: Truth, probabilities: Probabilities, weights: Numbers
) -> list[tuple[NDArray[np.bool_], Numbers, Numbers]]:
    """Return (positive, scores, weights) of each class against the rest, or of each label where it is known."""
    found = []
    for index in [1] if kind == "binary" else range(probabilities.shape[1]):
        if kind == "multilabel":
            known = truth[:, index] != UNKNOWN
            found.append((truth[known, index] == 1, probabilities[known, index], weights[:, known]))
        else:
            found.append((truth == index, probabilities[:, index], weights))
    return found


def _one_label(name: str, positive: NDArray[np.bool_], scores: Numbers, weights: Numbers) -> Numbers:
    target, decided, total = positive.astype(np.float64), (scores >= 0.5).astype(np.float64), weights.sum(1)
    if name == "ece":
        return _calibration_error(target, scores, weights)
    if name == "f1":  # without a positive on either side 0, scikit-learn's zero_division=0
        f1 = _divided(2 * (weights @ (decided * target)), weights @ (decided + target), 0.0)
        return np.where(total > 0, f1, np.nan)
    each = {
        "brier": (scores - target) ** 2,
        "log_loss": _surprise(np.where(positive, scores, 1 - scores)),
        "accuracy": (decided == target).astype(np.float64),
    }[name]
    return _divided(weights @ each, total)


def _auroc(positive: NDArray[np.bool_], scores: Numbers, weights: Numbers) -> Numbers:
    """Area under the ROC curve: the share of pairs in which the positive has the higher score; ties count one half."""
    hits, misses = _by_score(positive, scores, weights)
    below = np.cumsum(misses, axis=1) - misses
    return _divided((hits * (below + misses / 2)).sum(1), hits.sum(1) * misses.sum(1))


def _average_precision(positive: NDArray[np.bool_], scores: Numbers, weights: Numbers) -> Numbers:
    """Area under the precision-recall curve as a step sum; NaN without a positive or a negative."""
    hits, misses = _by_score(positive, -scores, weights)
    precision = _divided(np.cumsum(hits, axis=1), np.cumsum(hits + misses, axis=1), 0.0)
    value = _divided((precision * hits).sum(1), hits.sum(1))
    return np.where(misses.sum(1) > 0, value, np.nan)


def _by_score(positive: NDArray[np.bool_], scores: Numbers, weights: Numbers) -> tuple[Numbers, Numbers]:
    """Return how many positives and negatives each resample has at each distinct score, ascending: one threshold a score."""
    if not len(scores):
        return np.zeros((len(weights), 1)), np.zeros((len(weights), 1))
    order = np.argsort(scores, kind="stable")
    weight, hit = weights[:, order], positive[order]
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) != 0])
    return np.add.reduceat(weight * hit, starts, axis=1), np.add.reduceat(weight * ~hit, starts, axis=1)


def _calibration_error(correct: Numbers, confidence: Numbers, weights: Numbers) -> Numbers:
    """Expected calibration error: the gap between confidence and share right, over equal-width bins (Guo et al. 2017)."""
    number = np.clip(np.ceil(confidence * ECE_BINS).astype(int) - 1, 0, ECE_BINS - 1)
    gaps = np.zeros((len(confidence), ECE_BINS))
    gaps[np.arange(len(confidence)), number] = correct - confidence
    return _divided(np.abs(weights @ gaps).sum(1), weights.sum(1))


def _surprise(chosen: Numbers) -> Numbers:
    return np.asarray(-np.log(np.clip(chosen, np.finfo(np.float64).eps, 1.0)))


def _divided(top: Numbers, bottom: Numbers, otherwise: float = math.nan) -> Numbers:
    return np.asarray(np.divide(top, bottom, out=np.full(np.shape(top), otherwise), where=bottom > 0))


def _once(truth: Truth) -> Weights:
    return np.ones((1, len(truth)), dtype=np.int64)
