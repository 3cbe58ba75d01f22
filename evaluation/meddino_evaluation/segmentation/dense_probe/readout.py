"""Readouts of patch tokens: kNN and logistic regression, their settings chosen on validation patients."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from meddino.core.errors import ConfigError
from meddino_evaluation.adaptation.knn import knn_probabilities
from meddino_evaluation.adaptation.logistic import fit_logistic
from meddino_evaluation.segmentation.dense_probe.config import ProbeConfig, Readout
from meddino_evaluation.segmentation.dense_probe.patches import PatchSet

Counts = NDArray[np.int64]
"""[patients, classes, 3]: true positives, false positives and false negatives of patches."""

MAX_STEPS = 100
"""L-BFGS iterations of a logistic regression; more change no prediction that matters (ours)."""


@dataclass(frozen=True)
class Fitted:
    """One readout of one kind of features, with what validation said of it.

    Attributes:
        features: `blocks1`, `blocks4`, `pixels`.
        readout: knn or logistic.
        setting: k or C.
        val_f1: Macro-F1 on the validation patients.
        predicted: Class of each test patch.
    """

    features: str
    readout: Readout
    setting: float
    val_f1: float
    predicted: NDArray[np.int64]


def count_patches(predicted: NDArray[np.int64], truth: PatchSet, patients: int, classes: int) -> Counts:
    """Count true positives, false positives and false negatives for each patient and class."""
    counts = np.zeros((patients, classes, 3), dtype=np.int64)
    hit = predicted == truth.labels
    np.add.at(counts, (truth.patients[hit], truth.labels[hit], 0), 1)
    np.add.at(counts, (truth.patients[~hit], predicted[~hit], 1), 1)
    np.add.at(counts, (truth.patients[~hit], truth.labels[~hit], 2), 1)
    return counts


def f1_scores(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return F1 of each class but the background from counts [..., classes, 3]; NaN where a class neither is nor is said."""
    tp, fp, fn = np.moveaxis(counts[..., 1:, :].astype(np.float64), -1, 0)
    total = 2 * tp + fp + fn
    scores: NDArray[np.float64] = np.full(total.shape, np.nan)
    np.divide(2 * tp, total, out=scores, where=total > 0)
    return scores


def class_mean(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean over the last axis, leaving out what is NaN; NaN where nothing is left."""
    defined = ~np.isnan(scores)
    count = defined.sum(-1)
    mean: NDArray[np.float64] = np.full(count.shape, np.nan)
    np.divide(np.where(defined, scores, 0.0).sum(-1), count, out=mean, where=count > 0)
    return mean


def macro_f1(counts: Counts) -> float:
    """Return the mean over classes of F1 over the patches of all patients, background left out.

    A class that no patient has and that nobody says is left out of the mean.
    """
    return float(class_mean(f1_scores(counts.sum(0))))


def fit_all(
    train: PatchSet, val: PatchSet, test: PatchSet, names: Sequence[str], config: ProbeConfig, classes: int
) -> list[Fitted]:
    """Fit every readout on every kind of features; for each the setting that is best on validation, predicted on test.

    Raises:
        ConfigError: The labelled slices show one class only.
    """
    if len(np.unique(train.labels)) < 2:
        raise ConfigError("the labelled slices show one class only; give more (train_slices) or other cases")
    return [fit(train, val, test, name, config, classes) for name in names for fit in (_fit_knn, _fit_logistic)]


def best_on_validation(fitted: Sequence[Fitted], names: Sequence[str]) -> Fitted:
    """Return what validation likes best among some kinds of features."""
    return max((one for one in fitted if one.features in names), key=lambda one: one.val_f1)


def _fit_knn(train: PatchSet, val: PatchSet, test: PatchSet, name: str, config: ProbeConfig, classes: int) -> Fitted:
    x = train.features[name]
    ks = tuple(k for k in config.neighbours if k <= len(x)) or (len(x),)

    def votes(queries: PatchSet, neighbours: Sequence[int]) -> dict[int, NDArray[Any]]:
        of = queries.features[name]
        return knn_probabilities(x, train.labels, of, classes=classes, neighbours=neighbours, dtype=torch.float32)

    scores = {k: _score(found, val, classes) for k, found in votes(val, ks).items()}
    best = max(ks, key=lambda k: (scores[k], -k))
    return Fitted(name, "knn", best, scores[best], votes(test, (best,))[best].argmax(1))


def _fit_logistic(train: PatchSet, val: PatchSet, test: PatchSet, name: str, config: ProbeConfig, classes: int) -> Fitted:
    x, y, z = (part.features[name].numpy() for part in (train, val, test))
    models = fit_logistic(
        x.astype(np.float64), train.labels, config.strengths, kind="multiclass", classes=classes, max_steps=MAX_STEPS
    )
    scores = [_score(model.probabilities(y, "multiclass"), val, classes) for model in models]
    best = max(range(len(models)), key=lambda place: (scores[place], -models[place].strength))
    model = models[best]
    return Fitted(name, "logistic", model.strength, scores[best], model.probabilities(z, "multiclass").argmax(1))


def _score(probabilities: NDArray[Any], val: PatchSet, classes: int) -> float:
    return macro_f1(count_patches(probabilities.argmax(1), val, int(val.patients.max()) + 1, classes))
