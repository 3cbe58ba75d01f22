"""Means of two groups of other patients: bootstrap interval of their difference and a permutation test."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from meddino.core.seeds import numpy_rng
from meddino_evaluation.metrics.statistics import PERMUTATIONS, Groups, Resampling, permutation_p


@dataclass(frozen=True)
class UnpairedResult:
    """A difference of two means over different patients.

    Attributes:
        difference: First minus second.
        low: Lower end of the interval; NaN if there is none.
        high: Upper end.
        p_value: Two-sided, of the permutation test; NaN where even the smallest could not be significant.
    """

    difference: float
    low: float
    high: float
    p_value: float


def unpaired_means(
    a: ArrayLike,
    b: ArrayLike,
    *,
    groups_a: Groups = None,
    groups_b: Groups = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> UnpairedResult:
    """Compare the means of one number a case in two groups of patients, e.g. of two hospitals.

    Args:
        a: [n] of the first group, all defined.
        b: [m] of the second.
        groups_a: The patient of each case.
        groups_b: The patient of each case of the second group.
        level: Confidence level.
        resamples: Of the interval; both groups are resampled.
        seed: Equal seeds draw equal resamples and permutations.

    Source: Efron and Tibshirani 1993, chapters 8 and 15: two-sample bootstrap, and the two-sample permutation test over
    the means of patients (who may come from either group if there is no difference).
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if not len(first) or not len(second):
        return UnpairedResult(math.nan, math.nan, math.nan, math.nan)
    drawing = [
        Resampling(len(values), groups, level=level, resamples=resamples, seed=seed + place)
        for place, (values, groups) in enumerate(((first, groups_a), (second, groups_b)))
    ]
    patients = [_patient_means(values, one) for values, one in zip((first, second), drawing, strict=True)]
    difference = float(first.mean() - second.mean())
    drawn = drawing[0].means(first) - drawing[1].means(second)
    # The smaller group decides whether there is an interval, and by how much its percentiles are moved out.
    found = drawing[0 if len(patients[0]) <= len(patients[1]) else 1].interval(difference, drawn)
    everyone, size = np.concatenate(patients), len(patients[0])
    smallest = 2 / math.comb(len(everyone), size)
    if smallest > 1 - level or min(map(len, patients)) < 2:  # of one patient nothing is known but himself
        return UnpairedResult(difference, found.low, found.high, math.nan)
    rng = numpy_rng(seed, "unpaired")
    shuffled = rng.permuted(np.tile(everyone, (PERMUTATIONS, 1)), axis=1)
    permuted = shuffled[:, :size].mean(1) - shuffled[:, size:].mean(1)
    p_value = permutation_p(float(patients[0].mean() - patients[1].mean()), permuted, False)
    return UnpairedResult(difference, found.low, found.high, p_value)


def _patient_means(values: NDArray[np.float64], drawing: Resampling) -> NDArray[np.float64]:
    sizes = drawing.sums(np.ones(len(values)))
    means: NDArray[np.float64] = drawing.sums(values) / sizes
    return means
