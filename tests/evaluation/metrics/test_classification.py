import math

import numpy as np
import pytest
from meddino_evaluation.metrics.classification import (
    METRICS,
    SPANS,
    classification_metric,
    classification_metrics,
    per_class_auroc,
    resampled_metric,
    selection_score,
    undefined_notes,
)
from meddino_evaluation.metrics.statistics import Resampling
from sklearn import metrics


def _case(kind, classes, rows=61, seed=0):
    """Truth and probabilities with many ties."""
    rng = np.random.default_rng(seed)
    if kind == "multilabel":
        return rng.integers(-1, 2, size=(rows, classes)), rng.random((rows, classes)).round(1)
    truth = rng.integers(0, classes, size=rows)
    probabilities = np.exp(rng.normal(size=(rows, classes)).round(1) + np.eye(classes)[truth])
    return truth, probabilities / probabilities.sum(1, keepdims=True)


def _calibration_error(correct, confidence):
    """Bin by bin, from Guo et al. 2017."""
    error = 0.0
    for number in range(15):
        inside = (confidence > number / 15) & (confidence <= (number + 1) / 15)
        inside |= (confidence == 0) & (number == 0)
        if inside.any():
            error += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    return error


def _scikit_learn(kind, truth, p):
    """Every metric by scikit-learn (the calibration error by its loop)."""
    if kind == "multilabel":
        each = []
        for c in range(p.shape[1]):
            known = truth[:, c] != -1
            t, score = truth[known, c], p[known, c]
            each.append(
                {
                    "auroc": metrics.roc_auc_score(t, score),
                    "auprc": metrics.average_precision_score(t, score),
                    "accuracy": metrics.accuracy_score(t, score >= 0.5),
                    "f1": metrics.f1_score(t, score >= 0.5, zero_division=0),
                    "brier": metrics.brier_score_loss(t, score),
                    "log_loss": metrics.log_loss(t, score, labels=[0, 1]),
                    "ece": _calibration_error(t, score),
                }
            )
        return {name: np.mean([one[name] for one in each]) for name in each[0]}
    classes, predicted, several = p.shape[1], p.argmax(1), {"average": "weighted", "zero_division": 0}
    binary = kind == "binary"
    return {
        "auroc": metrics.roc_auc_score(truth, p[:, 1]) if binary else metrics.roc_auc_score(truth, p, multi_class="ovr"),
        "auprc": metrics.average_precision_score(truth, p[:, 1])
        if binary
        else metrics.average_precision_score(np.eye(classes)[truth], p, average="macro"),
        "accuracy": metrics.accuracy_score(truth, predicted),
        "balanced_accuracy": metrics.balanced_accuracy_score(truth, predicted),
        "precision": metrics.precision_score(truth, predicted, **several),
        "recall": metrics.recall_score(truth, predicted, **several),
        "f1": metrics.f1_score(truth, predicted, **several),
        "brier": metrics.brier_score_loss(truth, p[:, 1] if binary else p),
        "log_loss": metrics.log_loss(truth, p),
        "kappa": metrics.cohen_kappa_score(truth, predicted, weights="quadratic"),
        "ece": _calibration_error((predicted == truth).astype(float), p.max(1)),
    }


KINDS = [("binary", 2), ("multiclass", 4), ("ordinal", 5), ("multilabel", 3)]


@pytest.mark.parametrize(("kind", "classes"), KINDS)
def test_metrics__equal_scikit_learn(kind, classes):
    truth, p = _case(kind, classes)
    theirs = _scikit_learn(kind, truth, p)
    for name, value in classification_metrics(kind, truth, p).items():
        assert value == pytest.approx(theirs[name], abs=1e-6), name


@pytest.mark.parametrize(("kind", "classes"), KINDS)
def test_resampled_metric__equals_scikit_learn_on_the_repeated_rows(kind, classes):
    truth, p = _case(kind, classes)
    weights = Resampling(len(truth), [row // 2 for row in range(len(truth))], resamples=6, seed=3).weights()
    theirs = [_scikit_learn(kind, np.repeat(truth, row, axis=0), np.repeat(p, row, axis=0)) for row in weights]
    for name in METRICS[kind]:
        np.testing.assert_allclose(
            resampled_metric(name, kind, truth, p, weights), [one[name] for one in theirs], atol=1e-6, err_msg=name
        )


def test_resampled_metric__undefined_resamples_are_nan():
    truth, p = np.array([0, 1, 1]), np.array([[0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    weights = np.array([[3, 0, 0], [1, 1, 1], [0, 1, 2]])
    for name in ("auroc", "auprc"):
        assert np.isnan(resampled_metric(name, "binary", truth, p, weights)).tolist() == [True, False, True]


def test_per_class_auroc__labels_by_themselves():
    truth, p = _case("multilabel", 3)
    known = [truth[:, c] != -1 for c in range(3)]
    wanted = [metrics.roc_auc_score(truth[known[c], c], p[known[c], c]) for c in range(3)]
    assert per_class_auroc("multilabel", truth, p) == pytest.approx(wanted, abs=1e-6)


def test_metrics__a_class_without_positives_is_nan_with_a_note():
    truth, p = _case("multiclass", 3)
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


def test_spans__every_metric_lies_in_its_own():
    assert set(SPANS) == {name for names in METRICS.values() for name in names}
    for kind, names in METRICS.items():
        values = classification_metrics(kind, *_case(kind, 2 if kind == "binary" else 3))
        assert all(SPANS[name][0] <= values[name] <= SPANS[name][1] for name in names)
    assert SPANS["kappa"] == (-1.0, 1.0) and SPANS["log_loss"] == (0.0, math.inf)
