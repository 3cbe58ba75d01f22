"""Logistic regression by L-BFGS over a grid of regularisation strengths."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meddino_evaluation.metrics.classification import TaskKind

Features = NDArray[np.floating[Any]]
Truth = NDArray[np.int64]
Probabilities = NDArray[np.float64]


@dataclass(frozen=True)
class FittedLogistic:
    """A regression (one for each label if there are several) with the scaling of its input.

    Attributes:
        strength: C, the inverse of the regularisation.
        models: scikit-learn's; None where a label has one known value only.
        constants: The probability that stands in for None.
        mean: Of the training features [D].
        std: Standard deviation of the training features [D].
        classes: Classes or labels.
    """

    strength: float
    models: tuple[Any, ...]
    constants: tuple[float, ...]
    mean: Features
    std: Features
    classes: int

    def probabilities(self, features: Features, kind: TaskKind) -> Probabilities:
        """Return class probabilities [n, classes]."""
        scaled = (features - self.mean) / self.std
        result = np.zeros((len(features), self.classes))
        if kind == "multilabel":
            for label, (model, constant) in enumerate(zip(self.models, self.constants, strict=True)):
                result[:, label] = constant if model is None else model.predict_proba(scaled)[:, list(model.classes_).index(1)]
            return result
        model = self.models[0]
        result[:, model.classes_] = model.predict_proba(scaled)
        return result


def fit_logistic(
    features: Features, labels: Truth, strengths: Sequence[float], *, kind: TaskKind, classes: int, max_steps: int = 1000
) -> list[FittedLogistic]:
    """Fit one regression for each value of C, each started from the one before.

    Args:
        features: [n, D]; scaled here by their mean and standard deviation.
        labels: See `classification_metrics`.
        strengths: Values of C, ascending.
        kind: Kind of task.
        classes: Classes or labels.
        max_steps: L-BFGS iterations each.

    Source: S0's protocol; scikit-learn's solver.
    """
    mean = features.mean(0)
    std = features.std(0)
    std = np.where(std > 1e-6, std, 1.0)
    scaled = (features - mean) / std
    targets = [labels] if kind != "multilabel" else [labels[:, label] for label in range(classes)]
    paths = [_path(scaled, target, strengths, max_steps) for target in targets]
    constants = tuple(float((target == 1).sum() / max(1, (target != -1).sum())) for target in targets)
    return [
        FittedLogistic(strength, tuple(path[place] for path in paths), constants, mean, std, classes)
        for place, strength in enumerate(strengths)
    ]


def _path(scaled: Features, target: Truth, strengths: Sequence[float], max_steps: int) -> list[Any]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    known = target != -1
    if len(np.unique(target[known])) < 2:
        return [None] * len(strengths)
    models: list[Any] = []
    # Threads of two libraries wait for one another in each of thousands of small products: two take twice one's time.
    with warnings.catch_warnings(), threadpool_limits(1):
        # With C at 1e5 and separable classes the optimum lies at infinity: stopping there is what the study did.
        warnings.simplefilter("ignore", ConvergenceWarning)
        for strength in strengths:
            model = LogisticRegression(C=strength, max_iter=max_steps, tol=1e-4)
            if models:
                # scikit-learn's warm start needs one object; a fresh one with the last coefficients keeps every C's result.
                model.warm_start = True
                model.coef_, model.intercept_ = models[-1].coef_.copy(), models[-1].intercept_.copy()
            models.append(model.fit(scaled[known], target[known]))
    return models
