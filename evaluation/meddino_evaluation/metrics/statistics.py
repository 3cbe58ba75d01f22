"""Intervals and tests for evaluation results: bootstrap over patients, paired tests, DeLong, Holm.

Every function takes one number a case, or a statistic of row numbers; nothing here bootstraps a bootstrap (a published
study did, and its intervals were seventy times too narrow).
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from meddino.core.seeds import numpy_rng

Statistic = Callable[[NDArray[np.int64]], float]
"""Takes the row numbers of a resample (with repeats) and returns one number; NaN where it is undefined."""

FEWEST_DEFINED = 0.5
"""Below this share of resamples in which the statistic is defined, no interval is given."""


@dataclass(frozen=True)
class Interval:
    """A point estimate with a confidence interval.

    Attributes:
        estimate: The statistic of all rows.
        low: Lower end; NaN if there is none.
        high: Upper end; NaN if there is none.
        level: Confidence level, e.g. 0.95.
        resamples: Resamples in which the statistic was defined.
    """

    estimate: float
    low: float
    high: float
    level: float = 0.95
    resamples: int = 0

    def text(self, digits: int = 3) -> str:
        """Return `estimate [low, high]`."""
        return f"{self.estimate:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


@dataclass(frozen=True)
class PairedResult:
    """A difference of two models on the same cases.

    Attributes:
        difference: First minus second.
        low: Lower end of the interval of the difference.
        high: Upper end.
        p_value: Two-sided.
    """

    difference: float
    low: float
    high: float
    p_value: float


NO_RESULT = PairedResult(math.nan, math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class DeLongResult:
    """AUROCs of two models on the same cases, compared.

    Attributes:
        auroc_a: Of the first model.
        auroc_b: Of the second.
        covariance: 2 x 2, of the two estimates.
        z: Difference over its standard error; 0 if both are identical.
        p_value: Two-sided.
    """

    auroc_a: float
    auroc_b: float
    covariance: NDArray[np.float64]
    z: float
    p_value: float


Groups = Sequence[Hashable] | NDArray[np.generic] | None


class Resampling:
    """Bootstrap resamples of patients, drawn once for every statistic that is to be compared on them.

    Args:
        rows: Number of rows.
        groups: The patient of each row: whole patients are drawn. None: every row is its own.
        level: Confidence level of the intervals.
        resamples: How many.
        seed: Equal seeds draw equal resamples.

    Raises:
        ValueError: No rows, or as many groups as rows were expected.
    """

    def __init__(self, rows: int, groups: Groups = None, *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> None:
        self.rows, self.level = rows, level
        self._members = _members(rows, groups)
        size = (resamples, len(self._members))
        self._draws = numpy_rng(seed, "bootstrap").integers(0, len(self._members), size=size)

    def statistic(self, statistic: Statistic) -> NDArray[np.float64]:
        """Return a statistic of row numbers in every resample."""
        if all(len(rows) == 1 for rows in self._members):
            samples: Sequence[NDArray[np.int64]] = list(np.concatenate(self._members)[self._draws])
        else:
            samples = [np.concatenate([self._members[number] for number in draw]) for draw in self._draws]
        return np.array([statistic(sample) for sample in samples])

    def means(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the mean of one number a row in every resample."""
        # Sums a patient, so that a resample is a draw of patients and nothing else.
        sums = np.array([values[rows].sum() for rows in self._members])
        sizes = np.array([len(rows) for rows in self._members], dtype=np.float64)
        means: NDArray[np.float64] = sums[self._draws].sum(1) / sizes[self._draws].sum(1)
        return means

    def weights(self) -> NDArray[np.int64]:
        """Return how often each row occurs in each resample [resamples, rows]."""
        patients = np.zeros(self._draws.shape, dtype=np.int64)
        np.add.at(patients, (np.arange(len(patients))[:, None], self._draws), 1)
        owner = np.empty(self.rows, dtype=np.int64)
        for number, rows in enumerate(self._members):
            owner[rows] = number
        return patients[:, owner]

    def interval(self, estimate: float, drawn: NDArray[np.float64]) -> Interval:
        """Return the percentile interval of a statistic.

        Args:
            estimate: Of all rows.
            drawn: Of each resample; NaN where undefined.

        Source: Efron and Tibshirani 1993, chapter 13. The plain percentile interval is too narrow for few patients (it
        covers 92 % instead of 95 % at 25), so its two percentiles are moved out by the ratio of Student's t to the normal, as
        in Hesterberg 2015 (expanded percentile interval); at 200 patients nothing visible changes. Resamples where the
        statistic is undefined are left out; if that is more than half of them, or there is one patient, there is no interval
        (NaN).
        """
        defined, patients = drawn[~np.isnan(drawn)], len(self._members)
        if len(defined) < FEWEST_DEFINED * len(drawn) or not len(defined) or patients < 2:
            return Interval(estimate, math.nan, math.nan, self.level, len(defined))
        wider = math.sqrt(patients / (patients - 1))
        tail = float(stats.norm.cdf(stats.t.ppf((1 - self.level) / 2, patients - 1) * wider))
        low, high = np.quantile(defined, [tail, 1 - tail])
        return Interval(estimate, float(low), float(high), self.level, len(defined))

    def paired(self, difference: float, drawn: NDArray[np.float64]) -> PairedResult:
        """Return the interval of a difference and its p value.

        Args:
            difference: The estimate.
            drawn: One difference a resample; NaN where undefined.

        Returns:
            The p value is twice the smaller share of resamples on either side of zero, with one added to both counts so that
            it is never 0.
        """
        found = self.interval(difference, drawn)
        if not found.resamples or math.isnan(difference):
            return NO_RESULT
        at_most, at_least = int((drawn <= 0).sum()), int((drawn >= 0).sum())
        p_value = min(1.0, 2 * (min(at_most, at_least) + 1) / (found.resamples + 1))
        return PairedResult(difference, found.low, found.high, p_value)


def bootstrap_interval(
    statistic: Statistic, rows: int, *, groups: Groups = None, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Return the percentile bootstrap interval of a statistic of row numbers, drawn over patients; see `Resampling`."""
    drawing = Resampling(rows, groups, level=level, resamples=resamples, seed=seed)
    return drawing.interval(float(statistic(np.arange(rows))), drawing.statistic(statistic))


def bootstrap_mean(
    values: ArrayLike, *, groups: Groups = None, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Return the mean of one number a case (Dice, 0/1 for correct, ...) with its percentile bootstrap interval.

    Args:
        values: [n]; NaN (undefined for that case) is left out.
        groups: The patient of each value.
        level: Confidence level.
        resamples: How many.
        seed: Equal seeds draw equal resamples.
    """
    array, kept_groups = _defined(np.asarray(values, dtype=np.float64), groups)
    if not len(array):
        return Interval(math.nan, math.nan, math.nan, level, 0)
    drawing = Resampling(len(array), kept_groups, level=level, resamples=resamples, seed=seed)
    return drawing.interval(float(array.mean()), drawing.means(array))


def paired_bootstrap(
    statistic_a: Statistic,
    statistic_b: Statistic,
    rows: int,
    *,
    groups: Groups = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> PairedResult:
    """Compare two models on the same cases: first minus second, its interval over patients and its p value.

    Args:
        statistic_a: First model's statistic of row numbers.
        statistic_b: Second model's.
        rows: Number of rows, which are the same cases for both.
        groups: The patient of each row.
        level: Confidence level.
        resamples: How many.
        seed: Equal seeds draw equal resamples.
    """

    def difference(sample: NDArray[np.int64]) -> float:
        return statistic_a(sample) - statistic_b(sample)

    drawing = Resampling(rows, groups, level=level, resamples=resamples, seed=seed)
    return drawing.paired(float(difference(np.arange(rows))), drawing.statistic(difference))


def paired_bootstrap_means(
    a: ArrayLike, b: ArrayLike, *, groups: Groups = None, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> PairedResult:
    """Compare the means of one number a case of two models; see `paired_bootstrap`. Cases undefined in either are left out."""
    difference, kept_groups = _defined(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64), groups)
    if not len(difference):
        return NO_RESULT
    drawing = Resampling(len(difference), kept_groups, level=level, resamples=resamples, seed=seed)
    return drawing.paired(float(difference.mean()), drawing.means(difference))


def wilcoxon_signed_rank(a: ArrayLike, b: ArrayLike) -> float:
    """Return the two-sided p value of Wilcoxon's signed-rank test over cases.

    Cases undefined in either are left out; without any difference the p value is 1, with no case NaN.
    """
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    difference = difference[~np.isnan(difference)]
    if not len(difference):
        return math.nan
    if not difference.any():
        return 1.0
    return float(stats.wilcoxon(difference).pvalue)


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Return p values adjusted for their number by Holm's step-down rule; NaN stays NaN and is not counted.

    Source: Holm 1979.
    """
    values = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(values.shape, np.nan)
    known = np.flatnonzero(~np.isnan(values))
    order = known[np.argsort(values[known], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(values[order] * factors))
    return adjusted


def delong(labels: ArrayLike, scores_a: ArrayLike, scores_b: ArrayLike) -> DeLongResult:
    """Compare the AUROCs of two models on the same cases.

    Args:
        labels: [n] 0 or 1; rows must be independent (one row a patient, or the patient's mean score).
        scores_a: [n] of the first model.
        scores_b: [n] of the second.

    Raises:
        ValueError: Shapes differ, or fewer than two cases of either class.

    Source: DeLong et al. 1988, by midranks (Sun and Xu 2014).
    """
    truth = np.asarray(labels).astype(bool)
    scores = np.stack([np.asarray(scores_a, dtype=np.float64), np.asarray(scores_b, dtype=np.float64)])
    if truth.ndim != 1 or scores.shape[1:] != truth.shape:
        raise ValueError(f"labels {truth.shape} and scores {scores.shape[1:]} must be of one length")
    positives, negatives = int(truth.sum()), int((~truth).sum())
    if positives < 2 or negatives < 2:
        raise ValueError(f"DeLong's test needs two cases of each class, found {positives} positive and {negatives} negative")
    over_positives = np.empty((2, positives))
    over_negatives = np.empty((2, negatives))
    for row, values in enumerate(scores):
        all_ranks = stats.rankdata(values)
        # The share of negatives below each positive, and of positives above each negative; ties count one half.
        over_positives[row] = (all_ranks[truth] - stats.rankdata(values[truth])) / negatives
        over_negatives[row] = 1 - (all_ranks[~truth] - stats.rankdata(values[~truth])) / positives
    aurocs = over_positives.mean(1)
    covariance = np.cov(over_positives) / positives + np.cov(over_negatives) / negatives
    variance = float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    difference = float(aurocs[0] - aurocs[1])
    if variance <= 1e-18:
        z = 0.0 if abs(difference) < 1e-12 else math.copysign(math.inf, difference)
    else:
        z = difference / math.sqrt(variance)
    return DeLongResult(float(aurocs[0]), float(aurocs[1]), covariance, z, float(2 * stats.norm.sf(abs(z))))


def delong_interval(labels: ArrayLike, scores: ArrayLike, level: float = 0.95) -> Interval:
    """Return an AUROC with DeLong's interval (normal approximation, cut to [0, 1]); see `delong`."""
    result = delong(labels, scores, scores)
    half = float(stats.norm.ppf(0.5 + level / 2)) * math.sqrt(max(0.0, float(result.covariance[0, 0])))
    return Interval(result.auroc_a, max(0.0, result.auroc_a - half), min(1.0, result.auroc_a + half), level, 0)


def mean_and_std(values: ArrayLike) -> tuple[float, float]:
    """Return mean and sample standard deviation (n - 1) over seeds; NaN values are left out, one value has no deviation."""
    array = np.asarray(values, dtype=np.float64)
    array = array[~np.isnan(array)]
    if not len(array):
        return math.nan, math.nan
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else math.nan


def _defined(values: NDArray[np.float64], groups: Groups) -> tuple[NDArray[np.float64], Groups]:
    """Leave out what is NaN, and its groups.

    Raises:
        ValueError: It is not one number a case, or the groups are of another length.
    """
    if values.ndim != 1 or not len(values):
        raise ValueError(f"expected one number a case, found shape {values.shape}")
    if groups is not None and len(groups) != len(values):
        raise ValueError(f"{len(groups)} groups for {len(values)} rows")
    kept = np.flatnonzero(~np.isnan(values))
    return values[kept], None if groups is None else [groups[int(row)] for row in kept]


def _members(rows: int, groups: Groups) -> list[NDArray[np.int64]]:
    if rows < 1:
        raise ValueError("no rows to draw from")
    if groups is None:
        return [np.array([row]) for row in range(rows)]
    if len(groups) != rows:
        raise ValueError(f"{len(groups)} groups for {rows} rows")
    found: dict[Hashable, list[int]] = {}
    for row, group in enumerate(groups):
        found.setdefault(group if not isinstance(group, np.generic) else group.item(), []).append(row)
    return [np.array(numbers) for numbers in found.values()]
