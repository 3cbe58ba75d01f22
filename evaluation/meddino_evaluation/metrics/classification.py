"""Classification metrics in NumPy, fast enough to be bootstrapped; the tests hold them to scikit-learn within 1e-6.

`truth` is [n] class numbers (binary, multi-class, ordinal) or [n, labels] of 0, 1 and -1 for "not known" (multi-label);
`probabilities` is [n, classes] that sum to 1, or [n, labels] of independent probabilities.
A metric that is undefined (a class without positives) is NaN, and `undefined_notes` says why.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

TaskKind = Literal["binary", "multiclass", "multilabel", "ordinal"]
Truth = NDArray[np.int64]
Probabilities = NDArray[np.float64]

METRICS: dict[TaskKind, tuple[str, ...]] = {
    "binary": ("auroc", "auprc", "accuracy", "balanced_accuracy", "precision", "recall", "f1", "brier", "ece", "log_loss"),
    "multiclass": ("auroc", "auprc", "accuracy", "balanced_accuracy", "precision", "recall", "f1", "brier", "ece", "log_loss"),
    "ordinal": (
        *("kappa", "auroc", "auprc", "accuracy", "balanced_accuracy", "precision", "recall", "f1", "brier", "ece", "log_loss"),
    ),
    "multilabel": ("auroc", "auprc", "accuracy", "f1", "brier", "ece", "log_loss"),
}
"""What is reported for each kind of task; precision, recall and F1 are weighted by class size."""

LOWER_IS_BETTER = frozenset({"brier", "ece", "log_loss"})
UNKNOWN = -1


def auroc(positive: NDArray[Any], scores: NDArray[np.float64]) -> float:
    """Return the area under the ROC curve; NaN without a positive or a negative. Ties count one half."""
    mask = np.asarray(positive, dtype=bool)
    positives = int(mask.sum())
    negatives = len(mask) - positives
    if not positives or not negatives:
        return math.nan
    ranks = rankdata(scores)
    return float((ranks[mask].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def average_precision(positive: NDArray[Any], scores: NDArray[np.float64]) -> float:
    """Return the area under the precision-recall curve as a step sum; NaN without a positive or a negative."""
    mask = np.asarray(positive, dtype=bool)
    positives = int(mask.sum())
    if not positives or positives == len(mask):
        return math.nan
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(mask[order])
    # Equal scores are one threshold: only the last row of a tie is a point of the curve.
    last = np.flatnonzero(np.r_[np.diff(scores[order]) != 0, True])
    precision, recall = hits[last] / (last + 1), hits[last] / positives
    return float(np.sum(np.diff(np.r_[0.0, recall]) * precision))


def quadratic_kappa(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return Cohen's kappa, quadratic weights, of confusion tables [..., C, C]; NaN where both sides hold one single class."""
    classes = table.shape[-1]
    distance = np.subtract.outer(np.arange(classes), np.arange(classes)).astype(np.float64) ** 2
    rows, columns, total = table.sum(-1), table.sum(-2), table.sum((-1, -2))
    expected = (distance * rows[..., :, None] * columns[..., None, :]).sum((-1, -2)) / total
    observed = (distance * table).sum((-1, -2))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(expected > 0, 1.0 - observed / expected, np.nan))


def expected_calibration_error(correct: NDArray[np.float64], confidence: NDArray[np.float64], bins: int = 15) -> float:
    """Return the expected calibration error over equal-width bins of confidence.

    Args:
        correct: [n] 1 where the prediction was right (or the label positive, for one label).
        confidence: [n] its probability, in [0, 1].
        bins: Number of bins; 15 as in Guo et al. 2017.
    """
    number = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gap = np.bincount(number, weights=correct - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(confidence))


def brier_score(truth: Truth, probabilities: Probabilities) -> float:
    """Return the Brier score: squared error summed over classes, halved for two classes (as scikit-learn has it)."""
    target = np.eye(probabilities.shape[1])[truth]
    total = float(((probabilities - target) ** 2).sum(1).mean())
    return total / 2 if probabilities.shape[1] == 2 else total


def log_loss(truth: Truth, probabilities: Probabilities) -> float:
    """Return the mean negative log probability of the true class."""
    chosen = probabilities[np.arange(len(truth)), truth]
    return float(-np.log(np.clip(chosen, np.finfo(np.float64).eps, 1.0)).mean())


def per_class_auroc(kind: TaskKind, truth: Truth, probabilities: Probabilities) -> list[float]:
    """Return one AUROC a class (one against the rest) or label; a single one for a binary task (of class 1)."""
    if kind == "binary":
        return [auroc(truth == 1, probabilities[:, 1])]
    return [auroc(*_one_class(kind, truth, probabilities, index)) for index in range(probabilities.shape[1])]


def classification_metric(name: str, kind: TaskKind, truth: Truth, probabilities: Probabilities) -> float:
    """Return one metric by name; see `METRICS`.

    Raises:
        KeyError: The kind of task does not have that metric.
    """
    if name not in METRICS[kind]:
        raise KeyError(name)
    if kind == "multilabel":
        columns = range(probabilities.shape[1])
        return _macro([_binary_metric(name, *_one_class(kind, truth, probabilities, index)) for index in columns])
    if name == "auroc":
        return _macro(per_class_auroc(kind, truth, probabilities))
    if name == "auprc":
        wanted = [1] if kind == "binary" else list(range(probabilities.shape[1]))
        return _macro([average_precision(*_one_class(kind, truth, probabilities, index)) for index in wanted])
    if name in ("brier", "log_loss"):
        return brier_score(truth, probabilities) if name == "brier" else log_loss(truth, probabilities)
    return _metric_of_decisions(name, truth, probabilities)


def classification_metrics(kind: TaskKind, truth: Truth, probabilities: Probabilities) -> dict[str, float]:
    """Return every metric of a kind of task; see `METRICS`."""
    return {name: classification_metric(name, kind, truth, probabilities) for name in METRICS[kind]}


def undefined_notes(kind: TaskKind, truth: Truth, classes: Sequence[str]) -> list[str]:
    """Say which classes leave a ranking metric undefined, by name."""
    notes = []
    for index, name in enumerate(classes):
        if kind == "binary" and index == 0:
            continue
        column = truth[:, index] if kind == "multilabel" else (truth == index).astype(np.int64)
        known = column[column != UNKNOWN]
        if not (known == 1).any():
            notes.append(f"class '{name}' has no positive case here: its AUROC and AUPRC are NaN and left out of the mean")
        elif not (known == 0).any():
            notes.append(f"class '{name}' has no negative case here: its AUROC and AUPRC are NaN and left out of the mean")
    return notes


def selection_score(kind: TaskKind, truth: Truth, probabilities: Probabilities, metric: str) -> float:
    """Return a number by which candidates are ranked on validation data, higher is better.

    Where the wanted metric is undefined for these labels, minus the log loss (or Brier score) stands in; whether it is
    undefined depends on the labels alone, so all candidates are ranked by the same number.
    """
    value = classification_metric(metric, kind, truth, probabilities)
    if math.isnan(value):
        metric, value = "log_loss", classification_metric("log_loss", kind, truth, probabilities)
    if math.isnan(value):
        return -math.inf
    return -value if metric in LOWER_IS_BETTER else value


def _one_class(
    kind: TaskKind, truth: Truth, probabilities: Probabilities, index: int
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    if kind != "multilabel":
        return truth == index, probabilities[:, index]
    known = truth[:, index] != UNKNOWN
    return truth[known, index] == 1, probabilities[known, index]


def _metric_of_decisions(name: str, truth: Truth, probabilities: Probabilities) -> float:
    predicted = probabilities.argmax(1)
    if name == "ece":
        return expected_calibration_error((predicted == truth).astype(np.float64), probabilities.max(1))
    if name == "kappa":
        return float(quadratic_kappa(_confusion(truth, predicted, probabilities.shape[1])))
    return float(from_confusion(name, _confusion(truth, predicted, probabilities.shape[1])))


def _binary_metric(name: str, positive: NDArray[np.bool_], scores: NDArray[np.float64]) -> float:
    if not len(positive):
        return math.nan
    target = positive.astype(np.float64)
    one_label: dict[str, Callable[[], float]] = {
        "auroc": lambda: auroc(positive, scores),
        "auprc": lambda: average_precision(positive, scores),
        "brier": lambda: float(((scores - target) ** 2).mean()),
        "ece": lambda: expected_calibration_error(target, scores),
        "log_loss": lambda: log_loss(positive.astype(np.int64), np.stack([1 - scores, scores], 1)),
        "accuracy": lambda: float(((scores >= 0.5) == positive).mean()),
        "f1": lambda: _f1(positive, scores >= 0.5),
    }
    return one_label[name]()


def _f1(positive: NDArray[np.bool_], predicted: NDArray[np.bool_]) -> float:
    total = float(predicted.sum() + positive.sum())
    return 2 * float((predicted & positive).sum()) / total if total else 0.0  # scikit-learn's zero_division=0


def _confusion(truth: Truth, predicted: NDArray[np.integer[Any]], classes: int) -> NDArray[np.float64]:
    return np.bincount(truth * classes + predicted, minlength=classes * classes).reshape(classes, classes).astype(np.float64)


def from_confusion(name: str, table: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return accuracy, balanced accuracy, precision, recall or F1 (weighted by class size) of confusion tables.

    Args:
        name: Of the metric.
        table: [..., true class, predicted class], counts.
    """
    right, support, predicted = np.einsum("...ii->...i", table), table.sum(-1), table.sum(-2)
    total = table.sum((-1, -2))
    if name == "accuracy":
        return np.asarray(right.sum(-1) / total)
    recall = _ratio(right, support)
    if name == "balanced_accuracy":
        return np.asarray(recall.sum(-1) / (support > 0).sum(-1))
    each = {"recall": recall, "precision": _ratio(right, predicted), "f1": _ratio(2 * right, support + predicted)}[name]
    return np.asarray((support * each).sum(-1) / total)


def _ratio(top: NDArray[np.float64], bottom: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)


def _macro(values: Sequence[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return float(np.mean(defined)) if defined else math.nan
