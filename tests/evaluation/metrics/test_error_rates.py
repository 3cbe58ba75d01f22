"""Simulated studies without a difference, and with a known truth: what is printed must be wrong as rarely as it says."""

import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
from meddino_evaluation.metrics.classification_bootstrap import metric_intervals, paired_metric
from meddino_evaluation.metrics.delong import delong
from meddino_evaluation.metrics.statistics import NOT_NEGATIVE, SHARE, bootstrap_mean, paired_means, wilcoxon_signed_rank
from meddino_evaluation.segmentation.dense_probe.run import _interval
from scipy import stats

FEWEST = 6
Study = Callable[[np.random.Generator, int], float]


def _dice(rng: np.random.Generator, n: int) -> np.ndarray:
    """Two models' Dice on the same cases: skewed, tied (rounded), each fails outright now and then."""
    case = rng.beta(8, 2, size=n)
    values = np.clip(case + rng.normal(0, 0.05, size=(2, n)), 0, 1)
    return np.where(rng.random((2, n)) < 0.1, 0.0, values).round(2)


def _slices(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Differences of three cases of each patient, who are alike."""
    patients = np.repeat(np.arange(n), 3)
    return rng.normal(size=n)[patients] + 0.3 * rng.normal(size=3 * n), patients


def _two_classifiers(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    labels = np.arange(n) % 2
    logits = rng.normal(size=n) + 1.5 * labels + rng.normal(size=(2, n))
    logits[1] = 3 * logits[1] - 2  # as good, on another scale
    positive = 1 / (1 + np.exp(-logits))
    return labels, np.stack([1 - positive, positive], -1)


def _means(rng: np.random.Generator, n: int) -> float:
    return paired_means(*_dice(rng, n), resamples=20).p_value


def _means_of_patients(rng: np.random.Generator, n: int) -> float:
    values, patients = _slices(rng, n)
    return paired_means(values, np.zeros(3 * n), groups=patients, resamples=20).p_value


def _wilcoxon(rng: np.random.Generator, n: int) -> float:
    return wilcoxon_signed_rank(*_dice(rng, n))


def _wilcoxon_of_patients(rng: np.random.Generator, n: int) -> float:
    values, patients = _slices(rng, n)
    return wilcoxon_signed_rank(values, np.zeros(3 * n), groups=patients)


def _auroc(rng: np.random.Generator, n: int) -> float:
    labels, (a, b) = _two_classifiers(rng, n)
    groups = list(range(n))
    return paired_metric("binary", [(groups, labels, a)], [(groups, labels, b)], "auroc", resamples=200).p_value


def _accuracy(rng: np.random.Generator, n: int) -> float:
    labels = np.arange(n) % 2
    a, b = rng.beta(2, 2, size=(2, n))
    groups = list(range(n))
    runs = [[(groups, labels, np.stack([1 - p, p], -1))] for p in (a, b)]
    return paired_metric("binary", runs[0], runs[1], "accuracy", resamples=200).p_value


def _delong(rng: np.random.Generator, n: int) -> float:
    labels, both = _two_classifiers(rng, n)
    return delong(labels, both[0, :, 1], both[1, :, 1]).p_value if n >= FEWEST else math.nan


def _share(study: Study, patients: range, trials: int, below: float = 0.05, seed: int = 0) -> float:
    rng = np.random.default_rng(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # SciPy: normal approximation for ties
        return float(np.mean([study(rng, n) <= below for n in patients for _ in range(trials)]))


def _kappa(rng: np.random.Generator, n: int) -> float:
    labels = np.arange(n) % 3
    runs = [[(list(range(n)), labels, rng.dirichlet(np.ones(3), size=n))] for _ in range(2)]
    return paired_metric("ordinal", runs[0], runs[1], "kappa", resamples=200).p_value


P_VALUES = [_means, _means_of_patients, _wilcoxon, _wilcoxon_of_patients, _auroc, _accuracy, _kappa, _delong]


@pytest.mark.parametrize("study", P_VALUES)
def test_p_values__are_withheld_where_they_cannot_be_significant(study):
    rng = np.random.default_rng(1)
    assert all(math.isnan(study(rng, n)) for n in range(1, FEWEST) for _ in range(3))


@pytest.mark.parametrize("study", P_VALUES)
def test_p_values__false_positives_are_at_most_5_percent(study):
    share = _share(study, range(FEWEST, 21), 20)
    assert share <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)


@pytest.mark.slow
@pytest.mark.timeout(5400)  # one of them takes eight minutes of one core
@pytest.mark.parametrize("study", P_VALUES)
def test_p_values__false_positives_at_each_number_of_patients(study):
    nominal, trials, numbers = 0.05, 2000, range(1, 21)
    shares = {n: _share(study, range(n, n + 1), trials, seed=n) for n in numbers}
    # So many shares are looked at that one in a hundred runs of this test may see one beyond its bound, if all are right.
    bound = stats.binom.ppf(1 - 0.01 / (len(numbers) * len(P_VALUES)), trials, nominal) / trials
    assert all(share <= bound for share in shares.values()), shares
    some = [share for n, share in shares.items() if n >= FEWEST]
    assert np.mean(some) <= nominal + 3 * math.sqrt(0.05 * 0.95 / (trials * len(some))), shares


def _covered(study: Callable[[np.random.Generator, int], tuple[float, float, float]], patients: range, trials: int) -> float:
    rng = np.random.default_rng(0)
    printed = [study(rng, n) for n in patients for _ in range(trials)]
    printed = [one for one in printed if not math.isnan(one[1])]
    return float(np.mean([low <= truth <= high for truth, low, high in printed]))


def _mean_interval(rng: np.random.Generator, n: int) -> tuple[float, float, float]:
    found = bootstrap_mean(rng.beta(8, 2, size=n), span=SHARE, resamples=400)
    return 0.8, found.low, found.high


def _patient_interval(rng: np.random.Generator, n: int) -> tuple[float, float, float]:
    values, patients = _slices(rng, n)
    found = bootstrap_mean(values, groups=patients, resamples=400)
    return 0.0, found.low, found.high


def _difference_interval(rng: np.random.Generator, n: int) -> tuple[float, float, float]:
    found = paired_means(rng.normal(size=n), rng.normal(size=n), resamples=400)
    return 0.0, found.low, found.high


def _accuracy_interval(rng: np.random.Generator, n: int) -> tuple[float, float, float]:
    found = bootstrap_mean(rng.random(n) < 0.85, span=SHARE, resamples=400)
    return 0.85, found.low, found.high


def _auroc_interval(rng: np.random.Generator, n: int) -> tuple[float, float, float]:
    labels = np.arange(n) % 2
    positive = 1 / (1 + np.exp(-rng.normal(size=n) - labels))
    runs = [(list(range(n)), labels, np.stack([1 - positive, positive], 1))]
    found = metric_intervals("binary", runs, names=["auroc"], resamples=400)["auroc"]
    return float(stats.norm.cdf(1 / math.sqrt(2))), found.low, found.high


def _distance_interval(rng: np.random.Generator, n: int) -> tuple[float, float, float]:
    found = bootstrap_mean(rng.gamma(2, 3, size=n), span=NOT_NEGATIVE, resamples=400)
    return 6.0, found.low, found.high


def _f1_interval(rng: np.random.Generator, n: int) -> tuple[float, float, float]:
    """Of a probe: macro-F1 from each patient's counts, who differ."""
    ease = rng.beta(6, 3, size=n)
    right = rng.binomial(40, ease)
    counts = np.stack([right, 40 - right, 40 - right], -1)[:, None].repeat(2, 1)  # of background, which is not counted, too
    found = _interval([counts], 400)
    return 2 / 3, *(math.nan if end is None else end for end in found)


INTERVALS = [
    _distance_interval,
    _f1_interval,
    _mean_interval,
    _patient_interval,
    _difference_interval,
    _accuracy_interval,
    _auroc_interval,
]


@pytest.mark.parametrize("study", INTERVALS)
def test_intervals__none_below_six_patients_and_cover_above(study):
    rng = np.random.default_rng(1)
    assert all(math.isnan(study(rng, n)[1]) for n in range(1, FEWEST))
    assert _covered(study, range(FEWEST, 21), 20) >= 0.945 - 3 * math.sqrt(0.05 * 0.95 / 300)


@pytest.mark.slow
@pytest.mark.parametrize("study", INTERVALS)
@pytest.mark.parametrize("patients", range(FEWEST, 21))
def test_intervals__cover_at_each_number_of_patients(study, patients):
    assert _covered(study, range(patients, patients + 1), 1500) >= 0.94 - 2.5 * math.sqrt(0.05 * 0.95 / 1500)
