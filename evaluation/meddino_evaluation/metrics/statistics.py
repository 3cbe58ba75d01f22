"""Intervals and tests for evaluation results: bootstrap intervals and permutation tests over patients, DeLong, Holm.

Intervals come from the bootstrap, p values from permutations: with few patients the share of bootstrap differences on one side
of zero says nothing (two patients gave p = 0.001), while a permutation test keeps its error rate at every number of patients.
Fewer than six patients cannot reach p < 0.05 (two-sided, the smallest p of n is 2 / 2^n) and their resamples cannot cover a
mean with 95 %: for them there is neither. Nothing here bootstraps a bootstrap (a published study did, and its intervals were
seventy times too narrow).
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from meddino.core.seeds import numpy_rng

FEWEST_DEFINED = 0.5
"""Below this share of resamples in which the statistic is defined, no interval is given."""

ENUMERATED = 4096
"""Up to this many exchanges of two models (13 patients) all are tried; beyond, some are drawn."""

PERMUTATIONS = 9999
"""Exchanges drawn for means, beyond `ENUMERATED`."""

_EXACT_WILCOXON = 13
"""Up to this many differences all signs are tried, ties or not."""

_TIE = 1e-9
"""Relative; sums in another order differ by less than this and count as equal."""


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


@dataclass(frozen=True)
class PairedResult:
    """A difference of two models on the same cases.

    Attributes:
        difference: First minus second.
        low: Lower end of the interval of the difference.
        high: Upper end.
        p_value: Two-sided, of the permutation test over patients; NaN where even the smallest could not be significant.
        smallest_p: The smallest that this number of patients and permutations can give.
        permutations: Exchanges drawn at random; 0: all were tried, the p value is exact.
    """

    difference: float
    low: float
    high: float
    p_value: float
    smallest_p: float
    permutations: int


NO_RESULT = PairedResult(math.nan, math.nan, math.nan, math.nan, math.nan, 0)


Groups = Sequence[Hashable] | NDArray[np.generic] | None
Span = tuple[float, float]
"""Lowest and highest value that a statistic can take."""

UNBOUNDED: Span = (-math.inf, math.inf)
NOT_NEGATIVE: Span = (0.0, math.inf)
SHARE: Span = (0.0, 1.0)


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

    def means(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return [resamples]: the mean of one number a row, [rows], in every resample."""
        sums = self.sums(values)
        sizes = np.array([len(rows) for rows in self._members], dtype=np.float64)
        means: NDArray[np.float64] = sums[self._draws].sum(1) / sizes[self._draws].sum(1)
        return means

    def sums(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return [patients]: the sum of [rows] over each patient's; patients are drawn and exchanged, never rows."""
        return np.array([values[rows].sum() for rows in self._members])

    def owners(self) -> NDArray[np.int64]:
        """Return [rows]: the index of each row's patient."""
        owner = np.empty(self.rows, dtype=np.int64)
        for number, rows in enumerate(self._members):
            owner[rows] = number
        return owner

    def weights(self) -> NDArray[np.int64]:
        """Return how often each row occurs in each resample [resamples, rows]."""
        patients = np.zeros(self._draws.shape, dtype=np.int64)
        np.add.at(patients, (np.arange(len(patients))[:, None], self._draws), 1)
        return patients[:, self.owners()]

    def interval(self, estimate: float, drawn: NDArray[np.float64], span: Span = UNBOUNDED) -> Interval:
        """Return the interval of a statistic: at either end the farther one of two intervals.

        The percentile interval alone is too narrow for few patients and for skewed numbers (90 % instead of 95 % for six
        patients' Dice), though its two percentiles are moved out by the ratio of Student's t to the normal (expanded percentile
        interval). The other is Student's t with the bootstrap's standard error, on a scale on which the statistic has no ends:
        log odds within a span, the logarithm above one end. It alone fails for counts (accuracy) of few patients.

        Resamples where the statistic is undefined are left out. There is no interval (NaN) if that is more than half of them;
        with too few patients (`can_be_significant`): no resample of 4 reaches beyond its patients, who all lie on one side of
        the truth in 12 % of studies; and where all resamples agree (ten of ten right): an interval without width would claim
        certainty.

        Args:
            estimate: Of all rows.
            drawn: Of each resample; NaN where undefined.
            span: What the statistic can be at all.

        Source: Efron and Tibshirani 1993, chapters 12 and 13; Hesterberg 2015 (expanded percentile interval); Qin and
        Hotilovac 2008 (log odds for AUROC). Taking the farther end is ours.
        """
        defined, patients = drawn[~np.isnan(drawn)], len(self._members)
        enough = len(defined) and len(defined) >= FEWEST_DEFINED * len(drawn) and can_be_significant(patients, self.level)
        if not enough or np.ptp(defined) <= _TIE * max(1.0, float(np.abs(defined).max())):
            return Interval(estimate, math.nan, math.nan, self.level, len(defined))
        wider = math.sqrt(patients / (patients - 1))
        student = float(stats.t.ppf((1 + self.level) / 2, patients - 1))
        tail = float(stats.norm.cdf(-student * wider))
        low, high = (float(end) for end in np.quantile(defined, [tail, 1 - tail]))
        ends = _around(estimate, student * wider * float(defined.std()), span)
        return Interval(estimate, min(low, ends[0]), max(high, ends[1]), self.level, len(defined))

    def paired(
        self, difference: float, drawn: NDArray[np.float64], permuted: NDArray[np.float64], all_tried: bool
    ) -> PairedResult:
        """Return a difference with its bootstrap interval and the p value of its permutation test.

        Args:
            difference: The estimate.
            drawn: One difference a resample; NaN where undefined.
            permuted: One difference for each row of `exchanges`.
            all_tried: Whether these were all.
        """
        if math.isnan(difference):
            return NO_RESULT
        found, patients = self.interval(difference, drawn), len(self._members)
        smallest = max(smallest_p(patients), 0.0 if all_tried else 1 / (len(permuted) + 1))
        p_value = permutation_p(difference, permuted, all_tried) if can_be_significant(patients, self.level) else math.nan
        return PairedResult(difference, found.low, found.high, p_value, smallest, 0 if all_tried else len(permuted))


def smallest_p(patients: int) -> float:
    """Return the smallest two-sided p value of a test that exchanges two models in each of so many patients: 2 / 2^n."""
    return min(1.0, 2.0 ** (1 - patients)) if patients else math.nan


def can_be_significant(patients: int, level: float = 0.95) -> bool:
    """Return whether a paired test over so many patients can reach 1 - level: from six patients on at 95 %."""
    return patients > 0 and smallest_p(patients) <= 1 - level + 1e-12


def exchanges(patients: int, permutations: int, seed: int) -> tuple[NDArray[np.bool_], bool]:
    """Return in which patients two models change places [ways, patients], and whether these are all ways.

    All means one of each pair of opposite ways, which give differences of the same size: `2^(patients - 1)`, the first of them
    without any change. Beyond `ENUMERATED` ways, `permutations` are drawn.
    """
    if patients < 1 or 2 ** (patients - 1) > ENUMERATED:
        return numpy_rng(seed, "permutation").integers(0, 2, size=(permutations, patients)).astype(bool), False
    ways = np.arange(2 ** (patients - 1))
    return (ways[:, None] >> np.arange(patients)[None]) & 1 == 1, True


def permutation_p(observed: float, permuted: NDArray[np.float64], all_tried: bool) -> float:
    """Return the share of differences at least as far from zero as the observed one.

    Where ways were drawn, the observed one counts as one more of them, so that p is never too small.

    Source: Phipson and Smyth 2010.
    """
    extreme = int((np.abs(permuted) >= abs(observed) * (1 - _TIE) - 1e-15).sum())
    return extreme / len(permuted) if all_tried else (extreme + 1) / (len(permuted) + 1)


def bootstrap_mean(
    values: ArrayLike,
    *,
    groups: Groups = None,
    span: Span = UNBOUNDED,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Return the mean of one number a case (Dice, 0/1 for correct, ...) with its interval, see `Resampling.interval`.

    Args:
        values: [n]; NaN (undefined for that case) is left out.
        groups: The patient of each value.
        span: What a value can be at all.
        level: Confidence level.
        resamples: How many.
        seed: Equal seeds draw equal resamples.
    """
    array, kept_groups = _defined(np.asarray(values, dtype=np.float64), groups)
    if not len(array):
        return Interval(math.nan, math.nan, math.nan, level, 0)
    drawing = Resampling(len(array), kept_groups, level=level, resamples=resamples, seed=seed)
    return drawing.interval(float(array.mean()), drawing.means(array), span)


def paired_means(
    a: ArrayLike, b: ArrayLike, *, groups: Groups = None, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> PairedResult:
    """Compare the means of one number a case of two models: bootstrap interval, and sign-flip permutation test over patients.

    If the models are exchangeable, each patient's difference could as well have had the other sign; all sign patterns are tried
    up to 13 patients, beyond `PERMUTATIONS` are drawn.

    Args:
        a: [n] of the first model; a case that is NaN in either is left out.
        b: [n] of the second.
        groups: The patient of each case; his cases change sign together.
        level: Confidence level.
        resamples: Of the interval.
        seed: Equal seeds draw equal resamples and permutations.

    Source: Fisher 1935; Good 2005, chapter 3.
    """
    difference, kept_groups = _defined(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64), groups)
    if not len(difference):
        return NO_RESULT
    drawing = Resampling(len(difference), kept_groups, level=level, resamples=resamples, seed=seed)
    sums = drawing.sums(difference)
    flipped, all_tried = exchanges(len(sums), PERMUTATIONS, seed)
    permuted = (sums.sum() - 2 * (flipped @ sums)) / len(difference)
    return drawing.paired(float(difference.mean()), drawing.means(difference), permuted, all_tried)


def wilcoxon_signed_rank(a: ArrayLike, b: ArrayLike, *, groups: Groups = None, level: float = 0.95) -> float:
    """Return the two-sided p value of Wilcoxon's signed-rank test over patients.

    Args:
        a: [n] of the first model; a case that is NaN in either is left out.
        b: [n] of the second.
        groups: The patient of each case, whose mean difference counts once. None: each case is a patient.
        level: With too few patients to reach 1 - level the p value is NaN; without any difference it is 1.
    """
    values, kept_groups = _defined(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64), groups)
    if not len(values):
        return math.nan
    members = _members(len(values), kept_groups)
    difference = np.array([values[rows].mean() for rows in members])
    if not can_be_significant(len(difference), level):
        return math.nan
    # Zeros are dropped (Wilcoxon 1945). SciPy's exact table knows no ties, and its normal approximation is for more patients.
    difference = difference[difference != 0]
    if not len(difference):
        return 1.0
    if len(difference) <= _EXACT_WILCOXON:
        ranks = stats.rankdata(np.round(np.abs(difference), 12))
        flipped, all_tried = exchanges(len(ranks), 0, 0)
        total = float(np.sign(difference) @ ranks)
        return permutation_p(total, np.abs(ranks.sum() - 2 * (flipped @ ranks)), all_tried)
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


def mean_and_std(values: ArrayLike) -> tuple[float, float]:
    """Return mean and sample standard deviation (n - 1) over seeds; NaN values are left out, one value has no deviation."""
    array = np.asarray(values, dtype=np.float64)
    array = array[~np.isnan(array)]
    if not len(array):
        return math.nan, math.nan
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else math.nan


def _around(estimate: float, half_width: float, span: Span) -> tuple[float, float]:
    """Return both ends of estimate ± half width, on a scale on which a span has no ends; none beyond it if it stands at one."""
    bottom, top = span
    if math.isinf(bottom):
        return estimate - half_width, estimate + half_width
    if not bottom < estimate < top:
        return estimate, estimate
    above = estimate - bottom
    if math.isinf(top):
        factor = math.exp(min(half_width / above, 700.0))
        return bottom + above / factor, bottom + above * factor
    below = top - estimate
    odds, width = math.log(above / below), half_width * (1 / above + 1 / below)
    low, high = (bottom + (top - bottom) * float(special.expit(odds + sign * width)) for sign in (-1, 1))
    return low, high


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
