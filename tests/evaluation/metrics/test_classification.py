import math

import numpy as np
import pytest
from meddino_evaluation.metrics.classification import (
    METRICS,
    average_precision,
    classification_metric,
    classification_metrics,
    expected_calibration_error,
    per_class_auroc,
    selection_score,
    undefined_notes,
)
from sklearn import metrics


def _case(classes, rows=61, seed=0):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes, size=rows)
    logits = rng.normal(size=(rows, classes)).round(1) + np.eye(classes)[truth]
    probabilities = np.exp(logits)
    return truth, probabilities / probabilities.sum(1, keepdims=True)


@pytest.mark.parametrize(("kind", "classes"), [("binary", 2), ("multiclass", 4), ("ordinal", 5)])
def test_metrics__equal_scikit_learn(kind, classes):
    truth, p = _case(classes)
    predicted = p.argmax(1)
    ours = classification_metrics(kind, truth, p)
    onehot = np.eye(classes)[truth]
    theirs = {
        "auroc": metrics.roc_auc_score(truth, p[:, 1]) if classes == 2 else metrics.roc_auc_score(truth, p, multi_class="ovr"),
        "auprc": metrics.average_precision_score(truth, p[:, 1])
        if classes == 2
        else metrics.average_precision_score(onehot, p, average="macro"),
        "accuracy": metrics.accuracy_score(truth, predicted),
        "balanced_accuracy": metrics.balanced_accuracy_score(truth, predicted),
        "precision": metrics.precision_score(truth, predicted, average="weighted", zero_division=0),
        "recall": metrics.recall_score(truth, predicted, average="weighted", zero_division=0),
        "f1": metrics.f1_score(truth, predicted, average="weighted", zero_division=0),
        "brier": metrics.brier_score_loss(truth, p[:, 1]) if classes == 2 else metrics.brier_score_loss(truth, p),
        "log_loss": metrics.log_loss(truth, p),
        "kappa": metrics.cohen_kappa_score(truth, predicted, weights="quadratic"),
    }
    for name in METRICS[kind]:
        if name != "ece":
            assert ours[name] == pytest.approx(theirs[name], abs=1e-6), name


def test_metrics__multilabel_equals_scikit_learn_where_labels_are_known():
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 2, size=(50, 3))
    truth[:7, 1] = -1
    p = rng.random((50, 3)).round(2)
    known = [truth[:, column] != -1 for column in range(3)]
    aurocs = [metrics.roc_auc_score(truth[known[c], c], p[known[c], c]) for c in range(3)]
    f1 = [metrics.f1_score(truth[known[c], c], p[known[c], c] >= 0.5) for c in range(3)]
    assert per_class_auroc("multilabel", truth, p) == pytest.approx(aurocs, abs=1e-6)
    ours = classification_metrics("multilabel", truth, p)
    assert ours["auroc"] == pytest.approx(np.mean(aurocs), abs=1e-6)
    assert ours["f1"] == pytest.approx(np.mean(f1), abs=1e-6)


def test_average_precision__with_many_ties():
    rng = np.random.default_rng(2)
    truth, scores = rng.integers(0, 2, 80), rng.integers(0, 5, 80) / 4
    assert average_precision(truth, scores) == pytest.approx(metrics.average_precision_score(truth, scores), abs=1e-6)


def test_expected_calibration_error__slow_loop():
    rng = np.random.default_rng(3)
    confidence, correct = rng.random(200), rng.integers(0, 2, 200).astype(float)
    slow = 0.0
    for number in range(15):
        inside = (confidence > number / 15) & (confidence <= (number + 1) / 15)
        if inside.any():
            slow += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    assert expected_calibration_error(correct, confidence) == pytest.approx(slow)
    assert expected_calibration_error(np.ones(4), np.ones(4)) == 0.0


def test_metrics__a_class_without_positives_is_nan_with_a_note():
    truth, p = _case(3)
    truth[truth == 2] = 0
    aurocs = per_class_auroc("multiclass", truth, p)
    assert math.isnan(aurocs[2])
    assert classification_metric("auroc", "multiclass", truth, p) == pytest.approx(np.mean(aurocs[:2]))
    notes = undefined_notes("multiclass", truth, ["a", "b", "c"])
    assert len(notes) == 1
    assert "'c' has no positive" in notes[0]
    assert math.isnan(classification_metric("auroc", "binary", np.zeros(5, int), np.full((5, 2), 0.5)))


def test_selection_score__falls_back_where_auroc_is_undefined():
    truth = np.zeros(4, int)
    sure, unsure = np.tile([0.9, 0.1], (4, 1)), np.tile([0.6, 0.4], (4, 1))
    assert selection_score("binary", truth, sure, "auroc") > selection_score("binary", truth, unsure, "auroc")
    assert selection_score("binary", truth, sure, "log_loss") == pytest.approx(math.log(0.9))


def test_metrics__unknown_name():
    with pytest.raises(KeyError):
        classification_metric("kappa", "binary", np.array([0, 1]), np.full((2, 2), 0.5))
